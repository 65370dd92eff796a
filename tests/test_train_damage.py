"""Rows damaged on disk, weights that diverged, evaluations that say little: told, and never a wrong number."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_kit import invoke
from sae_kit import new

from sae_granary import sae_core
from sae_granary.cache.load.selection import Part
from sae_granary.cache.opening import open_cache
from sae_granary.cache.read.reader import Cache
from sae_granary.common.finished_run import read_metrics, read_summary
from sae_granary.common.signed import write_signed
from sae_granary.sae_core import registry
from sae_granary.sae_core.errors import NonFiniteError
from sae_granary.sae_core.normalize import FIXED_MODES, Normalizer
from sae_granary.train.cli import app
from sae_granary.train.config.merge import make_config
from sae_granary.train.config.resolve import selection_of
from sae_granary.train.data import passes
from sae_granary.train.data.run_data import RunData
from sae_granary.train.result.notes import remarks

FLAGS = ["--cache", "toy", "--steps", "12", "--batch-size", "256", "--d-sae", "32", "--k", "4", "-q"]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows_of(cache: Cache, part: Part) -> np.ndarray:
    """Ordinals of the rows of a part, with the filters of a run."""
    selection = selection_of(make_config([{"type": "topk", "cache": "toy"}]), part).resolve(cache)
    columns = {name: cache.column(name)[:] for name in selection.columns}
    dropped = np.logical_or.reduce(list(selection.reasons(columns).values()))
    heldout = selection.holdout.mask(cache.column("doc_id")[:])
    return np.flatnonzero(~dropped & (heldout == (part == "heldout")))


def damage(cache: Cache, row: int, value: float) -> None:
    """Change the first value of a row, as a flipped bit of its exponent does."""
    shard = int(np.searchsorted(cache.starts, row, side="right")) - 1
    path = cache.shard_path(None, shard)
    values = np.memmap(path, np.float32, "r+", shape=(cache.shards[shard].n_rows, 16))
    values[row - cache.starts[shard], 0] = value
    values.flush()


def train(*flags: str, code: int = 0) -> str:
    return invoke(app, "run", *FLAGS, *flags, code=code).output


# No number of float32 when squared; one that dominates all losses; one like the others.
ABSURD, LARGE, USUAL = 2.7e38, 1e6, 50.0


@pytest.mark.parametrize(
    ("type", "value"),
    [("batchtopk", float("nan")), ("gated", ABSURD), ("batchtopk", LARGE), ("jumprelu", LARGE), ("vanilla", LARGE)],
)
def test_one_absurd_value_among_the_training_rows_is_left_out_and_told(make_cache, type: str, value: float) -> None:
    cache = open_cache(make_cache())
    arguments = ["run", "--cache", "toy", "--batch-size", "64", "--d-sae", "32", "--epochs", "1", "--type", type, "-q"]
    invoke(app, *arguments, "--name", "sound")
    damage(cache, rows_of(cache, "train")[10], value)
    output = invoke(app, *arguments, "--name", "damaged").output
    sound, damaged = (read_summary(Path("runs") / name) for name in ("sound", "damaged"))
    assert damaged["rejected"] == 1
    note = f"1 of {damaged['steps']} batches were rejected for NaN, Inf or absurd values: run sae-cache verify toy"
    assert f"damaged: {note}" in output
    assert note in damaged["notes"]
    assert damaged["eval"]["fvu"] == pytest.approx(sound["eval"]["fvu"], rel=0.1)


@pytest.mark.parametrize("value", [ABSURD, USUAL])
def test_a_damaged_held_out_row_is_left_out_and_told(make_cache, value: float) -> None:
    cache = open_cache(make_cache())
    train("--type", "topk", "--name", "sound")
    damage(cache, rows_of(cache, "heldout")[3], value)
    assert "damaged: 1 damaged rows were left out of the evaluation" in train("--type", "topk", "--name", "damaged")
    sound, damaged = (read_summary(Path("runs") / name) for name in ("sound", "damaged"))
    assert (sound["eval"]["n_dropped"], damaged["eval"]["n_dropped"]) == (0, 1)
    assert damaged["eval"]["n_rows"] == sound["eval"]["n_rows"] - 1
    assert damaged["eval"]["fvu"] == pytest.approx(sound["eval"]["fvu"], rel=0.1)
    assert "damage" in invoke(app, "compare", "runs/sound", "runs/damaged").output


def test_the_sample_holds_no_row_that_lost_its_norm(make_cache) -> None:
    cache = open_cache(make_cache())
    data = RunData.open(make_config([{"type": "topk", "cache": "toy", "k": 4, "d_sae": 32, "batch_size": 256}]))
    before = passes.sample(data)["layer_3"]
    damage(cache, rows_of(cache, "train")[10], USUAL)
    assert len(passes.sample(data)["layer_3"]) == len(before) - 1


def test_small_rows_keep_their_norms(make_cache) -> None:
    cache = open_cache(make_cache())
    path, shape = cache.shard_path(None, 0), (cache.shards[0].n_rows, 16)
    values = np.memmap(path, np.float32, "r+", shape=shape)
    values[:] = 1e-22  # whose squares are no numbers of float32
    values.flush()
    np.memmap(cache.norms().path(0), np.float32, "r+", shape=shape[:1])[:] = 4e-22
    data = RunData.open(make_config([{"type": "topk", "cache": "toy", "k": 4, "d_sae": 32, "batch_size": 256}]))
    assert len(passes.sample(data)["layer_3"]) == data.counts.train


@pytest.mark.parametrize("mode", [*FIXED_MODES, "unit_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.7e38, 0.0])
def test_no_scale_is_fitted_to_rows_that_have_none(mode: str, value: float) -> None:
    rows = torch.randn(64, 8) if value else torch.zeros(64, 8)
    rows[5, 2] = value
    with pytest.raises(NonFiniteError, match="sae-cache verify"):
        Normalizer(mode, 8).fit(rows)


def test_equal_rows_teach_nothing() -> None:
    sae = new("topk", d_in=4, d_sae=8, k=2)
    with pytest.raises(NonFiniteError, match="the 9 rows of the sample are all equal"):
        sae.initialize(torch.tensor([[0.1, 0.2, 0.3, 0.4]]).expand(9, 4), torch.Generator())


@pytest.mark.parametrize("type", registry.names())
def test_weights_with_nan_are_never_written(tmp_path: Path, type: str) -> None:
    for write, parameter in ((sae_core.save, "b_dec"), (sae_core.save_native, "W_dec")):
        sae = new(type, d_in=4, d_sae=64)
        with torch.no_grad():
            getattr(sae.core, parameter).view(-1)[0] = float("nan")
        with pytest.raises(NonFiniteError, match="NaN or Inf in"):
            write(sae, tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_a_run_whose_weights_diverged_has_no_result(make_cache) -> None:
    make_cache()
    flags = ["--type", "topk", "--name", "a", "--set", "optimizer=sgd", "--lr", "1e38", "--set", "grad_clip=none"]
    error = " ".join(train(*flags, code=2).split())
    assert "runs/a has no result" in error or "batches in a row" in error
    assert not {"summary.json", "sae_weights.safetensors"} & {path.name for path in Path("runs/a").iterdir()}


def test_fvu_of_rows_without_variance_is_null_with_a_note(make_cache) -> None:
    make_cache()
    output = train("--type", "topk", "--name", "one", "--eval-rows", "1", "--set", "grad_acc_steps=256")
    summary = json.loads(Path("runs/one/summary.json").read_text())
    assert summary["eval"]["n_rows"] == 1
    assert summary["eval"]["fvu"] is summary["eval"]["explained_variance"] is None
    note = "FVU is not defined: the 1 evaluated rows do not vary; give a larger --holdout"
    assert note in summary["notes"]
    assert f"one: {note}" in output
    assert "n/a" in output


SUMMARY = {
    "steps": 100, "rejected": 0, "cache": "toy", "l0_train": 32.0, "dead": 0.1,
    "eval": {"n_rows": 5000, "fvu": 0.1, "n_dropped": 0, "l0": 30.0}, "eval_part": "heldout",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, None),
        (
            {"l0_train": 36.0},
            "L0 of the last training batch measured is 36.0, 32 was asked for: train longer, or change the coefficient",
        ),
        (
            {"l0_train": 16.0, "eval": {**SUMMARY["eval"], "l0": 16.0}},
            "L0 of the last training batch measured is 16.0, 32 was asked for: train longer, or raise --d-sae",
        ),
        ({"dead": 0.93}, "93% of the latents are dead: try a smaller --d-sae, a longer run, or --resample-every 10"),
        ({"steps": 20}, "the learning rate was still rising at the end: the warm-up takes 20 steps, the run had 20"),
        ({"eval": {**SUMMARY["eval"], "n_rows": 1999}}, "evaluated on 1,999 rows only"),
        ({"eval": {**SUMMARY["eval"], "l0": 64.9}}, "L0 on heldout rows is 64.9, 32 was asked for"),
    ],
)
def test_remarks_come_with_a_remedy(changed: dict, told: str | None) -> None:
    found = remarks({**SUMMARY, **changed}, wanted_l0=32, warmup_steps=20)
    assert [text.startswith(told) for text in found] == ([True] if told else [])


def test_dead_is_one_number(make_cache) -> None:
    make_cache()
    output = train("--type", "topk", "--name", "a")
    summary = read_summary(Path("runs/a"))
    lines = read_metrics(Path("runs/a"))
    assert summary["dead"] == lines[-1]["dead"]
    assert not {"dead", "below_dead_threshold"} & set(summary["eval"])
    assert {"rare", "never_fired"} <= set(summary["eval"])
    assert {"density/rare", "density/never_fired"} <= set(lines[-1])
    assert f"dead: silent for the last {summary['dead_after_tokens']:,} rows of training" in output


def test_what_older_versions_called_dead_in_an_evaluation_is_rare(tmp_path: Path) -> None:
    write_signed(tmp_path / "summary.json", {"dead": 0.5, "eval": {"dead": 0.25, "l0": 4.0}})
    assert read_summary(tmp_path) == {"dead": 0.5, "eval": {"rare": 0.25, "l0": 4.0}}
