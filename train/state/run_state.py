"""Run: the state of one SAE in training, except the source of its batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from sae_granary import sae_core
from sae_granary.sae_core import SAE
from sae_granary.sae_core.kernels.deferred import Deferred
from sae_granary.sae_core.ranks.reduce import ALONE, Alone
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.optim.ema import Ema
from sae_granary.train.optim.gradients import Gradients, Parameters
from sae_granary.train.optim.optimizers import Hyperparameters, make_optimizer
from sae_granary.train.optim.row_pass import RowPass
from sae_granary.train.optim.schedule import Schedule
from sae_granary.train.state.density import Density
from sae_granary.train.state.patience import Patience
from sae_granary.train.state.rng import Rng


@dataclass(eq=False)
class Run:
    """One SAE in training. Everything here except the config is part of a checkpoint."""

    config: TrainConfig
    sae: SAE
    optimizer: torch.optim.Optimizer
    rng: Rng
    step: int = 0  # batches consumed
    tokens: int = 0  # rows consumed
    rejected: int = 0  # steps without an update because of NaN or Inf
    rejected_in_row: int = 0
    score: float | None = None  # of the newest measurement, lower is better: what `keep_best` compares
    ema: Ema | None = None  # the averaged weights, when asked for
    patience: Patience = field(default_factory=Patience)
    notes: list[str] = field(default_factory=list)  # on its start, for the summary

    def __post_init__(self) -> None:
        self.density = Density.of(self.sae.config.d_sae)  # firing rates since the last histogram
        self.deferred = Deferred()
        self.prepared: Gradients | None = None  # of the next step, where `sweeps.batched` has computed them
        self.row_pass = RowPass(self.sae, self.optimizer)

    @classmethod
    def create(cls, config: TrainConfig, sae: SAE) -> Run:
        """A run at its start, its SAE on the config's device."""
        sae = sae.to(config.device)
        ema = None if config.ema_decay is None else Ema(sae, config.ema_decay)
        optimizer = make_optimizer(sae.parameters(), config.optimizer, Hyperparameters.of(config))
        return cls(config, sae.train(), optimizer, Rng(config.device), ema=ema)

    @cached_property
    def n_steps(self) -> int:
        """Length of the run in optimizer steps."""
        assert self.config.steps is not None
        return self.config.steps

    @cached_property
    def counters(self) -> list[Tensor]:
        """Buffers that a step may change: all but those that `SAE.initialize` fits."""
        sae, core = self.sae, self.sae.core
        fitted = {core.loss_variance, core.loss_mean_square}.union(*(n.buffers() for n in sae.normalizers))
        return [buffer for buffer in sae.buffers() if buffer not in fitted]

    @cached_property
    def by_clip(self) -> tuple[Parameters, Parameters]:
        """The parameters that a global clip counts and scales, and those that the variant excludes."""
        core, given = self.sae.core, list(self.sae.parameters())
        own = {p for name, p in core.named_parameters() if name in core.unclipped}
        return [p for p in given if p not in own], [p for p in given if p in own]

    @cached_property
    def schedule(self) -> Schedule:
        """Factor on the peak learning rate."""
        config = self.config
        return Schedule(
            self.n_steps, config.lr_schedule, config.warmup_steps or 0, config.decay_fraction, config.lr_final
        )

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        assert self.config.lr is not None
        return self.config.lr * self.schedule.factor(self.step)

    @property
    def last_lr(self) -> float:
        """Learning rate of the last step."""
        assert self.config.lr is not None
        return self.config.lr * self.schedule.factor(self.step - 1)

    @property
    def done(self) -> bool:
        """Whether every step was taken, or early stopping ended the run."""
        return self.step >= self.n_steps or self.patience.is_over(self.config.early_stop)

    def is_at(self, every: int) -> bool:
        """Whether the last step is a multiple of n; never for 0."""
        return every > 0 and self.step % every == 0

    @property
    def parameter_names(self) -> dict[nn.Parameter, str]:
        """Parameter -> its name, for the optimizer's state."""
        return {parameter: name for name, parameter in self.sae.named_parameters()}


def build_sae(config: TrainConfig, shards: Alone = ALONE) -> SAE:
    """A new SAE of a resolved config, not initialized; where `shards` divide its latents, with those of this rank."""
    cls = sae_core.registry.get(config.type)
    return sae_core.registry.build(cls, sae_core.make_config(cls, config.options), shards)
