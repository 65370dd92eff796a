"""The commands as people type them: results, refusals in one line, signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_kit import invoke, refused
from fork_kit import LIMIT

from sae_granary import open_cache, sae_core
from sae_granary.common.finished_run import read_metrics
from sae_granary.train.cli import app
from sae_granary.train.config.merge import TRAINER_KEYS
from sae_granary.train.config.type_options import TypeOptions

REPO = Path(__file__).resolve().parents[1]
QUICK = ["--batch-size", "128", "--steps", "20", "--eval-rows", "300"]


call = partial(invoke, app)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_run_leaves_a_result_that_loads(make_cache) -> None:
    make_cache()
    result = call("run", "--cache", "toy", "--type", "batchtopk", "--k", "4", *QUICK)
    folder = Path("runs/toy_layer_3_batchtopk_d128_k4_s0")
    assert str(folder) in result.stdout
    assert "batchtopk" in result.stdout
    assert re.search(r"^decoder_max_cosine 0\.\d+: largest cosine of a latent to another", result.stdout, re.MULTILINE)
    files = {p.name for p in folder.iterdir()}
    assert files == {
        "cfg.json", "sae_weights.safetensors", "granary.json", "config.yaml", "run.json", "metrics.jsonl",
        "summary.json", "checkpoints",
    }  # fmt: skip
    sae = sae_core.load(folder)
    opened = open_cache("toy")
    x = torch.from_numpy(np.array(opened.hook()[0:50]))
    out = sae(x)
    assert out.x_hat.shape == x.shape
    metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
    assert metadata["model_name"] == "toy-model"
    assert metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert metadata["hf_hook_name"] == "encoder.layer.3"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["eval_part"] == "heldout"
    assert summary["eval"]["n_rows"] >= min(300, summary["rows"]["heldout"])
    assert sum(v for k, v in summary["rows"].items() if k != "total") == summary["rows"]["total"]
    assert abs(summary["eval"]["l0"] - 4) < 0.8
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1, 10, 20]
    assert {"loss", "losses/fvu", "l0", "fvu", "dead", "lr", "tokens_per_second", "epoch", "cursor"} <= set(lines[0])


def test_yaml_below_flags_and_the_saved_config_repeats_the_run(make_cache, tmp_path) -> None:
    make_cache()
    Path("c.yaml").write_text("type: topk\nmodel:\n  k: 4\n  d_sae: 64\ntraining:\n  steps: 5\n  batch_size: 64\n")
    call("run", "--cache", "toy", "--config", "c.yaml", "--k", "3", "--set", "auxk_coef=0.5", "--name", "a", "-q")
    config = Path("runs/a/config.yaml").read_text()
    assert re.search(r"k: 3\n", config)
    assert "auxk_coef: 0.5" in config
    call("run", "--config", "runs/a/config.yaml", "--name", "b", "-q")
    weights = [Path(f"runs/{name}/sae_weights.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_types_lists_every_variant_with_its_options() -> None:
    output = call("types").stdout
    for name in sae_core.registry.names():
        assert re.search(rf"^{name} ", output, re.MULTILINE)
    assert "auxk_coef" in output
    assert "did you mean 'topk'?" in refused(app, "types", "topq")


def test_flags_are_settings() -> None:
    from typer.main import get_command

    commands_only = {"layer", "config", "assignments", "overwrite", "quiet", "debug"}
    commands_only |= {"help_all", "layer_stride", "resume", "dry_run", "verify", "stage"}
    names = {p.name for p in get_command(app).commands["run"].params} - commands_only
    assert set(FROZEN_FLAGS) <= names
    assert names == {*TRAINER_KEYS, *(spec.name for spec in fields(TypeOptions))}


# Frozen: people have these in their scripts.
FROZEN_FLAGS = sorted(
    """
    allow_incomplete batch_size cache compute_dtype d_sae device early_stop ema_decay epochs eval_downstream
    eval_every eval_rows exclude_tokens expansion_factor finetune_kl grad_acc_steps holdout hook init_from init_seed k
    keep
    keep_best keep_first_position keep_special lm log_every loss lr lr_schedule name normalize optimizer
    resample_every runs_dir save_every save_minutes seed shuffle_seed steps tensorboard tokens type wandb
    wandb_artifacts wandb_project warmup_steps weight_decay
    """.split()  # noqa: SIM905 (a list of 47 lines reads worse)
)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_exit(make_cache, signum, code) -> None:
    make_cache()
    args = ["run", "--cache", "toy", "--type", "topk", "--name", "a", "-b", "128", "--steps", "1M"]
    command = [sys.executable, "-m", "sae_granary.train.cli", *args]
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = Path("runs/a/metrics.jsonl")
    deadline = time.monotonic() + LIMIT
    while not (metrics.exists() and metrics.stat().st_size > 0):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signum)
    _, error = process.communicate(timeout=LIMIT)
    assert process.returncode == code, error
    step = int(re.search(r"after step (\d+); continue with: sae-train resume runs/a", error).group(1))
    assert [p.name for p in Path("runs/a/checkpoints").iterdir()] == [f"step_{step:08d}"]
    assert "Traceback" not in error


def test_config_prints_what_a_run_would_use_and_where_it_comes_from(make_cache) -> None:
    make_cache()
    Path("c.yaml").write_text("type: batchtopk\nmodel:\n  k: 4\ntraining:\n  batch_size: 64\n  tokens: 640\n")
    flags = ["--config", "c.yaml", "--lr", "0.002", "--cache", "toy"]
    text = call("config", *flags).stdout
    assert not Path("runs").exists()
    for line in (
        "  k: 4  # c.yaml",
        "  lr: 0.002  # flag",
        "  steps: 10  # derived",
        "  d_sae: 128  # derived",
        "  beta1: 0.9  # default",
    ):
        assert line in text.splitlines(), line
    Path("resolved.yaml").write_text(text)
    call("run", *flags, "--name", "a", "-q")
    call("run", "--config", "resolved.yaml", "--name", "b", "-q")
    saved = [Path(f"runs/{name}/config.yaml").read_text().replace(f"name: {name}", "") for name in "ab"]
    assert saved[0] == saved[1]
    undecided = call("config", "--config", "c.yaml").stdout
    assert "  lr: null  # default" in undecided.splitlines()
    assert "# d_sae: the cache decides" in undecided.splitlines()
    assert "  auxk_coef: 0.03125  # default" in undecided.splitlines()
    assert "unknown setting 'kk'" in refused(app, "config", "--type", "topk", "--set", "kk=3")


def test_resume_auto_starts_continues_and_finds_complete(make_cache) -> None:
    make_cache()
    args = ["run", "--cache", "toy", "--type", "topk", "--name", "a", "-b", "128", "--steps", "20", "-q"]
    call(*args, "--resume", "auto")
    weights = Path("runs/a/sae_weights.safetensors")
    before = (weights.read_bytes(), weights.stat().st_mtime_ns)
    assert "topk" in call(*args, "--resume", "auto").stdout
    assert (weights.read_bytes(), weights.stat().st_mtime_ns) == before
    error = refused(app, *args, "--k", "3", "--resume", "auto")
    assert "runs/a was started with other settings (k=32, now 3): choose another --name" in error
    error = refused(app, *args, "--overwrite", "--resume", "auto")
    assert "--overwrite starts it anew every time: give one of them" in error
    assert "expected auto or never, did you mean 'auto'?" in refused(app, *args, "--resume", "auot")


def test_sweeps_as_people_type_them(make_cache) -> None:
    make_cache(hooks=("layer_2", "layer_4", "layer_10", "pooled"), d_in=8)
    quick = ["--batch-size", "128", "--steps", "6", "--eval-rows", "200", "--d-sae", "16", "-q"]
    Path("grid.yaml").write_text("type: topk\nk: 4\nlr: 0.001\ngrid:\n  k: [1, 2]\n  seed: [0, 1]\n")
    args = ["sweep", "--cache", "toy", "--config", "grid.yaml", "--layer", "4", "--name", "s", *quick]
    plan = call(*args, "--grid", "k=2,3", "--dry-run").stdout
    assert "4 SAEs in 1 group, up to" in plan
    assert not Path("runs").exists()
    output = call(*args, "--grid", "k=2,3").stdout
    assert "toy_layer_4_topk_d16_k3_s1-o0" in output
    call(*args, "--grid", "k=2,3")  # complete
    call("resume", "runs/s")
    assert "holds a sweep with other settings" in refused(app, *args)
    Path("runs/empty").mkdir()
    compared = call("compare", "runs/s", "runs/empty")
    assert compared.stdout.count("topk_d16") == 4
    assert "all runs: evaluated on " in compared.stdout
    assert "skipped: runs/empty holds no finished run" in compared.stderr
    one = ["run", "--cache", "toy", "--type", "topk", "--k", "2", *quick]
    planned = call(*one, "--layers", "2,4", "--name", "layers", "--dry-run").stdout
    assert "2 SAEs in 1 group, up to" in planned
    assert "toy_layer_4_topk_d16_k2_s0" in planned
    settings = call(*one, "--layer", "4", "--name", "alone", "--dry-run").stdout
    assert settings.removesuffix("train\n").endswith("# nothing was written: run without --dry-run to ")
    assert yaml.safe_load(settings)["training"]["steps"] == 6
    assert {p.name for p in Path("runs").iterdir()} == {"s", "empty"}
    output = call(*one, "--layers", "all", "--layer-stride", "2", "--name", "layers").stdout
    assert "toy_layer_2_" in output
    assert "toy_layer_10_" in output
    assert "layer_4" not in output
    call(*one, "--layers", "4", "--init-seed", "3,4", "--name", "seeds")
    names = {p.name for p in Path("runs/seeds").iterdir() if p.is_dir()}
    assert names == {"toy_layer_4_topk_d16_k2_s3-o0", "toy_layer_4_topk_d16_k2_s4-o0"}
    assert call("export", f"runs/seeds/{min(names)}", "--to", "saelens").stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--layers", "3,9"], r"the cache has no hook point 'layer_9'"),
        (["--layers", "3,3"], r"--layer \(or --hook\) names layer_3 twice"),
        (["--layers", "3", "--layer", "3"], r"--layer \(or --hook\) names layer_3 twice"),
        (["--layers", "all,3"], r"--layers all includes every layer"),
        (["--layers", "all", "--layer-stride", "0"], r"layer_stride=0: expected a value >= 1"),
        (["--layers", "3,4", "--grid", "layer=3,4"], r"--layer \(or --hook\) and the grid both choose hook points"),
        (["--grid", "d_sae=64,1B"], r"1 of these 2 SAEs would fit: .* needs .* of memory, cpu has .* to give"),
    ],
)
def test_bad_sweeps_are_one_line(make_cache, args, message) -> None:
    make_cache()
    assert re.search(message, refused(app, "sweep", "--cache", "toy", "--type", "topk", "-b", "128", *args))
    assert not Path("runs").exists()


def test_a_grid_in_a_file_is_no_run(make_cache) -> None:
    make_cache()
    Path("grid.yaml").write_text("type: topk\ngrid:\n  k: [1, 2]\n")
    error = refused(app, "run", "--cache", "toy", "--config", "grid.yaml")
    assert "the file has a grid: train it with sae-train sweep" in error
