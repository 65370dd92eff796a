"""What `run` and `quick` do with their flags. Heavy imports are inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sae_granary.common.app import echo
from sae_granary.common.errors import ConfigError
from sae_granary.train.commands import sweep_command as cli_sweep
from sae_granary.train.commands.shared_flags import NO_CACHE, follows, working
from sae_granary.train.config.flags import Given


def train_given(
    given: Given,
    *,
    overwrite: bool,
    resume: Any,
    quiet: bool,
    verify: bool = False,
    dry_run: bool = False,
) -> None:
    """Train the SAE that flags ask for, or one per hook point or seed; or print what that would be."""
    from sae_granary.train.config.hook_layers import place_hooks

    if grid := cli_sweep.several(given):
        cli_sweep.train_grid(*grid, overwrite=overwrite, verify=verify, quiet=quiet, dry_run=dry_run)
        return
    given, _ = place_hooks(given)
    config = config_of(given)
    if not config.cache:
        raise ConfigError(NO_CACHE)
    if dry_run:
        from sae_granary.train.commands.origin import annotated_yaml

        echo(annotated_yaml(given.layers()) + "# nothing was written: run without --dry-run to train")
        return
    from sae_granary.train.run import train_sae

    begin = {"overwrite": overwrite, "resume": resume, "verify": verify}
    show_training(lambda **options: train_sae(config, **begin, **options), quiet, config.device)


def config_of(given: Given) -> Any:
    """The TrainConfig of a command's flags, not resolved."""
    from sae_granary.train.config.merge import make_config

    layers = given.layers()
    if any("grid" in values for _, values in layers):
        raise ConfigError("the file has a grid: train it with sae-train sweep")
    return make_config([values for _, values in layers])


def show_training(start: Callable[..., Any], quiet: bool, device: str) -> Any:
    """Run on a device with a console and signal handlers, print the result and return it."""
    from sae_granary.train.commands.result_tables import show_results
    from sae_granary.train.sinks.console_sink import ConsoleSink
    from sae_granary.train.sinks.sink import BaseSink

    sink = BaseSink() if quiet or follows() else ConsoleSink()
    with working(device, sink.message) as stop:
        result = start(sinks=[sink], stop=stop)
    if not follows():
        show_results([result.summary])
        echo(f"{result.folder}")
    return result
