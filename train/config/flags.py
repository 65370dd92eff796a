"""The flags that set what a run does, shared by `sae-train run`, `config` and others. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cache.shared_flags import takes_flags_of

WHAT, MODEL, TRAINING, DATA, LOGGING = "What", "SAE", "Training", "Data", "Logging"


def _option(panel: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


# Values are text here: `train.config.coerce` gives them their types, with suffixes (10k, 5M) and one way to complain.
Text = str | None
Flag = bool | None


@dataclass(frozen=True)
class Given:
    """What was typed: a YAML file, and on top of it flags and `--set`."""

    file: Path | None
    flags: Mapping[str, Any]

    def layers(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Layers of settings with where they come from, the strongest last."""
        from train.config.merge import read_yaml

        below = [(str(self.file), read_yaml(self.file))] if self.file else []
        return [*below, ("flag", self.flags)]


def given_settings(
    cache: Annotated[Text, _option(WHAT, "Folder of the activation cache.", "--cache", "-c")] = None,
    type: Annotated[Text, _option(WHAT, "Variant: see `sae-train types`.", "--type", "-t")] = None,
    hook: Annotated[
        list[str] | None, _option(WHAT, "Hook point of the cache. (default: the only one)", "--hook")
    ] = None,
    layer: Annotated[list[str] | None, _option(WHAT, "The same by number: 6 is layer_6.", "--layer", "-l")] = None,
    name: Annotated[
        Text, _option(WHAT, "Name of the run's folder. (default: from cache, hook, type, size, seed)", "--name")
    ] = None,
    runs_dir: Annotated[Text, _option(WHAT, "Folder of all runs. (default: runs)", "--runs-dir")] = None,
    config: Annotated[Path | None, _option(WHAT, "Settings in YAML; flags go on top.", "--config")] = None,
    assignments: Annotated[
        list[str] | None, _option(WHAT, "Any setting of the type or the trainer: key=value. Repeatable.", "--set")
    ] = None,
    device: Annotated[Text, _option(WHAT, "auto, cpu, cuda, cuda:1. (default: auto)", "--device")] = None,
    seed: Annotated[Text, _option(WHAT, "Seed of shuffling and initialisation. (default: 0)", "--seed")] = None,
    shuffle_seed: Annotated[Text, _option(WHAT, "Seed of the order of rows alone.", "--shuffle-seed")] = None,
    init_seed: Annotated[Text, _option(WHAT, "Seed of the weights alone.", "--init-seed")] = None,
    k: Annotated[Text, _option(MODEL, "Active latents per row, for types that have it.", "--k", "-k")] = None,
    d_sae: Annotated[Text, _option(MODEL, "Number of latents.", "--d-sae")] = None,
    expansion_factor: Annotated[
        Text, _option(MODEL, "The same as d_sae / d_in. (default: 8)", "--expansion-factor")
    ] = None,
    normalize: Annotated[
        Text, _option(MODEL, "dataset, mean, mean+dataset, unit_norm, none. (default: dataset)", "--normalize")
    ] = None,
    loss: Annotated[
        Text, _option(MODEL, "fvu, mse, nmse; kl, ce: through the language model. (default: fvu)", "--loss")
    ] = None,
    init_from: Annotated[
        Text,
        _option(MODEL, "Start from the weights of an SAE: a run, a checkpoint, SAELens, sparsify.", "--init-from"),
    ] = None,
    batch_size: Annotated[Text, _option(TRAINING, "Rows per step. (default: 4096)", "--batch-size", "-b")] = None,
    grad_acc_steps: Annotated[
        Text, _option(TRAINING, "Micro-batches that a batch is split into. (default: 1)", "--grad-acc-steps")
    ] = None,
    tokens: Annotated[Text, _option(TRAINING, "Length in rows: 500k, 10M.", "--tokens")] = None,
    steps: Annotated[Text, _option(TRAINING, "Length in steps.", "--steps")] = None,
    epochs: Annotated[
        Text, _option(TRAINING, "Length in passes. (default: 1; more up to 16 if under 1000 steps)", "--epochs")
    ] = None,
    lr: Annotated[Text, _option(TRAINING, "Peak rate. (default: from d_sae and steps, at most 1e-3)", "--lr")] = None,
    optimizer: Annotated[
        Text, _option(TRAINING, "adam, adamw, sgd, muon, signum, adafactor. (default: adam)", "--optimizer")
    ] = None,
    weight_decay: Annotated[Text, _option(TRAINING, "Weight decay. (default: 0)", "--weight-decay")] = None,
    lr_schedule: Annotated[
        Text, _option(TRAINING, "Decay at the end: linear, cosine, constant. (default: linear)", "--lr-schedule")
    ] = None,
    warmup_steps: Annotated[
        Text, _option(TRAINING, "Linear warm-up. (default: 5 %, at most 1000)", "--warmup-steps")
    ] = None,
    finetune_kl: Annotated[
        Text, _option(TRAINING, "Last rows of the run, which minimise KL (and fvu): 100k.", "--finetune-kl")
    ] = None,
    lm: Annotated[
        Text, _option(TRAINING, "Language model for kl and ce. (default: where the harvest found it)", "--lm")
    ] = None,
    ema_decay: Annotated[Text, _option(TRAINING, "Average the weights: 0.999. (default: off)", "--ema-decay")] = None,
    resample_every: Annotated[
        Text, _option(TRAINING, "Steps between resamplings of dead latents. (default: 0, never)", "--resample-every")
    ] = None,
    early_stop: Annotated[
        Text, _option(TRAINING, "End after this many validations without a better FVU. (default: off)", "--early-stop")
    ] = None,
    compute_dtype: Annotated[
        Text, _option(TRAINING, "float32, bfloat16. (default: float32)", "--compute-dtype")
    ] = None,
    allow_incomplete: Annotated[
        Flag,
        _option(
            DATA, "Train on what a harvest that goes on has written so far.", "--allow-incomplete/--no-allow-incomplete"
        ),
    ] = None,
    keep_special: Annotated[
        Flag, _option(DATA, "Train on special tokens too.", "--keep-special/--no-keep-special")
    ] = None,
    keep_first_position: Annotated[
        Flag,
        _option(
            DATA,
            "Train on position 0 of each window. (default: unless the model is a decoder)",
            "--keep-first-position/--no-keep-first-position",
        ),
    ] = None,
    holdout: Annotated[Text, _option(DATA, "Share of documents held out. (default: 0.05)", "--holdout")] = None,
    eval_rows: Annotated[
        Text, _option(DATA, "Most held-out rows in the final evaluation. (default: 131072)", "--eval-rows")
    ] = None,
    eval_downstream: Annotated[
        Flag,
        _option(
            DATA,
            "CE score and KL of the language model with the SAE in it. (default: if it is loaded)",
            "--eval-downstream/--no-eval-downstream",
        ),
    ] = None,
    eval_every: Annotated[
        Text, _option(LOGGING, "Steps between validations on held-out rows. (default: 0, none)", "--eval-every")
    ] = None,
    log_every: Annotated[Text, _option(LOGGING, "Steps between metrics. (default: 10)", "--log-every")] = None,
    save_every: Annotated[
        Text, _option(LOGGING, "Steps between checkpoints; 0: at the end. (default: 1000)", "--save-every")
    ] = None,
    save_minutes: Annotated[
        Text, _option(LOGGING, "Minutes between checkpoints; 0: by steps alone. (default: 10)", "--save-minutes")
    ] = None,
    keep: Annotated[Text, _option(LOGGING, "Newest checkpoints to keep. (default: 2)", "--keep")] = None,
    keep_best: Annotated[
        Flag, _option(LOGGING, "Keep the one of the lowest FVU too. (default: no)", "--keep-best/--no-keep-best")
    ] = None,
    wandb: Annotated[Text, _option(LOGGING, "online, offline, off. (default: off)", "--wandb")] = None,
    wandb_project: Annotated[Text, _option(LOGGING, "(default: granary)", "--wandb-project")] = None,
    wandb_artifacts: Annotated[
        Flag, _option(LOGGING, "Upload the finished SAE too.", "--wandb-artifacts/--no-wandb-artifacts")
    ] = None,
    tensorboard: Annotated[
        Flag, _option(LOGGING, "Write TensorBoard files into the run's folder.", "--tensorboard/--no-tensorboard")
    ] = None,
) -> Given:
    """The flags of every command that takes settings."""
    flags = {key: value for key, value in locals().items() if value is not None}
    for key in ("config", "assignments", "layer", "hook"):
        flags.pop(key, None)
    hooks = [part for text in hook or [] for part in text.split(",")]
    hooks += [f"layer_{part.strip()}" for text in layer or [] for part in text.split(",")]
    from train.config.merge import parse_assignments

    return Given(config, {**flags, **({"hook": hooks} if hooks else {}), **parse_assignments(assignments or [])})


takes_settings = takes_flags_of(given_settings)
