"""Latents divided over ranks: which runs they can be divided in, and the trainer of one rank's part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from sae_granary.common.errors import ConfigError
from sae_granary.common.signals import StopRequest
from sae_granary.sae_core import registry
from sae_granary.sae_core.errors import OptionError
from sae_granary.sae_core.ranks.reduce import ALONE
from sae_granary.sae_core.ranks.sharded import latent_axis
from sae_granary.train.config.phases import first_context_step
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.errors import InterruptedRunError
from sae_granary.train.optim.optimizers import OPTIMIZERS
from sae_granary.train.ranks.trainer import RankTrainer
from sae_granary.train.trainer import Result

T = TypeVar("T")


class ShardTrainer(RankTrainer):
    """A trainer of the latents of one rank, which reads all rows.

    Every rank measures and evaluates, and saves its part of a checkpoint; rank 0 has the sinks and callbacks and writes
    all other files. Its callbacks see the SAE of its latents.
    """

    def _join(self) -> None:
        sae = self.run.sae
        common = [t for name, t in sae.state_dict().items() if latent_axis(name, t.ndim, sae.latents) is None]
        self.world.ranks.broadcast(common)  # fitted by each rank to the same rows: the last bits may differ

    def finish(self, stop: StopRequest) -> Result:
        """Calibrate, evaluate and write with the other ranks. The SAE of the result is that of this rank's latents."""
        result = super().finish(self.agreed)
        if self.world.place.leads:
            self.world.say("result", result.summary)
        summary = self.world.hear("result")
        self.run.sae.shards = ALONE
        return replace(result, summary=summary)

    def _until(self, stop: StopRequest, items: Iterable[T]) -> Iterator[T]:
        for item in items:
            self._agree()
            InterruptedRunError.raise_if(self.agreed, self.step, self.folder)
            yield item


def check_sharded(config: TrainConfig, n: int) -> None:
    """Refuse a resolved run whose latents n ranks cannot divide. Raises ConfigError."""
    cls = registry.get(config.type)
    if not cls.shards_latents:
        able = ", ".join(name for name in registry.names() if registry.get(name).shards_latents)
        raise ConfigError(f"type={config.type!r} has no form with latents divided over ranks; these have: {able}")
    d_sae = int(config.options["d_sae"])
    if d_sae % n:
        near = max(d_sae // n, 1) * n
        raise ConfigError(
            f"d_sae={d_sae:,} does not divide into {n} ranks: choose a multiple of {n}, such as --d-sae {near}, or "
            "start another number of ranks"
        )
    try:
        registry.make_config(cls, {**config.options, "d_sae": d_sae // n})
    except OptionError as error:
        raise ConfigError(f"d_sae={d_sae:,} on {n} ranks leaves {d_sae // n:,} latents each: {error}") from None
    refused = {
        "a loss through the language model": first_context_step(config) is not None,
        f"optimizer={config.optimizer}, whose steps need whole matrices": not OPTIMIZERS[config.optimizer].elementwise,
        f"resample_every={config.resample_every}": config.resample_every > 0,
        f"init_from={config.init_from}": config.init_from is not None,
    }
    if found := [what for what, is_so in refused.items() if is_so]:
        raise ConfigError(
            f"--shard-latents does not support {found[0]}: leave it out, or train without --shard-latents"
        )
