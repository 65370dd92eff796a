"""The flags that set what a run does, shared by `sae-train run`, `config` and others. Imports nothing heavy.

They stand in a table of their own, not in the metadata of `TrainConfig`: `--help` must not wait for torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_granary.common.app import takes_flags_of
from sae_granary.common.errors import ConfigError

# Values are text here: `train.config.coerce` gives them their types, with suffixes (10k, 5M) and one way to complain.
Text, Texts, Switch, File = str | None, list[str] | None, bool | None, Path | None


@dataclass(frozen=True)
class Flag:
    """`--a-name` for the setting a_name; a Switch has `--no-a-name` too, Texts may be repeated."""

    name: str
    help: str
    short: str = ""
    kind: Any = Text
    flag: str = ""  # where it is not the setting's name
    also: str = ""  # a second name
    common: bool = False  # shown by --help, others by --help-all only

    def parameter(self, panel: str) -> inspect.Parameter:
        """As the command line library wants it."""
        words = self.name.replace("_", "-")
        long = self.flag or (f"--{words}/--no-{words}" if self.kind is Switch else f"--{words}")
        names = [name for name in (long, self.also, self.short) if name]
        shown: dict[str, Any] = {"rich_help_panel": panel, "show_default": False, "hidden": not self.common}
        option = typer.Option(*names, help=self.help, **shown)
        annotation: Any = Annotated[self.kind, option]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


FLAGS: Mapping[str, tuple[Flag, ...]] = {  # by panel of the help
    "What": (
        Flag("cache", "Folder of the activation cache.", short="-c", common=True),
        Flag("type", "Variant: see `sae-train types`.", short="-t", common=True),
        Flag("hook", "Hook point of the cache. (default: the only one)", kind=Texts, common=True),
        Flag(
            "layer",
            "Hook points by layer: 6, or 2,4,6, or all. One SAE each, or one for all if its type reads several.",
            short="-l",
            kind=Texts,
            also="--layers",
            common=True,
        ),
        Flag("layer_stride", "Every n-th of these layers. (default: 1)"),
        Flag("name", "Name of the run's folder. (default: from cache, hook, type, size, seed)", common=True),
        Flag("runs_dir", "Folder of all runs. (default: runs)"),
        Flag("config", "Settings in YAML; flags go on top.", kind=File, common=True),
        Flag(
            "assignments",
            "Any setting of the type or the trainer: key=value. Repeatable.",
            kind=Texts,
            flag="--set",
            common=True,
        ),
        Flag("device", "auto, cpu, cuda, cuda:N, mps. (default: auto)", common=True),
        Flag("seed", "Seed of shuffling and initialization. (default: 0)", common=True),
        Flag("shuffle_seed", "Seed of the order of rows alone."),
        Flag("init_seed", "Seed of the weights alone."),
    ),
    "SAE": (
        Flag("k", "Active latents per row, for types that have it.", short="-k", common=True),
        Flag("d_sae", "Number of latents.", common=True),
        Flag("expansion_factor", "The same as d_sae / d_in. (default: 8)"),
        Flag("normalize", "dataset, mean, mean+dataset, unit_norm, none. (default: dataset)"),
        Flag("loss", "fvu, mse, nmse; kl, ce: through the language model. (default: fvu)"),
        Flag("init_from", "Start from the weights of an SAE: a run, a checkpoint, SAELens, sparsify.", common=True),
    ),
    "Training": (
        Flag("batch_size", "Rows per step. (default: 4096)", short="-b", common=True),
        Flag("grad_acc_steps", "Micro-batches that a batch is split into. (default: 1)"),
        Flag("tokens", "Length in rows: 500k, 10M.", common=True),
        Flag("steps", "Length in steps.", common=True),
        Flag("epochs", "Length in passes. (default: 1; more up to 16 if under 1000 steps)"),
        Flag("lr", "Peak rate. (default: from d_sae and steps, at most 1e-3)", common=True),
        Flag("optimizer", "adam, adamw, sgd, muon, signum, adafactor. (default: adam)"),
        Flag("weight_decay", "Weight decay. (default: 0)"),
        Flag("lr_schedule", "Decay at the end: linear, cosine, constant. (default: linear)"),
        Flag("warmup_steps", "Linear warm-up. (default: 5 %, at most 1000)"),
        Flag("finetune_kl", "Last rows of the run, which minimize KL (and fvu): 100k."),
        Flag("lm", "Language model for kl and ce. (default: where the harvest found it)"),
        Flag("ema_decay", "Average the weights: 0.999. (default: off)"),
        Flag("resample_every", "Steps between resamplings of dead latents. (default: 0, never)"),
        Flag("early_stop", "End after this many validations without a better FVU. (default: off)"),
        Flag("compute_dtype", "float32, bfloat16. (default: float32)"),
    ),
    "Data": (
        Flag("allow_incomplete", "Train on what a harvest that goes on has written so far.", kind=Switch),
        Flag("keep_special", "Train on special tokens too.", kind=Switch),
        Flag(
            "keep_first_position",
            "Train on position 0 of each window. (default: unless the model is a decoder)",
            kind=Switch,
        ),
        Flag("exclude_tokens", "Id or string of a token not to train on. Repeatable.", kind=Texts),
        Flag("holdout", "Share of documents held out. (default: 0.05)"),
        Flag("eval_rows", "Most held-out rows in the final evaluation. (default: 131072)"),
        Flag(
            "eval_downstream",
            "CE score and KL of the language model with the SAE in it. (default: if it is loaded)",
            kind=Switch,
        ),
    ),
    "Logging": (
        Flag("eval_every", "Steps between validations on held-out rows. (default: 0, none)"),
        Flag("log_every", "Steps between metrics. (default: 10)"),
        Flag("save_every", "Steps between checkpoints; 0: at the end. (default: 1000)"),
        Flag("save_minutes", "Minutes between checkpoints; 0: by steps alone. (default: 10)"),
        Flag("keep", "Newest checkpoints to keep. (default: 2)"),
        Flag("keep_best", "Keep the one of the lowest FVU too. (default: no)", kind=Switch),
        Flag("wandb", "online, offline, off. (default: off)", common=True),
        Flag("wandb_project", "(default: granary)"),
        Flag("wandb_artifacts", "Upload the finished SAE too.", kind=Switch),
        Flag("tensorboard", "Write TensorBoard files into the run's folder.", kind=Switch),
    ),
}


@dataclass(frozen=True)
class Given:
    """What was typed: a YAML file, and on top of it flags and `--set`.

    `hooks` are those of --hook and --layer, or of `layers:` in the file, where `all` may stand;
    `train.config.hook_layers` finds them in the cache.
    """

    file: tuple[str, Mapping[str, Any]] | None  # its name and its settings
    flags: Mapping[str, Any]
    hooks: tuple[str, ...] = ()
    layer_stride: str | None = None
    hooks_of_file: bool = False

    def layers(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Layers of settings with where they come from, the strongest last."""
        return [*([self.file] if self.file else []), ("flag", self.flags)]


