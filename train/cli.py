"""`sae-train run | resume | compare | export | push | types`. Heavy imports stand inside the commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    name="sae-train",
    help="Train sparse autoencoders from an activation cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

WHAT, MODEL, TRAINING, DATA, LOGGING = "What", "SAE", "Training", "Data", "Logging"


def _option(panel: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


# Values are text here: `train.coerce` gives them their types, with suffixes (10k, 5M) and one way to complain.
Text = str | None
Flag = bool | None

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]


@app.command()
def run(
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run of that name.")] = False,
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
    loss: Annotated[Text, _option(MODEL, "fvu, mse, nmse. (default: fvu)", "--loss")] = None,
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
    optimizer: Annotated[Text, _option(TRAINING, "adam, adamw, sgd. (default: adam)", "--optimizer")] = None,
    weight_decay: Annotated[Text, _option(TRAINING, "Weight decay. (default: 0)", "--weight-decay")] = None,
    lr_schedule: Annotated[
        Text, _option(TRAINING, "Decay at the end: linear, cosine, constant. (default: linear)", "--lr-schedule")
    ] = None,
    warmup_steps: Annotated[
        Text, _option(TRAINING, "Linear warm-up. (default: 5 %, at most 1000)", "--warmup-steps")
    ] = None,
    compute_dtype: Annotated[
        Text, _option(TRAINING, "float32, bfloat16. (default: float32)", "--compute-dtype")
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
    log_every: Annotated[Text, _option(LOGGING, "Steps between metrics. (default: 10)", "--log-every")] = None,
    save_every: Annotated[
        Text, _option(LOGGING, "Steps between checkpoints; 0: at the end. (default: 1000)", "--save-every")
    ] = None,
    keep: Annotated[Text, _option(LOGGING, "Checkpoints to keep. (default: 2)", "--keep")] = None,
    wandb: Annotated[Text, _option(LOGGING, "online, offline, off. (default: off)", "--wandb")] = None,
    wandb_project: Annotated[Text, _option(LOGGING, "(default: granary)", "--wandb-project")] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train one SAE from a cache: `sae-train run --cache cache/bert_l6 --type batchtopk`."""
    given = {key: value for key, value in locals().items() if value is not None}
    for key in ("overwrite", "quiet", "debug", "config", "assignments", "layer", "hook"):
        given.pop(key, None)
    hooks = [part for text in hook or [] for part in text.split(",")]
    hooks += [f"layer_{part.strip()}" for text in layer or [] for part in text.split(",")]
    with _errors(debug):
        from train.config import make_config, parse_assignments, read_yaml

        flags = {**given, **({"hook": hooks} if hooks else {})}
        layers = [read_yaml(config) if config else {}, flags | parse_assignments(assignments or [])]
        settings = make_config(layers)
        if not settings.cache:
            _fail("error: no cache was given; name its folder with --cache (sae-harvest run makes one)", 2)
        _train(lambda **options: _run_module().train_sae(settings, overwrite=overwrite, **options), quiet)


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
