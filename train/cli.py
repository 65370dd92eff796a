"""`sae-train run`, `sweep`, `quick`, `demo`, ... Heavy imports stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sae_granary.common.app import Debug, Quiet, echo, make_app
from sae_granary.common.errors import ConfigError
from sae_granary.train.commands import sweep_command as cli_sweep
from sae_granary.train.commands.compare_command import compare
from sae_granary.train.commands.demo import demo
from sae_granary.train.commands.quick import quick
from sae_granary.train.commands.script_command import script
from sae_granary.train.commands.shared_flags import DryRun, Overwrite, ReadFlags, Stage, Verify, errors
from sae_granary.train.commands.train_command import show_training, train_given
from sae_granary.train.config.flags import takes_settings
from sae_granary.train.ranks.place import quiet_torch

app = make_app("sae-train", "Train sparse autoencoders from an activation cache.")

app.command()(cli_sweep.sweep)
app.command()(quick)
app.command()(demo)
app.command()(compare)
app.command()(script)


@app.command()
@takes_settings
def run(
    read_flags: ReadFlags,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    verify: Verify = False,
    stage: Stage = None,
    resume: Annotated[
        str, typer.Option("--resume", help="auto: resume if the run exists, else start it. never: start it.")
    ] = "never",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train one SAE from a cache: `sae-train run --cache cache/bert_l6 --type batchtopk`.

    With several layers (--layers 2,4) or seeds (--init-seed 0,1,2) it trains one SAE each in a single pass, as `sweep`
    does. A type that reads several hook points reads these layers.
    """
    with errors(debug, stage):
        train_given(read_flags(), overwrite=overwrite, resume=resume, verify=verify, quiet=quiet, dry_run=dry_run)


@app.command()
@takes_settings
def config(read_flags: ReadFlags, debug: Debug = False) -> None:
    """Print the settings that `run` would use with the same flags, and where each comes from. Writes nothing.

    With --cache, settings that depend on the cache are resolved too. The output is a YAML file for --config.
    """
    with errors(debug):
        from sae_granary.train.commands.origin import annotated_yaml
        from sae_granary.train.config.hook_layers import place_hooks

        given, each = place_hooks(read_flags())
        if each:
            raise ConfigError(
                f"{', '.join(each)}: an SAE each; config shows the settings of one, run --dry-run all of them"
            )
        echo(annotated_yaml(given.layers()), nl=False)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="Folder of a stopped run or sweep: runs/<name>.")],
    cache: Annotated[Path | None, typer.Option("--cache", "-c", help="New path of the cache, if it was moved.")] = None,
    lm: Annotated[str | None, typer.Option("--lm", help="New path of the language model, if it was moved.")] = None,
    stage: Stage = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Resume a run, or all runs of a sweep, from the last checkpoint; the result is bitwise the same."""
    with errors(debug, stage):
        from sae_granary.common.finished_run import is_complete
        from sae_granary.train.folders import is_sweep, read_run
        from sae_granary.train.state.checkpoint import list_checkpoints

        if is_sweep(folder):
            cli_sweep.resume_grid(folder, quiet, cache, lm)
            return
        config, _ = read_run(folder)
        if not quiet and not is_complete(folder):
            found = list_checkpoints(folder)
            echo(f"continuing from {found[-1].name}" if found else "no checkpoint yet: starting again at step 1")
        from sae_granary.train.run import resume_training

        show_training(lambda **options: resume_training(folder, cache=cache, lm=lm, **options), quiet, config.device)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a run or of an SAE in any supported format.")],
    to: Annotated[str, typer.Option("--to", help="Format: saelens, sparsify or delphi.")] = "saelens",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Output folder. (default: <folder>_<format>)")] = None,
    debug: Debug = False,
) -> None:
    """Write an SAE in the file format of another library."""
    with errors(debug):
        from sae_granary.train.publish.export import export as write

        echo(f"{write(folder, to, out or folder.with_name(f'{folder.name}_{to}'))}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    repo: Annotated[str, typer.Argument(help="Repository on the hub: owner/name.")],
    license: Annotated[str, typer.Option("--license", help="License named in the model card.")] = "mit",
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Upload; without it, only print what would be uploaded.")] = False,
    debug: Debug = False,
) -> None:
    """Publish an SAE on the model hub with a model card; a dry run unless --yes is given."""
    with errors(debug):
        from sae_granary.train.publish import push as hub

        if yes:
            echo(hub.push(folder, repo, license=license, private=not public))
            return
        with hub.staged(folder, license) as place:
            for path in sorted(place.iterdir()):
                echo(f"{path.name}  {path.stat().st_size:,} bytes")
            card = (place / hub.CARD).read_text(encoding="utf-8")
        echo(f"\n{card}\nnothing was uploaded: add --yes to create {repo}")


@app.command()
def types(
    names: Annotated[list[str] | None, typer.Argument(help="Types to list. (default: all)")] = None,
    debug: Debug = False,
) -> None:
    """List the variants with their options and defaults."""
    with errors(debug):
        from sae_granary import sae_core
        from sae_granary.train.commands.result_tables import show, types_tables

        show(types_tables(names or sae_core.registry.names()))


def main() -> None:
    """Entry point of the command."""
    quiet_torch()
    app()


if __name__ == "__main__":
    main()
