"""The options of the commands of `sae-analyze`, each declared once: its flag, YAML key and documentation follow."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sae_granary.cache.remote.store import is_url
from sae_granary.common.files import user_path
from sae_granary.common.settings.declare import check, setting

_option = partial(setting, common=True)
_model = partial(_option, None, default_words="the model of the cache")
_out = partial(_option, None, short="-o")
POOLINGS = ("max", "mean", "sum")


def _cache_place(text: object) -> str:
    """A URL as it is, anything else as a path; `open_cache` takes both."""
    return str(text) if is_url(text) else str(user_path("cache", str(text)))


@dataclass(frozen=True)
class Shared:
    """Options of every command."""

    cache: str | None = _option(
        None,
        help="Folder, name or URL of a cache that holds the SAE's hook points.",
        parse=_cache_place,
        short="-c",
        default_words="the one the SAE was trained on",
    )
    hook: tuple[str, ...] = _option(
        (), help="Hook point of the cache; several with commas.", default_words="those the SAE was trained on"
    )
    device: str = _option("auto", help="auto (cuda if there is a GPU, else cpu), cpu, cuda, cuda:N or mps.")
    allow_incomplete: bool = _option(False, help="Read the shards that an unfinished harvest has committed.")
    stage: str | None = _option(
        None,
        help="Folder on a disk of this machine: rows that are read are copied there once, checked and read.",
        default_words="GRANARY_STAGE, else no copy",
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Encode(Shared):
    """Options of `encode`."""

    out: Path | None = _out(
        help="Folder to write, or file for npz and parquet.", default_words="in the folder of the SAE"
    )
    pool: str | None = _option(
        None, help="Write one row per document, pooled over its tokens without special tokens.", choices=POOLINGS
    )
    format: str = _option(
        "granary",
        help="Files to write: granary is memory-mapped CSR, npz is for scipy.sparse.load_npz.",
        choices=("granary", "npz", "parquet"),
    )
    text: tuple[str, ...] = _option(
        (), help="Encode this text instead of a cache. Repeatable.", short="-t", repeat=True, commas=False
    )
    texts: str | None = _option(
        None, help="Encode the texts of a file (one per line, .jsonl or .csv); - is standard input."
    )
    text_column: str | None = _option(None, help="With --texts: column that holds the text.")
    model: str | None = _model(help="With texts: folder or hub id of the model.")


@dataclass(frozen=True)
class Eval(Shared):
    """Options of `eval`."""

    part: str = _option("heldout", help="Rows to evaluate on.", choices=("heldout", "train", "all"))
    downstream: bool = _option(False, help="Measure CE score and KL of the model with the SAE in it.")
    downstream_rows: int = _option(16_000, help="With --downstream: maximum number of rows.", unit="rows", ge=1)
    model: str | None = _model(help="With --downstream: folder or hub id of the model.")
    json: bool = _option(False, help="Print JSON instead of a table.")
    out: Path | None = _out(help="Write the JSON to a file too.")


@dataclass(frozen=True)
class Stats(Shared):
    """Options of `stats`."""

    logits: bool = _option(False, help="Also store which tokens a latent makes more or less likely. Loads the model.")
    model: str | None = _model(help="With --logits: folder or hub id of the model.")


@dataclass(frozen=True)
class Show(Shared):
    """Options of `show`."""

    latent: tuple[int, ...] = _option((), help="Number of a latent, from 0. Repeatable.", short="-l", repeat=True)
    text: tuple[str, ...] = _option((), help="Text to encode. Repeatable.", short="-t", repeat=True, commas=False)
    model: str | None = _model(help="With --text: folder or hub id of the model.")
    top: int = _option(5, help="Examples of a latent (at most 10), or latents per token and text.", short="-n")


@dataclass(frozen=True)
class Report(Shared):
    """Options of `report`."""

    out: Path | None = _out(help="File to write.", default_words="report.html in the folder of the run")
    png: Path | None = _option(None, help="Folder for every plot as a PNG file.")
    svg: Path | None = _option(None, help="Folder for every plot as an SVG file.")


@dataclass(frozen=True)
class Search(Shared):
    """Options of `search`."""

    latent: int | None = _option(None, help="Number of a latent, from 0.", short="-l")
    by: str = _option("", help="Column kept by `sae-harvest run --keep-columns`: print a table of its values.")
    pool: str = _option("max", help="Activation of a document, pooled over its rows.", choices=POOLINGS)
    top: int = _option(20, help="Number of documents, and of values of --by, to print.", short="-n", ge=1)


COMMANDS: dict[str, type[Shared]] = {
    "encode": Encode, "eval": Eval, "stats": Stats, "show": Show, "report": Report, "search": Search
}  # fmt: skip
