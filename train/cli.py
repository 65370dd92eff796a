"""`sae-train run | config | resume | compare | export | push | types`. Heavy imports stand inside the commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from train.flags import Given, takes_settings

app = typer.Typer(
    name="sae-train",
    help="Train sparse autoencoders from an activation cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
ReadFlags = Callable[[], Given]


@app.command()
@takes_settings
def run(
    read_flags: ReadFlags,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run of that name.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train one SAE from a cache: `sae-train run --cache cache/bert_l6 --type batchtopk`."""
    with _errors(debug):
        settings = _settings(read_flags)
        if not settings.cache:
            _fail("error: no cache was given; name its folder with --cache (sae-harvest run makes one)", 2)
        _train(lambda **options: _run_module().train_sae(settings, overwrite=overwrite, **options), quiet)


@app.command()
@takes_settings
def config(read_flags: ReadFlags, debug: Debug = False) -> None:
    """Print the settings that `run` with the same flags would use, each with where it comes from; nothing is written.

    With --cache what follows from the cache is decided too. The output is a YAML file for --config.
    """
    with _errors(debug):
        from train.origin import annotated_yaml

        typer.echo(annotated_yaml(read_flags().layers()), nl=False)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="Folder of a run that was stopped: runs/<name>.")],
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Continue a run from its newest checkpoint, exactly as if it had not stopped."""
    with _errors(debug):
        from train.checkpoint import list_checkpoints
        from train.folders import is_complete, read_run

        read_run(folder)
        if not quiet and not is_complete(folder):
            found = list_checkpoints(folder)
            typer.echo(f"continuing from {found[-1].name}" if found else "no checkpoint yet: starting again at step 1")
        _train(lambda **options: _run_module().resume_training(folder, **options), quiet)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    debug: Debug = False,
) -> None:
    """Print the results of finished runs side by side."""
    with _errors(debug):
        from train.folders import read_summary
        from train.render import result_table, reuse_line, show

        summaries = [read_summary(folder) for folder in folders]
        show(result_table(summaries))
        if line := reuse_line(summaries):
            typer.echo(line)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, or of any SAE that can be loaded.")],
    to: Annotated[str, typer.Option("--to", help="saelens, sparsify or delphi.")] = "saelens",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="(default: the run's folder plus the tool)")] = None,
    debug: Debug = False,
) -> None:
    """Write an SAE in the files of another tool."""
    with _errors(debug):
        from train.export import export as write

        typer.echo(f"{write(folder, to, out or folder.with_name(f'{folder.name}_{to}'))}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    repo: Annotated[str, typer.Argument(help="Repository on the hub: owner/name.")],
    licence: Annotated[str, typer.Option("--license", help="Licence named in the model card.")] = "mit",
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Upload. Without it, only print what would be uploaded.")] = False,
    debug: Debug = False,
) -> None:
    """Publish an SAE on the model hub with a model card; a dry run unless --yes is given."""
    with _errors(debug):
        from train import hub

        paths, card = hub.files_of(folder), hub.model_card(folder, licence)
        if yes:
            typer.echo(hub.push(folder, repo, licence=licence, private=not public))
            return
        for path in paths:
            typer.echo(f"{path.name}  {path.stat().st_size:,} bytes")
        typer.echo(f"README.md\n\n{card}\nnothing was uploaded: add --yes to create {repo}")


@app.command()
def types(
    names: Annotated[list[str] | None, typer.Argument(help="Only these types.")] = None,
    debug: Debug = False,
) -> None:
    """List the variants with their options and defaults."""
    with _errors(debug):
        import sae_core
        from train.render import show, types_tables

        show(types_tables(names or sae_core.registry.names()))


def _settings(read_flags: ReadFlags) -> Any:
    """The TrainConfig of a command's flags, not resolved."""
    from train.config import make_config

    return make_config([values for _, values in read_flags().layers()])


def _run_module() -> Any:
    import train.run

    return train.run


def _train(start: Any, quiet: bool) -> None:
    """Run with a console and signal handlers, then print the result."""
    from train.console import ConsoleSink
    from train.render import result_table, show
    from train.signals import stop_on_signals

    with stop_on_signals() as stop:
        result = start(sinks=[] if quiet else [ConsoleSink()], stop=stop)
    show(result_table([result.summary]))
    typer.echo(f"{result.folder}")


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """Expected failures become one red line and exit code 2; a signal its own code."""
    from cache.errors import CacheError
    from train.errors import InterruptedRunError, TrainError

    try:
        yield
    except (InterruptedRunError, KeyboardInterrupt) as error:
        if isinstance(error, InterruptedRunError):
            _fail(str(error), 128 + error.signum)
        _fail("interrupted at once: continue from the last checkpoint with `sae-train resume`", 130)
    except Exception as error:
        from sae_core.errors import SAEError

        if debug or not isinstance(error, TrainError | CacheError | SAEError | OSError):
            raise
        _fail(f"error: {_one_line(error)}", 2)


def _one_line(error: Exception) -> str:
    """The message of an expected error; of one from the system, what failed and how to go on."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}; what was committed is safe: mend that, then `sae-train resume` goes on"


def _fail(message: str, code: int) -> NoReturn:
    typer.secho(message, fg="red", err=True)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
