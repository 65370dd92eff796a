"""Latents divided over ranks: what is refused, files that any number of ranks reads, a run on 2, 1 and 4 ranks."""

import json
import os
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_kit import Forks, command
from rank_kit import COMMON, ended, start
from safetensors.torch import load_file
from test_train_ranks import assert_close
from test_train_ranks_stops import job, signaled

from sae_granary import load_sae, resume_training, sae_core, train_sae
from sae_granary.common.errors import ConfigError
from sae_granary.common.finished_run import read_metrics, read_summary
from sae_granary.common.signals import StopRequest
from sae_granary.sae_core import registry
from sae_granary.sae_core.files.sharded import has_latents_of, part_name, read_parts
from sae_granary.sae_core.ranks.reduce import Ranks
from sae_granary.sae_core.ranks.sharded import DRAWN_ROWS, normal_rows
from sae_granary.train.callbacks import StepEvent
from sae_granary.train.config.merge import make_config
from sae_granary.train.errors import InterruptedRunError
from sae_granary.train.ranks.sharded import check_sharded
from sae_granary.train.state.checkpoint import list_checkpoints, read_state
from sae_granary.train.sweeps.grid import Point
from sae_granary.train.sweeps.grid_to_plan import make_plan

VARIANTS = [name for name in registry.names() if registry.get(name).shards_latents]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"type": "gated"}, "type='gated' has no form with latents divided over ranks; these have: batchtopk, topk"),
        ({"type": "matryoshka"}, "type='matryoshka' has no form with latents divided"),  # a batchtopk by inheritance
        ({"d_sae": 64}, "d_sae=64 does not divide into 3 ranks: choose a multiple of 3, such as --d-sae 63, or"),
        ({"d_sae": 96, "k": 33}, "d_sae=96 on 3 ranks leaves 32 latents each: k=33: expected k <= d_sae=32"),
        ({"optimizer": "muon"}, "--shard-latents does not support optimizer=muon, whose steps need whole matrices"),
        ({"resample_every": 5}, "--shard-latents does not support resample_every=5"),
        ({"init_from": "runs/a"}, "--shard-latents does not support init_from=runs/a"),
        ({"loss": "kl"}, "--shard-latents does not support a loss through the language model"),
    ],
)
def test_what_cannot_be_divided(given: Mapping[str, object], text: str) -> None:
    settings = {"cache": "cache/toy", "type": "topk", "d_in": 16, "d_sae": 96, "steps": 10, **given}
    with pytest.raises(ConfigError, match=re.escape(text)):
        check_sharded(make_config([settings]), 3)


