"""Tables for people: variants, results, a run's settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sae_granary import sae_core
from sae_granary.common.app import echo, make_console
from sae_granary.common.quantities import duration, quantity
from sae_granary.common.settings.declare import types_of
from sae_granary.common.settings.page import row_of
from sae_granary.train.result.notes import damage, legend

_FIRST_COLUMNS = {"d_sae": "d_sae", "k": "k", "l0_train": "L0 train", "l0": "L0", "fvu": "FVU"}
_LAST_COLUMNS = {"dead": "dead", "tokens": "tokens", "tokens_per_second": "tok/s", "seconds": "time"}
_OF_SUMMARY = ("d_sae", "k", "l0_train", *_LAST_COLUMNS)  # the others are of its evaluation
DOWNSTREAM = {"ce_score": "CE score", "kl": "KL"}  # columns of runs that measured them


def types_tables(names: Iterable[str]) -> RenderableType:
    """One table per variant: its options with types, defaults and meaning."""
    return Group(*(_type_table(name) for name in names))


def _type_table(name: str) -> RenderableType:
    cls = sae_core.registry.get(name)
    types = types_of(cls.Config)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("option", "default", "type", "meaning"):
        table.add_column(column, overflow="fold")
    for spec in dataclasses.fields(cls.Config):
        if spec.metadata and spec.name != "d_in":
            _, _, kind, default, _, meaning = row_of(spec, types[spec.name])
            table.add_row(*map(escape, (spec.name, default, kind, meaning)))
    recommended = cls.recommended
    about = (cls.__doc__ or "").strip().partition("\n")[0]
    lines: list[RenderableType] = [Text.assemble((name, "bold"), f"  {about}"), table]
    if recommended:
        lines.append(Text("recommended: " + ", ".join(f"{k}={v}" for k, v in recommended.items()), style="dim"))
    return Group(*lines, "")


def result_table(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """Type, L0 in training and inference, FVU, dead latents, speed: one row per run."""
    table = Table(title=None)
    table.add_column("run", overflow="fold")
    table.add_column("type")
    downstream = [name for name in DOWNSTREAM if any(name in summary["eval"] for summary in summaries)]
    downstream_columns = (DOWNSTREAM[name] for name in downstream)
    for column in (*_FIRST_COLUMNS.values(), *downstream_columns, *_LAST_COLUMNS.values()):
        table.add_column(column, justify="right", no_wrap=True)
    if any(map(damage, summaries)):
        table.add_column("damage", style="red", overflow="fold")
    for summary in summaries:
        table.add_row(*_result_cells(summary, downstream), *(["see below"] if damage(summary) else []))
    return table


def _result_cells(summary: Mapping[str, Any], downstream: Sequence[str]) -> list[str]:
    values = {**summary["eval"], **{name: summary[name] for name in _OF_SUMMARY}}
    names = (*_FIRST_COLUMNS, *downstream, *_LAST_COLUMNS)
    cells = (FORMATS[name](values[name]) if name in values else "" for name in names)
    return [escape(str(summary["name"])), str(summary["type"]), *cells]


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _or_nothing(form: str) -> Callable[[Any], str]:
    return lambda value: "" if value is None else form.format(value)


# How the numbers of runs are written, by their names in summary.json.
FORMATS: dict[str, Callable[[Any], str]] = {
    "d_sae": "{:,}".format,
    "k": _or_nothing("{}"),
    "target": lambda value: escape(str(value)),
    "l0_train": _or_nothing("{:.1f}"),
    "l0": "{:.1f}".format,
    "fvu": _share,
    "ce_score": _share,
    "kl": _share,
    "dead": "{:.1%}".format,
    "tokens": quantity,
    "tokens_per_second": quantity,
    "seconds": duration,
}


def show_results(summaries: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of some runs and what is to be known of them."""
    show(result_table(summaries))
    show_notes(summaries)


def show_notes(summaries: Sequence[Mapping[str, Any]]) -> None:
    """Print what the words of a table mean, and the notes of each run: those on damage in red."""
    echo(legend(summaries))
    if len(summaries) == 1 and (value := summaries[0]["eval"].get("decoder_max_cosine")) is not None:
        echo(f"decoder_max_cosine {value:.3f}: largest cosine of a latent to another, on average; lower is better")
    damaged = {line for summary in summaries for line in damage(summary)}
    for line, names in _runs_by_note(summaries).items():
        whose = "all runs" if len(names) == len(summaries) > 1 else ", ".join(names)
        echo(f"{whose}: {line}", color="red" if line in damaged else None)


def _runs_by_note(summaries: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Note -> the runs that it is about; those on damage first, also of runs that were written without notes."""
    found: dict[str, list[str]] = {}
    for notes in (damage, lambda summary: summary.get("notes", ())):
        for summary in summaries:
            for note in notes(summary):
                if summary["name"] not in found.setdefault(note, []):
                    found[note].append(summary["name"])
    return found


def show(renderable: RenderableType) -> None:
    """Print to standard output, as wide as needed when that is no terminal."""
    make_console(width=160).print(renderable)
