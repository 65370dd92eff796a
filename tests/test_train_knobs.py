"""EMA of weights, validation, early stop, resampling, init_from, callbacks: what they do, and that resumes keep it."""

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import write_cache
from sae_kit import new
from safetensors.torch import load_file
from test_train_resume import StopAt, interrupted, log

from sae_granary import open_cache, resume_training, sae_core, train_sae
from sae_granary.cache.errors import IncompleteCacheError
from sae_granary.common.errors import ConfigError
from sae_granary.common.finished_run import CHECKPOINTS
from sae_granary.common.signals import StopRequest
from sae_granary.train.callbacks import Callback
from sae_granary.train.errors import CheckpointError, InterruptedRunError
from sae_granary.train.optim import resample as latents_of
from sae_granary.train.optim.ema import Ema, averaged
from sae_granary.train.state.checkpoint import best_checkpoint, list_checkpoints
from sae_granary.train.state.patience import Patience

SETTINGS = {"type": "batchtopk", "k": 4, "batch_size": 128, "steps": 30, "d_sae": 32, "eval_rows": 500, "log_every": 5}


@pytest.fixture
def start(make_cache, tmp_path):
    path = str(make_cache())
    names = iter("abcdefgh")

    def run(**settings) -> Path:
        return train_sae(
            **{"cache": path, "runs_dir": str(tmp_path / "runs"), "name": next(names), **SETTINGS, **settings}
        )

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae_weights.safetensors")


def checkpoint(folder: Path, file: str = "sae/sae.safetensors") -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(folder)[-1] / file)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name].nan_to_num(-1.0), b[name].nan_to_num(-1.0)) for name in a)


def stopped_and_resumed(start, step: int, **settings) -> Path:
    """The folder of a run that stopped at a step, which need not be one that is logged, and continued."""
    stop = StopRequest()

    def ask(event) -> None:
        stop.signum = signal.SIGTERM if event.step == step else stop.signum

    with pytest.raises(InterruptedRunError) as caught:
        start(**settings, callbacks=[ask], stop=stop)
    assert caught.value.step == step
    return resume_training(caught.value.folder).folder


# -- EMA -----------------------------------------------------------------------------------------------------------


def test_ema_by_hand() -> None:
    sae = new("vanilla", d_in=2, d_sae=2)
    ema = Ema(sae, 0.5)
    for value, expected in ((11.0, 9.0), (11.0, 10.5)):
        # decay: min(0.5, 2/11), then min(0.5, 3/12): b_enc goes 0 -> 11 * 9/11 = 9 -> 9/4 + 11 * 3/4 = 10.5
        sae.b_enc.data.fill_(value)
        ema.update(sae)
        assert torch.allclose(ema.tensors["b_enc"], torch.full((2,), expected))
    before = {name: p.clone() for name, p in sae.named_parameters()}
    with averaged(sae, ema):
        assert torch.allclose(sae.b_enc, torch.tensor(10.5))
    assert equal(before, dict(sae.named_parameters()))


def test_averaged_weights_are_the_result_and_the_training_is_as_without(start) -> None:
    plain, ema = start(), start(ema_decay=0.9)
    assert equal(checkpoint(plain.folder), checkpoint(ema.folder))
    assert not equal(weights(plain.folder), weights(ema.folder))
    mean = checkpoint(ema.folder, "ema.safetensors")["W_dec"]
    unit = mean / mean.norm(dim=1, keepdim=True)
    assert torch.allclose(weights(ema.folder)["W_dec"], unit, atol=1e-5)
    assert torch.allclose(ema.sae.W_dec.norm(dim=1), torch.ones(32), atol=1e-5)
    assert plain.summary["eval"]["fvu"] != ema.summary["eval"]["fvu"]
    assert abs(ema.summary["eval"]["l0"] - 4) < 0.8  # the threshold was calibrated on the averaged weights


