"""What a run refuses before it costs anything, and what it never leaves behind."""

from pathlib import Path

import pytest
from command_kit import invoke, refused

from sae_granary import train_sae
from sae_granary.train.cli import app

REPO = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", ""], "steps='': expected a whole number such as 20000, 20k, 5M or 1.5B or none"),
        (["--tokens", "1.5"], "tokens='1.5': expected a whole number such as 20000, 20k, 5M or 1.5B or none"),
        (["--runs-dir", REPO / "train", "--name", "new"], "train/new belongs to Python code (train/)"),
        (["--runs-dir", "a\nb"], "runs_dir is 'a\\nb': it holds a newline or control character"),
        (["--runs-dir", REPO / "cache", "--name", "load"], "cache/load belongs to Python code (load/)"),
        (["--d-sae", "10000000000"], "fits; or raise --grad-acc-steps"),
        (["--set", "seed=99999999999999999999"], "expected a value <= 9223372036854775807"),
        (["--set", "k_start=2"], "k_start=2: expected k_start >= k=4"),
        (["--name", "n" * 300], "cannot be made: File name too long"),
        (["--name", "a\nb"], "expected one folder name"),
        (
            ["--wandb-artifacts"],
            "wandb_artifacts=True uploads to Weights & Biases, but wandb=off: give --wandb online or",
        ),
        (["--wandb", "offlin"], "wandb='offlin': expected one of off, offline, online, did you mean"),
        (["--layer", "4"], "no hook point 'layer_4' (it has: layer_3), did you mean 'layer_3'?"),
        (["--cache", "nowhere"], "nowhere does not exist"),
        (["--cache", ""], "no cache was given; name its folder with --cache"),
        (["--cache", REPO / "docs"], "docs is not an activation cache"),
        (["--type", "route"], "type route reads at least 2 hook points, got 1: layer_3"),
    ],
    ids=lambda value: "_".join(map(str, value))[-30:] if isinstance(value, list) else None,
)
def test_one_line_and_nothing_written(make_cache, tmp_path: Path, flags: list[object], message: str) -> None:
    common = ["--cache", make_cache(), "--type", "topk", "--k", 4, "--steps", 2, "--batch-size", 64, "--d-sae", 32]
    assert message in refused(app, "run", *common, "--runs-dir", tmp_path / "runs", "-q", *flags)
    assert not list(tmp_path.glob("runs/*"))


def test_a_runs_dir_that_is_a_file_and_a_config_that_is_no_text(make_cache, tmp_path: Path) -> None:
    common = ["run", "--cache", make_cache(), "--type", "topk", "--k", 4, "--steps", 2, "--batch-size", 64]
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    assert "cannot be made" in refused(app, *common, "--runs-dir", tmp_path / "file")
    assert "is not UTF-8 text" in refused(app, *common, "--config", tmp_path / "file")


def test_a_junk_summary_does_not_make_a_run_complete(make_cache, tmp_path: Path) -> None:
    settings = {"type": "topk", "k": 4, "d_sae": 32, "steps": 3, "batch_size": 64}
    folder = train_sae(cache=str(make_cache()), runs_dir=str(tmp_path), name="a", **settings).folder
    summary = (folder / "summary.json").read_text()
    (folder / "summary.json").write_text("{}")
    invoke(app, "resume", folder, "-q")
    assert (folder / "summary.json").read_text()[:60] == summary[:60]
    assert "is complete" in refused(app, "resume", folder, "-q")
