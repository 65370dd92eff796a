"""sae-cache: what each command prints, its exit code, and that errors are one line."""

import json
import shutil
from pathlib import Path

import pytest
from cache_kit import flip, harvest, interrupted, toy_spec
from cache_kit import run_cache as run
from command_kit import refused

from sae_granary.cache.cli import app


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli") / "cache"
    harvest(root / "bert_l6", toy_spec(provenance={"model": {"id": "[red]bert[/red]"}, "seed": 3}))
    harvest(root / "gpt2_l1", toy_spec("float32"))
    (root / "broken").mkdir()
    (root / "broken/manifest.json").write_text("{")
    (root / "notes").mkdir()
    return root


def test_ls_names_every_cache_and_what_is_wrong_with_it(root):
    shown = run("ls", root).stdout
    for text in ("bert_l6", "gpt2_l1", "layer_1, layer_3", "[red]bert[/red]", "float32", "complete", "not valid JSON"):
        assert text in shown
    assert "notes" not in shown
    entries = json.loads(run("ls", root, "--json").stdout)
    assert [Path(entry["path"]).name for entry in entries] == ["bert_l6", "broken", "gpt2_l1"]
    assert entries[0]["hook_points"] == ["layer_1", "layer_3"]
    assert "no caches in" in run("ls", root / "notes").stdout
    assert "is not a folder" in run("ls", root / "none", code=2).stderr


def test_ls_leaves_code_out(tmp_path):
    harvest(tmp_path / "data")
    for name in ("load", "__pycache__"):
        shutil.copytree(tmp_path / "data", tmp_path / name)
    (tmp_path / "load/__init__.py").touch()
    assert [Path(entry["path"]).name for entry in json.loads(run("ls", tmp_path, "--json").stdout)] == ["data"]


def test_git_takes_the_code_of_every_wing():
    cache = Path(__file__).parents[1] / "cache"
    lines = (cache.parent / ".gitignore").read_text().splitlines()
    assert {f"!/cache/{init.parent.name}/" for init in cache.glob("*/__init__.py")} <= set(lines)


def test_info_shows_facts_provenance_and_statistics(root):
    shown = run("info", root / "bert_l6").stdout
    for text in ("complete, format 1", "[red]bert[/red]", "seed", "layer_3", "total variance", "median"):
        assert text in shown
    body = json.loads(run("info", root / "bert_l6", "--json").stdout)
    assert body["dtype"] == "bfloat16"
    assert body["provenance"]["seed"] == 3
    assert set(body["statistics"]) == {"layer_1", "layer_3"}
    assert body["n_rows"] == sum(shard["n_rows"] for shard in _shards(root / "bert_l6"))


def _shards(path):
    return json.loads((path / "manifest.json").read_bytes())["shards"]


def test_verify_says_ok_or_names_the_damage(root, tmp_path):
    assert "ok (" in run("verify", root / "bert_l6").stdout
    path = Path(shutil.copytree(root / "bert_l6", tmp_path / "damaged"))
    flip(path / "norms/layer_3/c.0", 0)
    shown = run("verify", path, code=1).stdout
    assert "norms/layer_3/c.0: checksum is" in shown
    assert ": 1 problem (" in shown
    assert "sizes" in run("verify", path, "--quick").stdout
    body = json.loads(run("verify", path, "--json", code=1).stdout)
    assert [problem["path"] for problem in body["problems"]] == ["norms/layer_3/c.0"]


def test_verify_of_an_unfinished_cache_says_so(tmp_path):
    interrupted(tmp_path / "toy")
    assert "incomplete" in run("verify", tmp_path / "toy").stdout
    assert "incomplete" in run("info", tmp_path / "toy").stdout


@pytest.mark.parametrize("command", ["info", "verify"])
def test_an_error_is_one_line_and_exit_code_2(command, root):
    line = refused(app, command, root / "notes")
    assert line.startswith("error: ")
    assert "is not an activation cache" in line


def test_debug_shows_the_traceback(root):
    result = run("info", root / "notes", "--debug", code=1)
    assert type(result.exception).__name__ == "NotACacheError"