@pytest.mark.parametrize(
    "settings",
    [
        {"ema_decay": 0.9, "eval_every": 4},
        {
            "resample_every": 10,
            "resample_until": 1.0,
            "dead_after_tokens": 130,
            "d_sae": 512,
            "density_every": 8,
            "resample_rows": 1000,
        },
        {"early_stop": 2, "eval_every": 2, "lr": 3e-8, "warmup_steps": 0},
    ],
    ids=["ema", "resample", "early_stop"],
)
def test_resumes_are_bitwise(start, settings) -> None:
    whole = start(**settings).folder
    again = stopped_and_resumed(start, 13 if "early_stop" not in settings else 3, **settings)
    assert log(whole) == log(again)
    assert equal(weights(whole), weights(again))
    newest = [list_checkpoints(folder)[-1] for folder in (whole, again)]
    for file in ("sae/sae.safetensors", "optimizer.safetensors", "density.safetensors"):
        assert (newest[0] / file).read_bytes() == (newest[1] / file).read_bytes(), file
    if "resample_every" in settings:
        assert any(line.get("resampled", 0) > 0 for line in log(whole) if line["step"] > 13)


# -- validation ----------------------------------------------------------------------------------------------------


def test_validation_is_logged_and_disturbs_nothing(start) -> None:
    plain, validated = start().folder, start(eval_every=7, val_rows=200).folder
    assert equal(checkpoint(plain), checkpoint(validated))
    assert equal(weights(plain), weights(validated))
    found = [line for line in log(validated) if "val/fvu" in line]
    assert [line["step"] for line in found] == [7, 14, 21, 28]
    assert all({"val/l0", "val/explained_variance", "loss"} <= set(line) for line in found)
    assert found[-1]["val/fvu"] < found[0]["val/fvu"]


def test_validation_is_the_final_evaluation_for_a_type_that_is_not_calibrated(start) -> None:
    run = start(type="topk", eval_every=30, val_rows=500)
    assert log(run.folder)[-1]["val/fvu"] == pytest.approx(run.summary["eval"]["fvu"], rel=1e-5)


def test_patience_by_hand() -> None:
    patience = Patience()
    over = []
    for score in (0.5, 0.4, 0.4, 0.41, 0.39):
        patience.saw(score)
        over.append(patience.is_over(2))
    assert over == [False, False, False, True, False]
    assert (patience.best, patience.since, patience.is_over(None)) == (0.39, 0, False)


def test_a_validation_that_is_no_number_is_improved_on() -> None:
    patience = Patience()
    for score in (math.nan, math.inf, 0.5, math.nan):
        patience.saw(score)
    assert (patience.best, patience.since) == (0.5, 1)
    read_back = Patience(best=math.nan, since=3)  # as an older checkpoint may hold it
    read_back.saw(0.7)
    assert (read_back.best, read_back.since) == (0.7, 0)


def test_a_checkpoint_without_a_finite_score_is_not_the_best(tmp_path) -> None:
    for step, score in enumerate((math.nan, 0.5, math.inf, 0.4, math.nan), 1):
        path = tmp_path / CHECKPOINTS / f"step_{step:08d}"
        path.mkdir(parents=True)
        (path / "state.json").write_text(json.dumps({"score": score}))
    assert best_checkpoint(tmp_path).name == "step_00000004"


def test_early_stop_ends_a_run_that_no_longer_gains(start) -> None:
    # A rate of nothing: validations differ by the rounding of unit decoder rows alone.
    run = start(type="topk", early_stop=2, eval_every=3, steps=300, lr=1e-30, warmup_steps=0)
    patience = Patience()
    for line in (found := [line for line in log(run.folder) if "val/fvu" in line]):
        assert not patience.is_over(2)
        patience.saw(line["val/fvu"])
    assert patience.is_over(2)
    assert run.summary["steps"] == found[-1]["step"] < 100
    assert (run.folder / "summary.json").is_file()
    with pytest.raises(ConfigError, match="early_stop=2 needs validations: set eval_every"):
        start(early_stop=2)


