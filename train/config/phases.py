"""Which steps of a run go through the language model: none, all (`loss` kl or ce), or the last (`finetune_kl`)."""

from __future__ import annotations

from sae_granary import sae_core
from sae_granary.common.errors import ConfigError
from sae_granary.sae_core.options import LM_LOSSES
from sae_granary.train.config.settings import TrainConfig


def first_context_step(config: TrainConfig) -> int | None:
    """The first step of a resolved config that takes windows instead of shuffled rows; None where none does."""
    if config.options.get("loss") in LM_LOSSES:
        return 0
    if config.finetune_kl is None:
        return None
    assert config.steps is not None
    return config.steps - -(-config.finetune_kl // config.batch_size)


def needs_language_model(config: TrainConfig) -> bool:
    """Whether a run loads the model that its cache was harvested from."""
    return first_context_step(config) is not None or bool(config.eval_downstream)


def check_phases(config: TrainConfig) -> None:
    """Refuse a resolved config whose losses cannot go through a language model. Raises ConfigError."""
    loss, start = config.options.get("loss"), first_context_step(config)
    reads = sae_core.registry.get(config.type).reads
    if loss in LM_LOSSES and config.finetune_kl is not None:
        raise ConfigError(f"finetune_kl={config.finetune_kl} with loss={loss}: the whole run goes through the model")
    if start is not None and start < 0:
        raise ConfigError(
            f"finetune_kl={config.finetune_kl:,} is longer than the run of {config.steps} steps of "
            f"{config.batch_size:,} rows: give fewer tokens, or --loss kl for a whole run"
        )
    if start is not None and config.early_stop is not None:
        raise ConfigError(
            f"early_stop={config.early_stop} ends a run by its FVU, which is not what its steps through the language "
            "model minimize, and may end it before them: leave it out"
        )
    if start is not None and not reads.one_row:
        raise ConfigError(f"type {config.type} reads more than one row at a time: kl and ce need a type that reads one")
    if config.eval_downstream and reads.several:
        raise ConfigError(f"type {config.type} reads several hook points: eval_downstream needs a type that reads one")
