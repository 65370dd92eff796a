"""The public names: lazy, typed, documented by examples that run, importable from wherever a user stands."""

import ast
import doctest
import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_package import ROOT, STAGES, code_folders

import sae_granary
from sae_granary.common.signals import StopRequest
from sae_granary.train.callbacks import Callback, StepEvent

FUNCTIONS = [name for name in sae_granary.__all__ if not name.startswith("_")]


def python(cwd: Path, *arguments: str, path: str) -> str:
    """What a fresh Python in a folder prints."""
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, sae_granary\n"
        "dir(sae_granary), sae_granary.__version__\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'transformers', 'zarr', 'typer')])\n"
        "sae_granary.train_sae\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('wandb', 'transformers', 'matplotlib', 'typer')])"
    )
    assert python(ROOT, "-c", code, path=".") == "[]\n[]"


def test_what_the_type_checker_sees_is_what_is_imported() -> None:
    tree = ast.parse(Path(sae_granary.__file__).read_text(encoding="utf-8"))
    [guard] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name: (str(node.module).removeprefix("sae_granary."), alias.name)
        for node in guard.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == sae_granary._LAZY
    assert sorted([*seen, "__version__"]) == sae_granary.__all__
    assert set(sae_granary.__all__) <= set(dir(sae_granary))
    for name in FUNCTIONS:
        assert inspect.isclass(getattr(sae_granary, name)) == name[0].isupper()
    with pytest.raises(AttributeError, match="has no attribute 'open_cahce'"):
        sae_granary.open_cahce  # noqa: B018


def test_no_function_bears_a_packages_name() -> None:
    packages = {*STAGES, "common", "analyze"}
    for path in (path for folder in code_folders() for path in folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not functions & packages, path


def test_the_keywords_of_a_harvest_are_its_flags(tmp_path: Path) -> None:
    from sae_granary.common.errors import ConfigError
    from sae_granary.harvest.config import TextConfig
    from sae_granary.harvest.settings.make import make_config

    given = {"text_columns": "a,b", "max_tokens": "5M", "out": tmp_path, "split": "test"}
    made = make_config({"model": "demo", "layers": [4, 2], **given})
    assert (made.where.layers, made.text.text_columns, made.max_tokens) == ((2, 4), ("a", "b"), 5_000_000)
    assert (made.out, made.text.split, made.text.dataset) == (tmp_path, "test", TextConfig().dataset)
    for settings, message in (
        ({"model": "demo", "layer": 3}, "unknown setting 'layer' of a harvest, did you mean 'layers'"),
        ({"layers": 3}, "no model was given"),
        ({"model": "demo", "layers": 3, "max_tokens": "many"}, "max_tokens='many': expected a whole number"),
        ({"config": made, "layers": 3}, r"a config and settings \(layers\) were given"),
    ):
        with pytest.raises(ConfigError, match=message):
            sae_granary.harvest_activations(**settings)


class _StopAt(Callback):
    """Ask for a stop as Ctrl-C does."""

    def __init__(self, step: int, stop: StopRequest) -> None:
        self.step, self.request = step, stop

    def on_step(self, event: StepEvent) -> None:
        if event.step == self.step:
            self.request.signum = signal.SIGINT


def make_what_the_examples_read() -> None:
    """In the current folder: a small harvest of the demo, a finished run, one that was stopped, a finished sweep."""
    from sae_granary import harvest_activations, train_sae, train_sweep
    from sae_granary.train.errors import InterruptedRunError

    cache = "cache/demo_l3"
    harvest_activations(model="demo", dataset="demo", layers=[3], max_tokens="3k", out=cache, device="cpu", quiet=True)
    common = {"cache": cache, "type": "topk", "d_sae": 768, "steps": 4, "batch_size": 256, "device": "cpu"}
    train_sae(**common, k=8, name="demo_topk")
    stop = StopRequest()
    with pytest.raises(InterruptedRunError):
        train_sae(**common, k=8, name="stopped", stop=stop, callbacks=[_StopAt(2, stop)])
    train_sweep({"k": [8, 16]}, common, name="demo_sweep")


def test_the_examples_of_the_docstrings_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_what_the_examples_read()
    runner = doctest.DocTestRunner()
    for name in FUNCTIONS:
        [test] = doctest.DocTestFinder(recurse=False).find(getattr(sae_granary, name), name, globs={})
        assert test.examples, f"{name} has no example"
        assert runner.run(test).failed == 0, name


@pytest.fixture
def users_folder(tmp_path: Path) -> Path:
    """A folder whose modules are named like our stages, and raise."""
    for name in ("train", "cache", "harvest", "models", "sae_core", "common"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the module of a user')\n")
    return tmp_path


USE = """
from sae_granary import load_sae, open_cache, train_sae
import sae_granary.harvest.run, sae_granary.train.sweeps.sweep
print(open_cache({cache!r}).n_rows, train_sae.__module__)
"""
SPAWN = """
import multiprocessing
def rows(path):
    from sae_granary import open_cache
    return open_cache(path).n_rows
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(rows, ({cache!r},)) > 0)
"""
TINY = str(ROOT / "tests" / "data" / "format1_tiny" / "float32")


def _link(folder: Path, name: str) -> Path:
    (folder / name).symlink_to(ROOT, target_is_directory=True)
    return folder


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(lambda tmp: (ROOT, "."), id="checkout, PYTHONPATH=."),
        pytest.param(lambda tmp: (_link(tmp, "sae-granary"), str(ROOT)), id="parent of a clone"),
        pytest.param(lambda tmp: (_link(tmp, "sae_granary"), str(ROOT)), id="parent of a clone of the import name"),
    ],
)
def test_it_can_be_imported_from(where: Callable[[Path], tuple[Path, str]], tmp_path: Path) -> None:
    cwd, path = where(tmp_path)
    assert python(cwd, "-c", USE.format(cache=TINY), path=path).endswith("sae_granary.train.run")


def test_a_users_modules_of_the_same_names_are_in_nobodys_way(users_folder: Path) -> None:
    script = users_folder / "script.py"
    script.write_text(USE.format(cache=TINY))
    assert python(users_folder, str(script), path=str(ROOT)).endswith("sae_granary.train.run")
    for stage in ("harvest", "cache", "train"):
        assert "Usage" in python(users_folder, "-m", f"sae_granary.{stage}.cli", "--help", path=str(ROOT))


def test_a_spawned_process_imports_it_too(users_folder: Path) -> None:
    script = users_folder / "script.py"
    script.write_text(SPAWN.format(cache=TINY))
    assert python(users_folder, str(script), path=str(ROOT)) == "True"