# -- resampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", sae_core.registry.names())
def test_resampled_latents_point_at_their_rows(type) -> None:
    sae = new(type, {"n_hooks": 2, "k": 3, "l0_target": 3}, d_in=6, d_sae=16)
    generator = torch.Generator().manual_seed(0)

    def batch(n):
        x = {name: torch.randn(n, 6, generator=generator) for name in ("a", "b")}
        return {"a": x["a"]} if sae.reads.one_row else x

    sae.initialize(batch(200), generator)
    core = sae.core
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    latents, x = torch.tensor([3, 7]), batch(2)
    assert latents_of.row_losses(sae, x).shape == (2,)
    latents_of.resample(sae, latents, x)
    source = sae.prepare(x)
    target = source.target - core.b_dec
    assert torch.allclose(core.W_dec[latents], target / target.norm(dim=1, keepdim=True), atol=1e-6)
    if core.has_encoder:
        h = sae.center(source.input).values
        scores = h @ core.W_enc[:, latents]
        assert torch.allclose(scores.diagonal(), 0.2 * h.norm(dim=1) * core.W_enc[:, 0].norm(), rtol=1e-4)
    others = [i for i in range(16) if i not in (3, 7)]
    axes = latents_of.latent_axes(sae)
    for name, p in sae.named_parameters():
        kept = torch.tensor(others) if name in axes else None
        pick = (lambda t, n=name, k=kept: t.index_select(axes[n], k)) if kept is not None else (lambda t: t)
        assert torch.equal(pick(p.detach()), pick(before[name])), name


def test_dead_latents_come_back_with_fresh_moments(start) -> None:
    settings = {
        "type": "topk",
        "k": 1,
        "d_sae": 256,
        "dead_after_tokens": 130,
        "auxk_coef": 0.0,
        "steps": 20,
        "resample_rows": 500,
    }
    dead = log(start(**settings).folder)[-1]["n_dead"]
    run = start(**settings, resample_every=10, resample_until=1.0)
    resampled = [line["resampled"] for line in log(run.folder) if "resampled" in line]
    assert dead > 0
    assert resampled[0] > 0
    state = checkpoint(run.folder, "optimizer.safetensors")
    assert int((state["W_dec/exp_avg_sq"].abs().sum(1) == 0).sum()) >= resampled[-1] > 0  # the last step's own
    assert log(start(**settings, resample_every=10).folder)[-1].get("resampled") is None  # only in the first half


# -- init_from -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", sae_core.registry.names())
def test_a_run_starts_from_the_function_of_another(make_cache, tmp_path, type) -> None:
    cls = sae_core.registry.get(type)
    path = str(make_cache(hooks=("layer_1", "layer_2"), n_docs=30))
    common = {"cache": path, "runs_dir": str(tmp_path), "type": type, "batch_size": 64, "d_sae": 32, "eval_rows": 200}
    common |= {} if cls.reads.several else {"hook": "layer_1"}
    common |= {"k": 4} if "k" in cls.Config.__dataclass_fields__ else {}
    first = train_sae(**common, steps=12, lr=0.01, name="first")
    # Another seed fits the normalization to other rows; a rate of next to nothing leaves the function as it was.
    again = train_sae(**common, steps=1, lr=1e-30, warmup_steps=0, name="again", init_from=str(first.folder), seed=7)
    fvu = [run.summary["eval"]["fvu"] for run in (first, again)]
    assert fvu[1] == pytest.approx(fvu[0], rel=0.05)
    for name, tensor in weights(first.folder).items():
        if name != "threshold":
            assert torch.allclose(weights(again.folder)[name], tensor, atol=2e-4), name


def test_init_from_reads_checkpoints_and_other_formats(start, tmp_path) -> None:
    first = start(type="topk")
    still = {"type": "topk", "steps": 1, "lr": 1e-30, "warmup_steps": 0}
    sae_core.save_sparsify(first.sae, tmp_path / "sparsify")
    shutil.copytree(first.folder, tmp_path / "saelens")
    (tmp_path / "saelens" / "granary.json").unlink()
    shutil.rmtree(tmp_path / "saelens" / "checkpoints")
    for source in (list_checkpoints(first.folder)[-1], tmp_path / "sparsify", tmp_path / "saelens"):
        found = weights(start(**still, init_from=str(source)).folder)
        for name, tensor in weights(first.folder).items():
            assert torch.allclose(found[name], tensor, atol=1e-4), (source, name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "vanilla"}, r"holds a topk: expected a vanilla"),
        ({"type": "topk", "d_sae": 64}, r"d_sae=32, this run has d_sae=64"),
        ({"type": "topk", "normalize": "unit_norm"}, r"normalize=one that is not unit_norm, this run has"),
        ({"type": "topk", "init_from": "nowhere"}, r"init_from=nowhere: nowhere holds no SAE: expected"),
    ],
)
def test_init_from_what_does_not_fit(start, tmp_path, settings, message) -> None:
    given = {**SETTINGS, "init_from": str(start(type="topk").folder), **settings}
    if given["type"] == "vanilla":
        del given["k"]
    with pytest.raises(ConfigError, match=message):
        train_sae(**given, cache=str(tmp_path / "toy"), runs_dir=str(tmp_path / "runs"), name="never")
    assert not (tmp_path / "runs" / "never").exists()