def given_settings(
    *,
    config: Path | None = None,
    hook: list[str] | None = None,
    layer: list[str] | None = None,
    layer_stride: str | None = None,
    assignments: list[str] | None = None,
    **settings: Any,
) -> Given:
    """The flags of every command that takes settings: those of `FLAGS`."""
    from sae_granary.train.config.merge import parse_assignments, read_yaml

    flags = {key: value for key, value in settings.items() if value is not None}
    below = read_yaml(config) if config else {}
    in_file = [below.pop(name, None) for name in ("layer", "layers")]
    stride = below.pop("layer_stride", None)
    hooks = _hook_points("--hook", hook) + _hook_points("--layers", layer)
    layers = [name for values in in_file for name in _hook_points("layers:", values)]
    of_file = not hooks and bool(layers)
    if of_file:
        hooks = _hook_points("hook:", below.get("hook")) + layers
    file = (str(config), below) if config else None
    flags |= parse_assignments(assignments or [])
    return Given(file, flags, tuple(hooks), layer_stride or (None if stride is None else str(stride)), of_file)


def _hook_points(option: str, values: list[str] | str | None) -> list[str]:
    """Names with commas, split; a number is that layer. Raises ConfigError for an empty one."""
    texts = [] if values is None else [str(value) for value in (values if isinstance(values, list) else [values])]
    parts = [part.strip() for text in texts for part in text.split(",")]
    if "" in parts:
        example = "a hook point of the cache" if "hook" in option else "6, or 2,4,6, or all"
        raise ConfigError(f"{option} {','.join(texts)!r}: a name is empty; expected {example}")
    return [f"layer_{int(part)}" if part.isdecimal() and "layer" in option else part for part in parts]


_PARAMETERS = [flag.parameter(panel) for panel, flags in FLAGS.items() for flag in flags]
given_settings.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]
given_settings.__annotations__ = {parameter.name: parameter.annotation for parameter in _PARAMETERS}

takes_settings = takes_flags_of(given_settings)
