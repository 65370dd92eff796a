"""TrainConfig: every setting of a run, declared once. Imports nothing heavy.

One flat dataclass: a setting has one name in Python, as a flag, in YAML and in `--set`, and its row of
docs/parameters.md. How layers of settings become one config is in `train.config.merge`, what is derived from the cache
in `train.config.resolve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from sae_granary.common.errors import ConfigError
from sae_granary.common.settings.declare import MAX_INT, check, setting

OPTIMIZERS = ("adam", "adamw", "sgd", "muon", "adafactor", "signum")  # a test compares with those registered

SECTIONS = ("run", "model", "training", "data", "logging")
_run, _model, _training, _data, _logging = (partial(setting, section=section) for section in SECTIONS)
_seed = partial(_run, ge=0, le=MAX_INT)


@dataclass(frozen=True)
class TrainConfig:
    """What `sae-train run` does. `options` holds the variant's own settings, d_in and d_sae included once resolved."""

    cache: str = _run("", help="Folder of the activation cache.", short="-c", common=True)
    type: str = _run("", help="Variant of the SAE: see `sae-train types`.", short="-t", common=True)
    hook: tuple[str, ...] = _run(
        (),
        help="Hook point of the cache. Repeatable.",
        default_words="the only one",
        repeat=True,
        common=True,
    )
    name: str | None = _run(
        None, help="Name of the run's folder.", default_words="from cache, hook, type, d_sae, k and seed", common=True
    )
    runs_dir: str = _run("runs", help="Folder of all runs.")
    seed: int = _seed(0, help="Seed of shuffling and initialization.", common=True)
    shuffle_seed: int | None = _seed(None, help="Seed of the order of rows.", default_words="seed")
    init_seed: int | None = _seed(None, help="Seed of the initial weights.", default_words="seed")
    device: str = _run("auto", help="auto (cuda if there is a GPU, else cpu), cpu, cuda, cuda:N or mps.", common=True)
    compute_dtype: Literal["auto", "float32", "bfloat16"] = _run(
        "auto",
        help="Precision of matrix products; auto is float32. Selections use bfloat16 where that finds the same.",
    )

    expansion_factor: float | None = _model(None, help="d_sae / d_in, if d_sae is not given.", default_words="8", gt=0)
    init_from: str | None = _model(
        None, help="Start from the weights of an SAE: a run, a checkpoint, or a SAELens or sparsify SAE.", common=True
    )

    batch_size: int = _training(
        4096, help="Batch size of an optimizer step.", unit="rows", gt=0, short="-b", common=True
    )
    grad_acc_steps: int = _training(1, help="Micro-batches per step, to save memory.", gt=0)
    tokens: int | None = _training(None, help="Length of the run, such as 500k or 10M.", unit="rows", gt=0, common=True)
    steps: int | None = _training(None, help="Length of the run.", unit="optimizer steps", gt=0, common=True)
    epochs: float | None = _training(
        None,
        help="Length of the run.",
        unit="passes over the cache",
        default_words="1, or up to 16 to reach 1000 steps",
        gt=0,
    )
    shard_latents: bool = _training(
        False, help="Divide the latents over the ranks of torchrun: for dictionaries that one card cannot hold."
    )
    optimizer: str = _training("adam", help="Optimizer; muon uses Adam for vectors.", choices=OPTIMIZERS)
    lr: float | None = _training(
        None,
        help="Peak learning rate.",
        default_words="2e-4 * sqrt(2^14 / d_sae), more for runs under 1000 steps, at most 1e-3",
        gt=0,
        common=True,
    )
    matrix_lr_scale: float = _training(3.0, help="Learning rate of the weight matrices, as a multiple of lr.", gt=0)
    weight_decay: float = _training(0.0, help="Weight decay, decoupled except for adam and sgd.", ge=0)
    beta1: float = _training(0.9, help="First decay rate of Adam; momentum of sgd, muon and signum.", ge=0, lt=1)
    beta2: float = _training(0.999, help="Second decay rate of Adam.", ge=0, lt=1)
    eps: float = _training(1e-8, help="Epsilon of Adam.", ge=0)
    grad_clip: float | None = _training(
        1.0, help="Maximum global gradient norm, of the loss before division by the variance; none: no clipping.", gt=0
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = _training(
        "linear", help="Decay of the learning rate at the end of the run."
    )
    warmup_steps: int | None = _training(
        None, help="Linear warmup of the learning rate.", unit="steps", default_words="5 %, at most 1000", ge=0
    )
    decay_fraction: float = _training(0.2, help="Share of the steps over which the learning rate decays.", ge=0, le=1)
    lr_final: float = _training(0.0, help="Learning rate at the end of the decay, as a share of its peak.", ge=0, le=1)
    ema_decay: float | None = _training(
        None, help="Save an exponential moving average of the weights with this decay per step.", default_words="off",
        gt=0, lt=1,
    )  # fmt: skip
    resample_every: int = _training(
        0, help="Interval between resamplings of dead latents; 0: never.", unit="steps", ge=0
    )
    resample_until: float = _training(0.5, help="Share of the run after which no latent is resampled.", gt=0, le=1)
    resample_rows: int = _training(2**15, help="Rows whose losses a resampling draws from.", unit="rows", gt=0)
    early_stop: int | None = _training(
        None, help="Stop after this many validations in a row without a better FVU.", unit="validations",
        default_words="off", gt=0,
    )  # fmt: skip
    finetune_kl: int | None = _training(
        None, help="Minimize KL (through the language model) and FVU over the last rows of the run: 100k.", unit="rows",
        default_words="off", gt=0,
    )  # fmt: skip
    lm: str | None = _training(
        None, help="Language model for kl and ce: hub id, local folder, or demo.",
        default_words="the one that the cache was harvested from",
    )  # fmt: skip

    allow_incomplete: bool = _data(False, help="Train on the shards that an unfinished harvest has committed.")
    keep_special: bool = _data(False, help="Train on special tokens too.")
    keep_first_position: bool | None = _data(
        None, help="Train on position 0 of each context too.", default_words="yes, unless the model is a decoder"
    )
    min_position: int | None = _data(None, help="First position of a context to train on.", ge=0)
    max_position: int | None = _data(None, help="Last position of a context to train on.", ge=0)
    exclude_tokens: tuple[str, ...] = _data(
        (), help="Token not to train on: its id, or its string in the vocabulary. Repeatable.", repeat=True
    )
    min_norm: float | None = _data(None, help="Minimum norm of a row.", ge=0)
    max_norm: float | None = _data(None, help="Maximum norm of a row.", ge=0)
    holdout: float = _data(0.05, help="Share of documents held out for evaluation.", ge=0, le=0.9)
    holdout_seed: int = _data(0, help="Seed of the choice of held-out documents.", ge=0)
    pool_rows: int | None = _data(
        None, help="Rows shuffled together in memory.", unit="rows", default_words="about 512 MiB", gt=0
    )
    block_rows: int | None = _data(
        None, help="Neighboring rows read together.", unit="rows", default_words="from pool_rows and batch_size", gt=0
    )
    shuffle_shards: int | None = _data(
        None, help="Shards shuffled together, in a random order of shards; a URL is then read while it is fetched.",
        unit="shards", default_words="all", gt=0,
    )  # fmt: skip

    log_every: int = _logging(10, help="Interval between logged metrics.", unit="steps", gt=0)
    save_every: int = _logging(
        1000, help="Interval between checkpoints; 0: only when stopped and at the end.", unit="steps", ge=0
    )
    save_minutes: float = _logging(
        10.0, help="Interval between checkpoints, in addition to save_every; 0: by steps alone.", unit="minutes", ge=0
    )
    keep: int = _logging(2, help="Number of checkpoints to keep, the last ones.", unit="checkpoints", gt=0)
    keep_best: bool = _logging(False, help="Keep the checkpoint with the lowest FVU too.")
    eval_rows: int = _logging(2**17, help="Maximum number of held-out rows in the final evaluation.", unit="rows", gt=0)
    eval_downstream: bool | None = _logging(
        None,
        help="Report CE score and KL of the language model with the SAE in it.",
        default_words="if the model is loaded anyway",
    )
    downstream_rows: int = _logging(
        2**14, help="Maximum number of held-out rows in the evaluation of CE score and KL.", unit="rows", gt=0
    )
    eval_every: int = _logging(0, help="Interval between validations on held-out rows; 0: none.", unit="steps", ge=0)
    val_rows: int = _logging(2**14, help="Maximum number of held-out rows in a validation.", unit="rows", gt=0)
    density_every: int = _logging(
        1000, help="Interval between firing rates and histograms; 0: only at the end.", unit="steps", ge=0
    )
    dead_threshold: float = _logging(
        0.0005, help="Firing rate below which an evaluation counts a latent as rare.", ge=0, le=1
    )
    wandb: Literal["off", "offline", "online"] = _logging("off", help="Log to Weights & Biases.", common=True)
    wandb_project: str = _logging("granary", help="Project of Weights & Biases.")
    wandb_artifacts: bool = _logging(False, help="Upload the finished SAE to Weights & Biases.")
    tensorboard: bool = _logging(False, help="Write TensorBoard files (needs the extra `tensorboard`).")

    options: Mapping[str, Any] = _model({}, help="The variant's own settings.")

    def __post_init__(self) -> None:
        check(self)
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