# -- callbacks -----------------------------------------------------------------------------------------------------


class Own(Callback):
    """Counts rows, keeps the count over a resume, and adds a file to each checkpoint."""

    def __init__(self) -> None:
        self.seen, self.saved, self.ended = 0, [], None

    def on_step(self, event):
        self.seen += sum(len(rows) for rows in event.rows.values())
        return {"mine/seen": self.seen} if event.step % 4 == 0 else None

    def wants_checkpoint(self, event) -> bool:
        return event.step == 6

    def on_checkpoint(self, folder, step) -> None:
        self.saved.append(step)
        (folder / "mine.txt").write_text(str(self.seen))

    def on_end(self, summary) -> None:
        self.ended = summary["steps"]

    def state(self):
        return {"seen": self.seen}

    def restore(self, state) -> None:
        self.seen = state["seen"]


def test_callbacks_see_log_save_and_resume(start) -> None:
    own, steps = Own(), []
    run = start(callbacks=[own, lambda event: steps.append((event.step, event.result.loss == event.result.loss))])
    assert [step for step, _ in steps] == list(range(1, 31))
    assert [step for step, measured in steps if measured] == [1, 5, 10, 15, 20, 25, 30]
    assert (own.saved, own.ended, own.seen) == ([6, 30], 30, 30 * 128)
    mine = {line["step"]: line["mine/seen"] for line in log(run.folder) if "mine/seen" in line}
    assert mine == {step: step * 128 for step in range(4, 31, 4)}
    assert (run.folder / "checkpoints" / "step_00000030" / "mine.txt").read_text() == str(30 * 128)

    stopper = StopAt(15)
    with pytest.raises(InterruptedRunError) as caught:
        start(callbacks=[Own(), Callback()], sinks=[stopper], stop=stopper.stop)
    with pytest.raises(CheckpointError, match=r"written with 2 callbacks, now there are 1: give resume_training"):
        resume_training(caught.value.folder, callbacks=[Own()])
    again = resume_training(caught.value.folder, callbacks=[Own(), Callback()])
    assert log(again.folder) == log(run.folder)
    assert json.loads((again.folder / "summary.json").read_text())["steps"] == 30


# -- a cache that still grows -----------------------------------------------------------------------------------------


def test_a_run_on_a_growing_cache_keeps_its_shards(tmp_path) -> None:
    settings = {**SETTINGS, "cache": str(tmp_path / "growing"), "runs_dir": str(tmp_path / "runs"), "save_every": 4}

    def train_meanwhile(doc: int) -> None:
        if doc != 80:
            return
        with pytest.raises(
            IncompleteCacheError, match=r"is incomplete: .* or read what is there: --allow-incomplete, in Python allow_"
        ):
            train_sae(**settings, name="refused")
        train_sae(**settings, name="whole", allow_incomplete=True)
        interrupted(15, **settings, name="stopped", allow_incomplete=True)

    write_cache(tmp_path / "growing", rows_per_shard=500, on_document=train_meanwhile)
    whole, stopped = (tmp_path / "runs" / name for name in ("whole", "stopped"))
    resume_training(stopped)
    assert log(whole) == log(stopped)
    assert equal(weights(whole), weights(stopped))
    rows = json.loads((stopped / "summary.json").read_text())["rows"]["total"]
    assert 1000 <= rows < open_cache(tmp_path / "growing").n_rows
