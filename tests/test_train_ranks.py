"""Several ranks take the steps that one process takes with the same batches, and write the same run."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fork_kit import Forks, wait_until
from rank_kit import CASES, COMMON, ended, sharded_steps, start, steps, take_steps, tied_selections
from torch import distributed

from benchmarks.rank_traffic import shard_traffic
from sae_granary import train_sae
from sae_granary.cache.load.loader import Share
from sae_granary.train.ranks import hearts
from sae_granary.train.ranks.place import Place

CLOSE = 1e-5


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_take_the_steps_of_one_process(
    n: int, make_cache: Callable[..., Path], tmp_path: Path, forks: Forks
) -> None:
    cache = make_cache()
    for code, output in ended(start(forks, [(take_steps, str(cache), str(tmp_path))] * n)):
        assert code == 0, output
    for name, given in CASES.items():
        alone = steps(cache, given)
        parts = [torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=False) for rank in range(n)]
        assert all(part["states"] == alone["states"] for part in parts), name  # the same batches
        joined = joined_codes([part["codes"] for part in parts], given.get("grad_acc_steps", 1))
        assert all(torch.equal(a, b) for a, b in zip(alone["codes"], joined, strict=True)), name
        for part in parts:
            for what in ("gradients", "weights"):
                for ours, theirs in zip(alone[what], part[what], strict=True):
                    assert_close(ours, theirs, f"{name}: {what}")
            for ours, theirs in zip(alone["results"], part["results"], strict=True):
                assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6), name
            assert_close(parts[0]["weights"][-1], part["weights"][-1], f"{name}: of the ranks", within=0.0)
    tied = zip(*(torch.load(tmp_path / f"tied_{rank}.pt") for rank in range(n)), strict=True)
    assert all(torch.equal(alone, torch.cat(parts)) for alone, parts in zip(tied_selections(), tied, strict=True))
    of_latents = zip(*(torch.load(tmp_path / f"tied_latents_{rank}.pt") for rank in range(n)), strict=True)
    for alone, parts in zip(tied_selections(), of_latents, strict=True):
        assert sorted(alone.tolist()) == sorted(torch.cat(parts).tolist())
    shards = [torch.load(tmp_path / f"shard_{rank}.pt") for rank in range(n)]
    for case, whole in sharded_steps().items():
        if case == "topk, dead spread":
            wanted = shard_traffic(16, 60, 5, 50, n, auxk=True).sent
            assert all(wanted <= float(shard[case]["sent"]) < wanted + 512 for shard in shards)
        del whole["sent"]
        for name, value in whole.items():
            axis = {"codes": 1, "grad W_enc": 1, "grad b_enc": 0, "grad W_dec": 0}.get(name)
            parts = [shard[case][name] for shard in shards]
            found = parts[-1] if axis is None else torch.cat(parts, dim=axis)
            assert_close({name: value}, {name: found}, f"sharded: {case}")
        assert torch.equal(whole["codes"] != 0, torch.cat([shard[case]["codes"] for shard in shards], dim=1) != 0), case
        assert ("dead" in case) <= (float(whole.get("auxk", torch.zeros(()))) > 0)
    one = train_sae(cache=str(cache), **COMMON, type="batchtopk", k=3, runs_dir=str(tmp_path), name="alone")
    shared = [torch.load(tmp_path / f"sae_{rank}.pt") for rank in range(n)]
    for state in shared:
        assert_close(one.sae.state_dict(), state, "trained", within=1e-3)


def test_a_process_that_was_stopped_itself_takes_no_other_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[float]()

    def late() -> float:
        """Between any two looks at the clock a minute has passed."""
        asked.append(60.0 * len(asked))
        return asked[-1]

    monkeypatch.setattr(hearts, "time", SimpleNamespace(monotonic=late))
    store = distributed.HashStore()
    for rank in (0, 1):
        store.set(f"here/{rank}", '"a host"')
    heart = hearts.Hearts(Place(1, 2, 1, "127.0.0.1", 29500), store)
    wait_until(lambda: heart.unheard(30) or len(asked) > 4)
    assert heart.unheard(30) == ""
    heart.stop()
    assert not any(thread.is_alive() for thread in heart._threads)


def joined_codes(parts: list[list[torch.Tensor]], n_pieces: int) -> list[torch.Tensor]:
    """The active (row, latent) of each micro-batch, from those of the ranks, which count rows from their first on."""
    n, joined = len(parts), []
    for piece, codes in enumerate(zip(*parts, strict=True)):
        row, of_all = 0, []
        for rank, found in enumerate(codes):
            of_all.append(found + torch.tensor([row, 0]))
            row += Share(rank, n, n_pieces).sizes(COMMON["batch_size"])[piece % n_pieces]
        joined.append(torch.cat(of_all))
    return joined


def assert_close(ours: dict[str, Any], theirs: dict[str, Any], what: str, within: float = CLOSE) -> None:
    """Equal up to rounding, relative to the largest entry of each tensor."""
    for key, value in ours.items():
        scale = float(value.abs().max()) if value.numel() and bool(value.isfinite().all()) else 1.0
        close = torch.isclose(theirs[key], value, rtol=within, atol=within * scale, equal_nan=True)
        assert bool(close.all()), f"{what}: {key}"
