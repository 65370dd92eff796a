"""`sae-train quick`: from text to SAE in one command."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Annotated

import typer

from sae_granary.common.app import Debug, Quiet
from sae_granary.common.errors import ConfigError
from sae_granary.train.commands.shared_flags import Overwrite, ReadFlags, errors
from sae_granary.train.commands.train_command import config_of, train_given
from sae_granary.train.config.flags import Given, takes_settings

HARVEST = "Harvest"


def _harvest(text: str, *names: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(*names, help=text, rich_help_panel=HARVEST, show_default=False)
    return option


@takes_settings
def quick(
    read_flags: ReadFlags,
    model: Annotated[str, typer.Argument(help="Model, as for sae-harvest: hub id, local folder, or demo.")],
    dataset: Annotated[str, typer.Argument(help="Data set, as for sae-harvest: hub id, file, folder, - or demo.")],
    max_tokens: Annotated[str, _harvest("Rows to harvest. (default: 5M)", "--max-tokens")] = "5M",
    ctx_len: Annotated[str | None, _harvest("Tokens per context.", "--ctx-len")] = None,
    batch_tokens: Annotated[str | None, _harvest("Tokens per batch of the model.", "--batch-tokens")] = None,
    num_proc: Annotated[str | None, _harvest("Processes for a slow (Python) tokenizer.", "--num-proc")] = None,
    dataset_config: Annotated[str | None, _harvest("Configuration of a hub dataset.", "--dataset-config")] = None,
    harvest: Annotated[str, _harvest("Other flags of sae-harvest run, in quotes.", "--harvest")] = "",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Harvest and train in one command: `sae-train quick bert-base-uncased Salesforce/wikitext --layer 6`.

    An existing harvest with the same settings is reused (--cache names its folder). The default type is batchtopk.
    The same command resumes what was interrupted.
    """
    with errors(debug):
        given = read_flags()
        if not any(values.get("type") for _, values in given.layers()):
            given = replace(given, flags={"type": "batchtopk", **given.flags})
        config_of(given)  # what is wrong with the settings is told before the harvest
        named = _layers_of(given)
        flags = {
            "--ctx-len": ctx_len,
            "--batch-tokens": batch_tokens,
            "--num-proc": num_proc,
            "--dataset-config": dataset_config,
            "--layer-stride": given.layer_stride,
        }
        others = [part for flag, value in flags.items() if value for part in (flag, value)] + shlex.split(harvest)
        from sae_granary.train.commands.harvest_process import cache_folder, run_stage

        folder = given.flags.get("cache") or str(cache_folder(model, dataset, named, max_tokens, others))
        common = ["--model", model, "--dataset", dataset, "--layers", named, "--max-tokens", max_tokens]
        device = ["--device", str(given.flags["device"])] if "device" in given.flags else []
        run_stage("harvest", "run", *common, *others, *device, "--out", folder, *(["--quiet"] if quiet else []))
        given = replace(given, flags={**given.flags, "cache": folder}, layer_stride=None)  # the cache has that of `all`
        resume = "never" if overwrite else "auto"
        train_given(given, overwrite=overwrite, resume=resume, quiet=quiet)


def _layers_of(given: Given) -> str:
    """`--layer 2 --layer 4` as 2,4; all."""
    numbers = [hook.removeprefix("layer_") for hook in given.hooks]
    if not numbers or not (numbers == ["all"] or all(number.isdigit() for number in numbers)):
        got = ", ".join(given.hooks) or "none"
        raise ConfigError(
            f"quick needs the layers by number, got {got}: give --layer 6, or --layers 2,4 for an SAE each"
        )
    return ",".join(numbers)
