"""Starts the ranks of a training as processes, and the steps that they take in tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fork_kit import Forked, Forks, free_port

from sae_granary import train_sae
from sae_granary.cache.load.loader import WHOLE, LoaderState, Share
from sae_granary.sae_core import Codes, Progress, registry
from sae_granary.sae_core import make_config as make_options
from sae_granary.sae_core.pre_acts import PreActs
from sae_granary.sae_core.ranks.reduce import ALONE, Alone
from sae_granary.sae_core.ranks.select import batch_topk
from sae_granary.train import loop
from sae_granary.train.config.merge import make_config
from sae_granary.train.data import passes
from sae_granary.train.data.run_data import RunData
from sae_granary.train.data.streams import open_stream, step_input
from sae_granary.train.optim.gradients import norm_of_all
from sae_granary.train.ranks.place import place_of_process
from sae_granary.train.ranks.trainer import share_batches
from sae_granary.train.ranks.world import joined
from sae_granary.train.state.run_state import Run, build_sae

STEPS, POISONED = 10, 4  # the number of a batch with NaN
COMMON = {"d_sae": 64, "steps": 40, "batch_size": 102, "device": "cpu", "dead_after_tokens": 200, "lr": 3e-3}
# Each with what its own reductions need: dead latents for AuxK, micro-batches of uneven parts, thresholds.
CASES: dict[str, dict[str, Any]] = {
    "topk": {"type": "topk", "k": 3, "k_aux": 2},
    "batchtopk": {"type": "batchtopk", "k": 3, "grad_acc_steps": 2},
    "matryoshka": {"type": "matryoshka", "k": 3},
    "jumprelu": {"type": "jumprelu", "l0_target": 3},
    "jumprelu_l0_target": {"type": "jumprelu", "l0_target": 3, "recipe": "l0_target"},
    "vanilla": {"type": "vanilla"},
    "gated": {"type": "gated", "grad_acc_steps": 3},
}


Job = tuple[Any, ...]  # a function of a module and its arguments


def start(forks: Forks, jobs: Sequence[Job], **env: str) -> list[Forked]:
    """Start a rank for each job, in the environment that torchrun would give it; they meet at a port of this host."""
    common = {"WORLD_SIZE": str(len(jobs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **env}
    return [forks.start(*job, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank, job in enumerate(jobs)]


def ended(processes: Sequence[Forked]) -> list[tuple[int, str]]:
    """Exit code and output of each rank."""
    codes = [process.code() for process in processes]
    return [(code, process.output) for code, process in zip(codes, processes, strict=True)]


def steps(cache: Path, given: Mapping[str, Any], share: Share = WHOLE, ranks: Alone = ALONE) -> dict[str, Any]:
    """The first steps of a run on a share of its batches: the codes of each step, its gradients, weights and losses."""
    data = replace(RunData.open(make_config([{"cache": str(cache), **COMMON, **given}])), share=share)
    sae = build_sae(data.config)
    sae.initialize(passes.sample(data), torch.Generator().manual_seed(0))
    run = Run.create(data.config, sae)
    share_batches(sae, ranks)
    found: dict[str, Any] = {"codes": [], "gradients": [], "weights": [], "results": [], "states": []}
    activate = type(sae).activate

    def recorded(self: Any, h: Any) -> Any:
        activation = activate(self, h)
        found["codes"].append(positions(activation.codes))
        return activation

    sae.activate = recorded.__get__(sae)  # type: ignore[method-assign]
    with open_stream([data], LoaderState(data.order.seed)) as stream:
        for number, batch in enumerate(next(stream) for _ in range(STEPS)):
            if number == POISONED and share.index == share.n - 1:
                batch.x["layer_3"][-1, 0] = torch.nan  # of the last rank only
            n_before = len(found["codes"])
            result = loop.train_step(run, step_input(data, batch), measure=True)
            found["states"].append((batch.state, run.tokens, run.rejected))
            if not result.accepted:
                del found["codes"][n_before:]
                continue
            grads = {name: p.grad for name, p in sae.named_parameters()}
            found["gradients"].append({name: grad.clone() for name, grad in grads.items() if grad is not None})
            found["weights"].append({name: t.clone() for name, t in sae.state_dict().items()})
            found["results"].append({**result.losses, **result.metrics, **result.details, "norm": result.grad_norm})
    return found


def tied_selections(ranks: Alone = ALONE, shards: Alone = ALONE) -> list[torch.Tensor]:
    """What the batch-top-k of pre-activations most of which are equal has of this rank's rows, or of its latents."""
    generator = torch.Generator().manual_seed(0)
    h, W_enc = (torch.randint(-2, 3, shape, generator=generator).float() for shape in ((41, 4), (4, 24)))
    ((start, stop),) = Share(ranks.index, ranks.n).ranges(len(h)) if ranks.n > 1 else [(0, len(h))]
    first = 24 * shards.index // shards.n
    W_enc = W_enc[:, first : 24 * (shards.index + 1) // shards.n]
    found = []
    for k in (1, 3, 7, 24):  # the last: fewer are positive
        codes = batch_topk(PreActs(h[start:stop], W_enc, torch.zeros(W_enc.shape[1])), k, ranks, shards)
        found.append(torch.stack([codes.pattern.row_of + start, codes.indices + first, codes.values.long()], dim=1))
    return found


def sharded_steps(shards: Alone = ALONE) -> dict[str, dict[str, torch.Tensor]]:
    """A forward and backward pass of SAEs of which this rank has some latents, in several cases."""
    dead = {
        "spread": torch.arange(0, 60, 4),
        "of the first rank": torch.arange(9),
        "all chosen": torch.arange(0, 60, 15),
    }
    given = {"k_aux": 8, "dead_after_tokens": 10}
    cases: dict[str, dict[str, Any]] = {
        **{f"topk, dead {name}": {"type": "topk", "k": 5, "dead": latents} for name, latents in dead.items()},
        "topk, multi": {"type": "topk", "k": 5, "multi_topk": True},
        "batchtopk": {"type": "batchtopk", "k": 5, "dead": dead["spread"]},
    }
    return {name: _sharded_step({**given, **case}, shards) for name, case in cases.items()}


def _sharded_step(given: dict[str, Any], shards: Alone) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dead, cls = given.pop("dead", []), registry.get(given.pop("type"))
    sae = registry.build(cls, make_options(cls, {"d_in": 16, "d_sae": 60, **given}), shards)
    x = torch.randn(50, 16, generator=generator)
    sae.initialize({"x": x}, generator)
    own = slice(60 * shards.index // shards.n, 60 * (shards.index + 1) // shards.n)
    sent = count_sent(shards)
    silent = torch.zeros(60, dtype=torch.int64).index_fill_(0, torch.as_tensor(dead, dtype=torch.int64), 10)
    sae.num_tokens_since_fired.copy_(silent[own])
    out = sae.train()({"x": x})
    losses = sae.losses(out, Progress(0, 1))
    torch.stack(list(losses.values())).sum().backward()
    losses["sent"] = torch.tensor(sum(sent))
    found = {"x_hat": out.x_hat, "codes": out.codes.dense(), **losses, "norm": norm_of_all(sae, sae.parameters(), {})}
    return {key: value.detach() for key, value in found.items()} | {
        f"grad {name}": p.grad for name, p in sae.named_parameters() if p.grad is not None
    }


def count_sent(ranks: Alone) -> list[float]:
    """A list of the bytes that this rank sends in each reduction from now on, if they travel along a ring."""
    sent: list[float] = []
    call = getattr(type(ranks), "_call", None)

    def counted(name: str, *args: Any) -> None:
        values = args[1] if name == "all_gather" else args[0]
        times = ranks.n - 1 if name == "all_gather" else 2 * (ranks.n - 1) / ranks.n
        sent.append(times * values.numel() * values.element_size())
        assert call is not None
        call(ranks, name, *args)

    if ranks.n > 1:
        ranks._call = counted  # type: ignore[attr-defined]
    return sent


def positions(codes: Codes) -> torch.Tensor:
    """(nnz, 2) row and latent of the active entries."""
    return (codes.dense() != 0).nonzero()


def take_steps(cache: str, out: str) -> None:
    place = place_of_process()
    assert place is not None
    with joined(place, "cpu") as world:
        for name, given in CASES.items():
            share = Share(place.index, place.n, given.get("grad_acc_steps", 1))
            torch.save(steps(Path(cache), given, share, world.ranks), Path(out) / f"{name}_{place.index}.pt")
        torch.save(tied_selections(world.ranks), Path(out) / f"tied_{place.index}.pt")
        torch.save(tied_selections(shards=world.ranks), Path(out) / f"tied_latents_{place.index}.pt")
        torch.save(sharded_steps(world.ranks), Path(out) / f"shard_{place.index}.pt")
    result = train_sae(cache=cache, **{**COMMON, "type": "batchtopk", "k": 3, "runs_dir": out, "name": f"by_{place.n}"})
    torch.save(result.sae.state_dict(), Path(out) / f"sae_{place.index}.pt")
