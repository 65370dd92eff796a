"""TrainConfig: every setting of a run, with its section, unit and range.

One flat dataclass: a setting has one name in Python, as a flag, in YAML and in `--set`. How layers of settings become
one config is in `train.config.merge`, what is derived from the cache in `train.config.resolve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sae_granary import sae_core
from sae_granary.common.errors import ConfigError
from sae_granary.sae_core.options import check, option
from sae_granary.train.optim.optimizers import OPTIMIZERS, Hyperparameters

MAX_SEED = 2**63 - 1
SECTIONS = ("run", "model", "training", "data", "logging")


def setting(default: Any, section: str, help: str, **bounds: Any) -> Any:
    """A field with its default, its section in the YAML file, a help line with the unit, and its range (ge, lt ...)."""
    metadata = {**option(help=help, **bounds).metadata, "section": section}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """What `sae-train run` does. `options` holds the variant's own settings, d_in and d_sae included once resolved."""

    cache: str = setting("", "run", "folder of the activation cache")
    type: str = setting("", "run", "variant, see `sae-train types`")
    hook: tuple[str, ...] = setting((), "run", "hook points of the cache; may stay open if there is one")
    name: str | None = setting(None, "run", "name of the run's folder (default: cache_hook_type_d_k_seed)")
    runs_dir: str = setting("runs", "run", "folder that runs are written to")
    seed: int = setting(0, "run", "seed of both shuffling and initialization", ge=0, le=MAX_SEED)
    shuffle_seed: int | None = setting(None, "run", "seed of the order of rows (default: seed)", ge=0, le=MAX_SEED)
    init_seed: int | None = setting(None, "run", "seed of the weights (default: seed)", ge=0, le=MAX_SEED)
    device: str = setting("auto", "run", "cpu, cuda, cuda:N, mps (auto: cuda if there is one, else cpu)")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "run", "matrix products (auto: float32)")

    expansion_factor: float | None = setting(None, "model", "d_sae / d_in when d_sae is not given (default: 8)", gt=0)

    init_from: str | None = setting(
        None, "model", "weights to start from: folder of a run, a checkpoint, or a SAELens or sparsify SAE"
    )

    batch_size: int = setting(4096, "training", "rows per optimizer step", gt=0)
    grad_acc_steps: int = setting(1, "training", "micro-batches that a batch is split into, to save memory", gt=0)
    tokens: int | None = setting(None, "training", "length of the run in rows", gt=0)
    steps: int | None = setting(None, "training", "length of the run in optimizer steps", gt=0)
    epochs: float | None = setting(
        None, "training", "length in passes (default: 1, more up to 16 if that is under 1000 steps)", gt=0
    )
    optimizer: str = setting("adam", "training", "optimizer; muon steps vectors with Adam", choices=tuple(OPTIMIZERS))
    lr: float | None = setting(
        None, "training", "peak rate (default: 2e-4 * sqrt(2^14 / d_sae), more under 1000 steps, <= 1e-3)", gt=0
    )
    matrix_lr_scale: float = setting(
        3.0, "training", "rate of the matrices over lr: rows of unit norm turn slower than small ones", gt=0
    )
    weight_decay: float = setting(0.0, "training", "weight decay; decoupled but for adam and sgd", ge=0)
    beta1: float = setting(0.9, "training", "Adam's first decay; momentum of sgd, muon and signum", ge=0, lt=1)
    beta2: float = setting(0.999, "training", "Adam's second decay", ge=0, lt=1)
    eps: float = setting(1e-8, "training", "Adam's epsilon", ge=0)
    grad_clip: float | None = setting(
        1.0, "training", "largest global gradient norm, of the loss before it is divided by V (none: no clipping)", gt=0
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = setting("linear", "training", "decay at the end")
    warmup_steps: int | None = setting(None, "training", "steps of linear warm-up (default: 5 %, at most 1000)", ge=0)
    decay_fraction: float = setting(0.2, "training", "share of the steps over which the rate decays", ge=0, le=1)
    lr_final: float = setting(0.0, "training", "the decay ends at this factor of the peak rate", ge=0, le=1)
    ema_decay: float | None = setting(
        None,
        "training",
        "decay per step of averaged weights, which become the result (default: the last weights)",
        gt=0,
        lt=1,
    )
    resample_every: int = setting(0, "training", "steps between resamplings of dead latents (0: never)", ge=0)
    resample_until: float = setting(0.5, "training", "share of the run after which none is resampled", gt=0, le=1)
    resample_rows: int = setting(2**15, "training", "rows whose losses a resampling draws from", gt=0)
    early_stop: int | None = setting(
        None, "training", "end after this many validations in a row without a better FVU", gt=0
    )

    finetune_kl: int | None = setting(
        None, "training", "rows at the end that minimize KL through the language model and fvu alike", gt=0
    )
    lm: str | None = setting(
        None, "training", "hub id or folder of the language model, or demo (default: where the harvest found it)"
    )

    allow_incomplete: bool = setting(
        False, "data", "train on what a harvest has committed so far; it may go on, the run keeps its shards"
    )
    keep_special: bool = setting(False, "data", "train on special tokens")
    keep_first_position: bool | None = setting(
        None, "data", "train on position 0 of each window (default: unless the model is a decoder)"
    )
    min_position: int | None = setting(None, "data", "smallest position in the window", ge=0)
    max_position: int | None = setting(None, "data", "largest position in the window", ge=0)
    exclude_tokens: tuple[str, ...] = setting((), "data", "tokens not to train on: ids, or strings of the vocabulary")
    min_norm: float | None = setting(None, "data", "smallest row norm", ge=0)
    max_norm: float | None = setting(None, "data", "largest row norm", ge=0)
    holdout: float = setting(0.05, "data", "share of the documents that is held out for evaluation", ge=0, le=0.9)
    holdout_seed: int = setting(0, "data", "seed of the choice of held-out documents", ge=0)
    pool_rows: int | None = setting(None, "data", "rows shuffled together in memory (default: about 512 MiB)", gt=0)
    block_rows: int | None = setting(
        None, "data", "neighboring rows read together (default: from pool and batch)", gt=0
    )

    log_every: int = setting(10, "logging", "steps between two lines of metrics", gt=0)
    save_every: int = setting(1000, "logging", "steps between checkpoints (0: only when stopped and at the end)", ge=0)
    save_minutes: float = setting(10.0, "logging", "minutes between checkpoints (0: by steps alone)", ge=0)
    keep: int = setting(2, "logging", "newest checkpoints to keep", gt=0)
    keep_best: bool = setting(False, "logging", "keep the checkpoint of the lowest FVU too")
    eval_rows: int = setting(2**17, "logging", "most held-out rows in the final evaluation", gt=0)
    eval_downstream: bool | None = setting(
        None, "logging", "report CE score and KL of the language model with the SAE in it (default: if it is loaded)"
    )
    downstream_rows: int = setting(2**14, "logging", "most held-out rows in that evaluation", gt=0)
    eval_every: int = setting(0, "logging", "steps between validations on held-out rows (0: none)", ge=0)
    val_rows: int = setting(2**14, "logging", "most held-out rows in a validation", gt=0)
    density_every: int = setting(1000, "logging", "steps between firing rates and histograms (0: at the end)", ge=0)
    dead_threshold: float = setting(
        0.0005, "logging", "firing rate under which a latent counts as rare in an evaluation", ge=0, le=1
    )
    wandb: Literal["off", "offline", "online"] = setting("off", "logging", "Weights & Biases")
    wandb_project: str = setting("granary", "logging", "project of Weights & Biases")
    wandb_artifacts: bool = setting(False, "logging", "upload the finished SAE to Weights & Biases")
    tensorboard: bool = setting(False, "logging", "write TensorBoard files (needs the extra `tensorboard`)")

    options: Mapping[str, Any] = setting({}, "model", "the variant's own settings")

    def __post_init__(self) -> None:
        try:
            check(self)
        except sae_core.SAEError as error:
            raise ConfigError(str(error)) from None
        if self.batch_size % self.grad_acc_steps:
            raise ConfigError(
                f"batch_size={self.batch_size} does not split into grad_acc_steps={self.grad_acc_steps} equal parts"
            )
        lengths = {n: getattr(self, n) for n in ("tokens", "steps", "epochs") if getattr(self, n) is not None}
        if len(lengths) > 1:
            given = ", ".join(f"{name}={value}" for name, value in lengths.items())
            raise ConfigError(f"a run has one length, got {given}; give one of tokens, steps, epochs")
        if self.early_stop is not None and not self.eval_every:
            raise ConfigError(f"early_stop={self.early_stop} needs validations: set eval_every, the steps between them")
        if self.wandb_artifacts and self.wandb == "off":
            raise ConfigError(
                "wandb_artifacts=True uploads to Weights & Biases, but wandb=off: give --wandb online or offline, "
                "or leave it out"
            )

    @property
    def hyperparameters(self) -> Hyperparameters:
        """Of the optimizer of a resolved config."""
        assert self.lr is not None
        return Hyperparameters(self.lr, self.matrix_lr_scale, self.weight_decay, self.beta1, self.beta2, self.eps)
