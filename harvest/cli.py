"""`sae-harvest run | plan | names`: text -> activations on disk. Heavy imports stand inside the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated, Any

import typer

from sae_granary.cache.format.storage import STORAGE
from sae_granary.common.app import Debug, Quiet, echo, expected_errors, make_app, takes_flags_of

app = make_app("sae-harvest", "Stream text through a transformer and keep its activations in a cache on disk.")

# Shown by --help; --help-all shows the rest.
COMMON = {"--model", "--revision", "--trust-remote-code", "--device", "--unit", "--layer", "--hook", "--dataset"}
COMMON |= {"--dataset-config", "--split", "--text-column", "--keep-columns", "--ctx-len", "--batch-tokens"}
COMMON |= {"--out", "--dtype", "--max-tokens", "--max-docs"}

MODEL, WHERE, TEXT, CUT, OUTPUT = "Model", "What is harvested", "Text", "Windows and batches", "Cache"


def _option(panel: str, text: str, *names: str, **kwargs: Any) -> Any:
    return typer.Option(
        *names, help=text, rich_help_panel=panel, show_default=kwargs.pop("show_default", True),
        hidden=names[0] not in COMMON, **kwargs,
    )  # fmt: skip


Model = Annotated[str, _option(MODEL, "Hub id, local folder, or demo.", "--model", "-m")]
Revision = Annotated[str | None, _option(MODEL, "Commit, tag or branch of a hub model.", "--revision")]
TrustCode = Annotated[bool, _option(MODEL, "Run code that comes with the model. Read it first.", "--trust-remote-code")]
ComputeDtype = Annotated[
    str, _option(MODEL, "auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16, float16.", "--compute-dtype")
]
Device = Annotated[str, _option(MODEL, "auto, cpu, cuda, cuda:N, mps.", "--device")]
Compile = Annotated[
    bool,
    _option(
        MODEL, "Compile the blocks first (torch.compile; a minute). Pays on long harvests in float32.", "--compile"
    ),
]
Unit = Annotated[str, _option(WHERE, "token: a row per token. text: a pooled embedding per text.", "--unit")]
Layers = Annotated[
    list[str] | None,
    _option(WHERE, "Output of block i, counted from 0: 6, or 2,4,6, or all. Repeatable.", "--layer", "--layers", "-l"),
]
LayerStride = Annotated[int, _option(WHERE, "Every n-th of the layers named (of all, if none is).", "--layer-stride")]
Hooks = Annotated[
    list[str] | None,
    _option(WHERE, "Module path or glob; with :in its input. See `sae-harvest names`. Repeatable.", "--hook"),
]
Dataset = Annotated[
    str | None,
    _option(TEXT, "Hub id, local file or folder, - for standard input, or demo. "
            "(default: Salesforce/wikitext (wikitext-103))", "--dataset", "-d", show_default=False),
]  # fmt: skip
DatasetConfig = Annotated[str | None, _option(TEXT, "Configuration of a hub dataset.", "--dataset-config")]
Split = Annotated[
    str | None,
    _option(
        TEXT, "Split of a hub dataset or of a folder with several; all of a folder. (default: train)", "--split",
        show_default=False,
    ),
]  # fmt: skip
DatasetRevision = Annotated[str | None, _option(TEXT, "Commit, tag or branch of a hub dataset.", "--dataset-revision")]
TextColumns = Annotated[
    list[str] | None,
    _option(TEXT, "Column of the text; several (a,b) are joined. (default: detected)", "--text-column",
            show_default=False),
]  # fmt: skip
KeepColumns = Annotated[
    list[str] | None,
    _option(TEXT, "Columns of the records to store with the documents (a,b), for sae-analyze.", "--keep-columns",
            show_default=False),
]  # fmt: skip
Documents = Annotated[
    str, _option(TEXT, "What a document is in .txt, .md and stdin: file, line, paragraph, or auto.", "--documents")
]
ShuffleBuffer = Annotated[int, _option(TEXT, "Shuffle documents through a buffer of this many.", "--shuffle-buffer")]
ShuffleSeed = Annotated[int, _option(TEXT, "Seed of that shuffle.", "--shuffle-seed")]
CtxLen = Annotated[
    int | None,
    _option(
        CUT, "Tokens of a window. (default: 512, or less if the model takes less)", "--ctx-len", show_default=False
    ),
]
Bos = Annotated[
    bool | None,
    _option(CUT, "Begin windows with BOS. (default: as the tokenizer does)", "--bos/--no-bos", show_default=False),
]
Pack = Annotated[bool, _option(CUT, "Join documents with EOS between (decoders).", "--pack")]
BatchTokens = Annotated[
    int | None,
    _option(CUT, "Tokens of a batch, padding included. (default: 16384 on a GPU, 4096 on a CPU)", "--batch-tokens",
            show_default=False),
]  # fmt: skip
NumProc = Annotated[int, _option(CUT, "Processes for a slow (Python) tokenizer.", "--num-proc")]
Out = Annotated[
    str | None, _option(OUTPUT, "Folder. (default: cache/<model>_l<layers>)", "--out", "-o", show_default=False)
]
Dtype = Annotated[str, _option(OUTPUT, f"auto (as computed), {', '.join(STORAGE)}.", "--dtype")]
MaxTokens = Annotated[
    str | None, _option(OUTPUT, "Stop after the document that reaches this many rows: 20k, 5M, 1.5B.", "--max-tokens")
]
MaxDocs = Annotated[str | None, _option(OUTPUT, "Stop after this many documents.", "--max-docs")]
RowsPerShard = Annotated[
    str | None, _option(OUTPUT, "Rows of a shard. (default: about 512 MiB)", "--rows-per-shard", show_default=False)
]
_TRUNCATED = (
    "error: a file of the text or the model was truncated while it was read, or its disk fails; what is committed "
    "stays: the same command continues when the file is whole"
)
MakeConfig = Callable[[], Any]  # HarvestConfig; read at import time, when that class is not there


def harvest_config(
    model: Model,
    layers: Layers = None,
    hooks: Hooks = None,
    layer_stride: LayerStride = 1,
    unit: Unit = "token",
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    compute_dtype: ComputeDtype = "auto",
    device: Device = "auto",
    compile: Compile = False,
    dataset: Dataset = None,
    dataset_config: DatasetConfig = None,
    split: Split = None,
    dataset_revision: DatasetRevision = None,
    text_columns: TextColumns = None,
    keep_columns: KeepColumns = None,
    documents: Documents = "auto",
    shuffle_buffer: ShuffleBuffer = 0,
    shuffle_seed: ShuffleSeed = 0,
    ctx_len: CtxLen = None,
    bos: Bos = None,
    pack: Pack = False,
    batch_tokens: BatchTokens = None,
    num_proc: NumProc = 1,
    out: Out = None,
    dtype: Dtype = "auto",
    max_tokens: MaxTokens = None,
    max_docs: MaxDocs = None,
    rows_per_shard: RowsPerShard = None,
) -> Any:
    """The flags that `run` and `plan` share, as a config."""
    flags = dict(locals())
    from sae_granary.harvest.settings.keywords import make_config

    return make_config(**flags)


takes_harvest_flags = takes_flags_of(harvest_config)


@app.command()
@takes_harvest_flags
def run(make_config: MakeConfig, quiet: Quiet = False, debug: Debug = False) -> None:
    """Harvest a cache, or continue one that was interrupted."""
    with _errors(debug):
        config = make_config()
        from sae_granary.common.process import keep_freed_memory
        from sae_granary.common.signals import explain_bus_errors, stop_on_signals
        from sae_granary.harvest.progress import print_table, summary_rows
        from sae_granary.harvest.run import harvest_activations

        if config.model.trust_remote_code:
            typer.secho(f"running the code that comes with {config.model.model}", fg="yellow", err=True)
        explain_bus_errors(lambda: _TRUNCATED)
        with stop_on_signals(at_once=True, second="exit") as stop:
            keep_freed_memory(config.model.device)
            result = harvest_activations(config, quiet=quiet, stop=stop)
        unknown = f" ({result.not_recorded} not recorded)" if result.not_recorded else ""
        title = f"already complete{unknown}, nothing to do" if result.already_complete else "harvested"
        print_table(summary_rows(result), title)


@app.command()
@takes_harvest_flags
def plan(make_config: MakeConfig, debug: Debug = False) -> None:
    """Say what `run` with the same flags will need; reads no weights, writes nothing. Exits 1 if it does not fit."""
    with _errors(debug):
        config = make_config()
        from sae_granary.harvest import plan as planning
        from sae_granary.harvest.progress import print_table

        result = planning.plan(config, lambda message: echo(message, err=True))
        print_table(planning.plan_rows(result), "plan" if result.fits else "plan: it does NOT fit")
        if not result.fits:
            raise typer.Exit(1)


@app.command()
def names(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or demo.")],
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    debug: Debug = False,
) -> None:
    """List what of a model can be harvested: layers, and module paths for --hook with their widths."""
    with _errors(debug):
        from sae_granary.harvest.names import name_lines
        from sae_granary.models.config import ModelConfig

        for line in name_lines(ModelConfig(model, revision, trust_remote_code)):
            echo(line)


def _errors(debug: bool) -> AbstractContextManager[None]:
    """The errors of all harvest commands, in one red line."""
    return expected_errors(
        debug,
        interrupted="interrupted: run the same command again to continue after the last committed shard, if any",
        remedy="fix this and run the command again, --debug shows where it happened",
    )


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    sys.exit(app())
