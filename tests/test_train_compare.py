"""`sae-train compare`: runs, sweeps and folders of them in one table; sorted, as JSON and CSV, as plots."""

import csv
import io
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from command_kit import invoke

from sae_granary.common.signed import sign
from sae_granary.sae_core import make_config, registry
from sae_granary.train.cli import app
from sae_granary.train.result.comparison import comparison_rows, find_runs, sort_rows
from sae_granary.train.result.plots import MANY_CURVES, curves, pareto

QUICK = ["--batch-size", "128", "--steps", "12", "--eval-rows", "300", "--d-sae", "32", "-q"]


call = partial(invoke, app)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ with runs of two types on two caches, and a sweep."""
    from conftest import write_cache

    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed, name in enumerate(("toy", "other")):
            write_cache(folder / name, seed=seed)
        call("run", "--cache", "toy", "--type", "topk", "--k", 4, "--name", "top", *QUICK)
        call("run", "--cache", "toy", "--type", "vanilla", "--set", "l1_coef=2", "--name", "l1", *QUICK)
        call("run", "--cache", "other", "--type", "jumprelu", "--set", "l0_target=6", "--name", "jump", *QUICK)
        call("sweep", "--cache", "toy", "--type", "topk", "--grid", "k=2,3", "--name", "grid", *QUICK)
    return folder


@pytest.fixture(autouse=True)
def _work(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("toy", "other", "runs"):
        (tmp_path / name).symlink_to(trained / name)
    monkeypatch.chdir(tmp_path)


def rows_of(*args) -> list[dict]:
    return json.loads(call("compare", *args, "--json").stdout)["runs"]


def test_a_folder_of_runs_and_sweeps(trained: Path) -> None:
    (trained / "runs" / "notes").mkdir(exist_ok=True)  # is passed over
    result = call("compare", "runs")
    for word in ("top", "l1", "jump", "layer_3", "toy", "other", "k=4", "l1_coef=2", "l0_target=6", "k=3"):
        assert word in result.stdout, word
    assert "warning: the runs are of 2 caches (" in result.stderr
    assert "compare L0, FVU and CE score within one only" in result.stderr
    names = [row["name"] for row in rows_of("runs")]
    assert len(names) == 5
    assert names == [row["name"] for row in rows_of("runs", "runs/top", "runs/grid")]  # each once
    assert call("compare", "runs/top", "runs/l1").stderr == ""


def test_json_and_csv_have_every_metric() -> None:
    [row] = rows_of("runs/top")
    summary = json.loads(Path("runs/top/summary.json").read_text())
    assert row["target"] == "k=4"
    assert row["cache"] == "toy"
    for name, value in summary["eval"].items():
        assert row[name] == value
    [read] = csv.DictReader(io.StringIO(call("compare", "runs/top", "--csv").stdout))
    assert float(read["fvu"]) == row["fvu"]
    assert read["hook"] == "layer_3"
    assert "give one of them" in call("compare", "runs/top", "--csv", "--json", code=2).stderr


def test_sorting() -> None:
    ascending = [row["fvu"] for row in rows_of("runs", "--sort", "fvu")]
    assert ascending == sorted(ascending)
    assert [row["fvu"] for row in rows_of("runs", "--sort", "-fvu")] == ascending[::-1]
    assert [row["l0"] for row in rows_of("runs", "--sort", "L0")] == sorted(row["l0"] for row in rows_of("runs"))
    error = call("compare", "runs", "--sort", "fuv", code=2).stderr
    assert error.startswith("error: --sort fuv: expected a column: name, ")
    assert error.endswith("did you mean 'fvu'?\n")
    rows = [{"n": 1, "ce_score": None}, {"n": 2, "ce_score": 0.5}, {"n": 3, "ce_score": 0.7}]
    assert [row["n"] for row in sort_rows(rows, "-ce_score")] == [3, 2, 1]
    assert [row["n"] for row in sort_rows(rows, "ce_score")] == [2, 3, 1]


def test_what_analyze_measured_is_shown(tmp_path: Path) -> None:
    run = Path(shutil.copytree("runs/top", tmp_path / "copy"))
    assert "ce_score" not in comparison_rows([run])[0]
    fingerprint = json.loads((run / "run.json").read_text())["cache"]
    for key, cache, score in (("a", {"model": "another"}, 0.1), ("b", fingerprint, 0.9)):
        (run / "analysis" / key).mkdir(parents=True)
        body = {"format": 1, "identity": {"cache": cache}, "downstream": {"ce_score": score, "kl": None}}
        (run / "analysis" / key / "eval.json").write_bytes(sign(body))
    assert comparison_rows([run])[0]["ce_score"] == 0.9
    assert "CE score" in call("compare", run, "runs/l1").stdout
    (run / "analysis" / "b" / "eval.json").write_text('{"format": 1}')  # damaged
    assert "ce_score" not in comparison_rows([run])[0]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    shutil.copytree("runs/top", tmp_path / "copy")
    assert [row["name"] for row in comparison_rows([Path("runs/top"), Path("copy")])] == ["runs/top", "copy"]


def test_plots_are_written(tmp_path: Path) -> None:
    call("compare", "runs", "--pareto", "p.svg", "--curves", "c.svg")
    drawn = Path("p.svg").read_text()
    for label in ("k=4", "l1_coef=2", "l0_target=6"):
        assert f"<!-- {label} -->" in drawn  # matplotlib names its text in a comment
    for kind in ("topk", "vanilla", "jumprelu"):  # the last is in the second panel
        assert f"<!-- {kind} -->" in drawn
    for row in rows_of("runs"):
        assert f"<!-- {row['name']} -->" in Path("c.svg").read_text()
    for file, message in (
        ("p.doc", "give the file .png, .svg or .pdf"),
        ("x/p.png", "there is no folder x; create it"),
    ):
        refused = call("compare", "runs", "--pareto", file, code=2)
        assert (message in refused.stderr, refused.stdout) == (True, "")
    hostile = {
        "status": "finished",
        "hook": "a$b$",
        "type": "$x_",
        "d_sae": 8,
        "l0": 1,
        "fvu": 0.5,
        "target": "$\\frac$",
    }
    pareto([hostile, {**hostile, "d_sae": 16}], tmp_path / "hostile.png")
    pareto([], tmp_path / "empty.png")
    many = {f"run {i}": [{"tokens": 1, "loss": 1.0, "fvu": float("nan")}] for i in range(MANY_CURVES + 1)}
    curves(many, tmp_path / "many.png")
    assert {path.stat().st_size > 0 for path in tmp_path.glob("*.png")} == {True}


def test_a_narrow_terminal_gets_fewer_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    for columns, told in (("200", False), ("90", True)):
        monkeypatch.setenv("COLUMNS", columns)
        printed = call("compare", "runs/top", "runs/l1").stdout
        assert ("no room for time, tok/s" in printed) == told
        assert "l1_coef=2" in printed


def test_what_is_no_run() -> None:
    with pytest.raises(Exception, match=r"nowhere holds no finished run; expected a folder with summary.json"):
        find_runs([Path("nowhere")])
    with pytest.raises(Exception, match="toy holds no finished run"):
        find_runs([Path("toy")])


@pytest.mark.parametrize(
    ("name", "options", "target"),
    [
        ("jumprelu", {"recipe": "tanh"}, "l0_coef=10"),
        ("jumprelu", {"recipe": "l0", "l0_coef": 0.5}, "l0_coef=0.5"),
    ],
)
def test_targets(name: str, options: dict, target: str) -> None:
    assert make_config(registry.get(name), {"d_in": 8, "d_sae": 16, **options}).target == target