def test_a_sweep_divides_its_saes(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    point = Point({"cache": str(make_cache()), "type": "topk", "steps": 2, "batch_size": 8, "shard_latents": True}, {})
    with pytest.raises(ConfigError, match="--shard-latents is for run"):
        make_plan([point], tmp_path / "sweep", "")


@pytest.mark.parametrize("name", VARIANTS)
def test_each_rank_holds_its_share_of_the_latents(name: str) -> None:
    cls = registry.get(name)
    config = sae_core.make_config(cls, {"d_in": 16, "d_sae": 480, "k": 3})
    whole, part = registry.build(cls, config), registry.build(cls, config, Ranks(1, 4))
    assert registry.whole_config(part) == config
    for (key, ours), theirs in zip(whole.state_dict().items(), part.state_dict().values(), strict=True):
        assert theirs.numel() * (4 if 480 in ours.shape else 1) == ours.numel(), key


@pytest.mark.parametrize("n", [2, 3])
def test_weights_start_as_those_of_one_process(n: int) -> None:
    shape = torch.Size((DRAWN_ROWS + 8, 3))
    ours = torch.randn(n * shape[0], 3, generator=torch.Generator().manual_seed(5))
    parts = [normal_rows(shape, torch.Generator().manual_seed(5), Ranks(i, n)) for i in range(n)]
    assert torch.equal(ours, torch.cat(parts))


@pytest.mark.parametrize(("n_written", "n_read"), [(1, 3), (2, 2), (2, 3), (4, 1), (3, 4)])
def test_any_number_of_ranks_reads_the_parts(n_written: int, n_read: int, tmp_path: Path) -> None:
    d_sae = 24
    whole = {"W_enc": torch.randn(4, d_sae), "W_dec/exp_avg": torch.randn(d_sae, 4), "fired": torch.arange(d_sae)}
    axes = {"W_enc": 1, "W_dec/exp_avg": 0, "fired": 0}
    for i in range(n_written):
        cut = {name: t.chunk(n_written, axes[name])[i].contiguous() for name, t in whole.items()}
        cut |= {"b_dec": torch.arange(4.0), "b_enc/step": torch.tensor(7.0)}
        sae_core.files.disk.write_tensors(tmp_path / part_name("sae.safetensors", Ranks(i, n_written)), cut)
    n_needed = 0
    for i in range(n_read):
        found = read_parts(tmp_path, "sae.safetensors", d_sae, ("b_enc",), Ranks(i, n_read))
        assert all(torch.equal(found[name], t.chunk(n_read, axes[name])[i]) for name, t in whole.items())
        assert torch.equal(found["b_dec"], torch.arange(4.0))
        assert found["b_enc/step"] == 7
        n_needed += sum(has_latents_of(path.name, Ranks(i, n_read)) for path in tmp_path.iterdir())
    assert n_needed == {(1, 3): 3, (2, 2): 2, (2, 3): 4, (4, 1): 4, (3, 4): 6}[n_written, n_read]


def test_missing_parts(tmp_path: Path) -> None:
    sae_core.files.disk.write_tensors(tmp_path / "sae-00001-of-00002.safetensors", {"fired": torch.arange(12)})
    with pytest.raises(
        sae_core.SAEError, match=r"does not hold all parts of sae.safetensors: found sae-00001-of-00002"
    ):
        read_parts(tmp_path, "sae.safetensors", 24, (), Ranks(0, 4))


@pytest.mark.slow
def test_a_run_killed_on_2_ranks_continues_on_1_then_on_4(
    make_cache: Callable[..., Path], tmp_path: Path, forks: Forks
) -> None:
    cache = make_cache()
    settings = {"type": "batchtopk", "k": 3, "k_aux": 2, "steps": 120, "ema_decay": 0.9, "log_every": 1}
    settings |= {"save_every": 10}
    alone = train_sae(cache=str(cache), **{**COMMON, **settings}, runs_dir=str(tmp_path), name="alone")
    _, *flags = (*job(cache, tmp_path, **settings), "--shard-latents")
    run = tmp_path / "run"
    codes = [code for code, _ in ended(start(forks, [(signaled, signal.SIGKILL, [0, 1], 35, *flags)] * 2))]
    assert codes == [-signal.SIGKILL] * 2
    newest = list_checkpoints(run)[-1]
    parts = [load_file(newest / "sae" / f"sae-0000{i}-of-00002.safetensors") for i in (1, 2)]
    assert torch.equal(sae_core.load_native(newest / "sae").W_dec, torch.cat([part["W_dec"] for part in parts]))
    moments = load_file(newest / "optimizer-00002-of-00002.safetensors")
    assert parts[0]["W_enc"].shape == moments["W_enc/exp_avg"].shape == (16, 32)
    assert json.loads((newest / "state.json").read_text())["format_version"] == 3  # refused by number where it is new

    stop = StopRequest()

    def stop_at_80(event: StepEvent) -> None:
        stop.signum = signal.SIGTERM if event.step == 80 else None

    with pytest.raises(InterruptedRunError):
        resume_training(run, callbacks=[stop_at_80], stop=stop)
    assert (list_checkpoints(run)[-1] / "sae" / "sae.safetensors").is_file()
    resumed = ended(start(forks, [(command, "sae_granary.train", "resume", str(run))] * 4))
    assert [code for code, _ in resumed] == [0] * 4, resumed
    ours, theirs = ({line["step"]: line for line in read_metrics(tmp_path / name)} for name in ("alone", "run"))
    assert [(n, ours[n]["epoch"], ours[n]["cursor"]) for n in ours] == [
        (n, theirs[n]["epoch"], theirs[n]["cursor"]) for n in sorted(theirs)
    ]
    times = ("seconds", "tokens_per_second")
    for step in range(1, 11):  # of one process, up to rounding
        expected = {name: value for name, value in ours[step].items() if name not in times}
        assert {name: theirs[step][name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    ours, theirs = (read_summary(tmp_path / name) for name in ("alone", "run"))
    assert theirs["eval"]["fvu"] == pytest.approx(ours["eval"]["fvu"], rel=0.005)
    assert theirs["dead"] == pytest.approx(ours["dead"], abs=2 / 64)
    written = load_sae(run)
    assert json.loads((run / "cfg.json").read_text())["d_sae"] == 64
    difference = written.W_dec.detach() - alone.sae.core.W_dec.detach()
    assert float(difference.norm()) / 8 < 0.05


def killed_writing(rank: int, name: str, *flags: str) -> None:
    """Train; a rank dies before it writes a file of the second checkpoint, or before that gets its name."""

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *args: Any, **more: Any) -> Any:
            if os.environ["RANK"] == str(rank) and "-step_00000004" in str(path) and path.name == name:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(path, *args, **more)

        return call

    Path.write_bytes, os.rename = dying(Path.write_bytes), dying(os.rename)  # type: ignore[method-assign]
    command(*flags)


@pytest.mark.slow
def test_a_rank_killed_amid_the_parts_of_a_checkpoint_loses_that_checkpoint_only(
    make_cache: Callable[..., Path], tmp_path: Path, forks: Forks
) -> None:
    cache = make_cache()
    settings = {"type": "batchtopk", "k": 3, "steps": 8, "save_every": 2, "ema_decay": 0.9, "keep": 3}
    temporary = ".tmp-step_00000004"
    deaths = {"part": (1, "optimizer-00002-of-00002.safetensors"), "state": (0, "state.json"), "name": (0, temporary)}
    rank = {name: (*job(cache, tmp_path, **settings, name=name), "--shard-latents") for name in ("whole", *deaths)}
    assert [code for code, _ in ended(start(forks, [rank["whole"]] * 2))] == [0, 0]
    for name, (dead, file) in deaths.items():
        codes = [code for code, _ in ended(start(forks, [(killed_writing, dead, file, *rank[name][1:])] * 2))]
        assert (codes[dead], codes[1 - dead]) == (-signal.SIGKILL, 2)
        assert [read_state(path).integer("step") for path in list_checkpoints(tmp_path / name)] == [2]
        assert [code for code, _ in ended(start(forks, [(*rank[name], "--resume", "auto")] * 2))] == [0, 0]
        weights = [(tmp_path / run / "sae_weights.safetensors").read_bytes() for run in ("whole", name)]
        assert weights[0] == weights[1]
        inner = {path.name for path in (tmp_path / name / "checkpoints").iterdir()}
        assert inner == {"step_00000004", "step_00000006", "step_00000008"}


@pytest.mark.slow
def test_the_command_trains_the_sae_of_one_process(
    make_cache: Callable[..., Path], tmp_path: Path, forks: Forks
) -> None:
    cache = make_cache()
    given = {"type": "topk", "k": 3, "k_aux": 2, "steps": 10, "eval_every": 5, "dead_after_tokens": 200}
    alone = train_sae(cache=str(cache), **{**COMMON, **given}, runs_dir=str(tmp_path), name="alone").sae
    rank = (*job(cache, tmp_path, **given), "--shard-latents")
    for code, output in ended(start(forks, [rank] * 2)):
        assert code == 0, output
    written, ours = load_sae(tmp_path / "run"), load_sae(tmp_path / "alone")
    assert_close(ours.state_dict(), written.state_dict(), "command")
    numbers = [read_summary(tmp_path / run)["eval"] for run in ("alone", "run")]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-5)
    assert alone.config.d_sae == written.config.d_sae
