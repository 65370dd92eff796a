"""Tables for people: variants, results, a run's settings."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sae_granary import sae_core
from sae_granary.common.app import echo, make_console
from sae_granary.common.quantities import quantity
from sae_granary.train.config.coerce import describe

_LAST_COLUMNS = ("dead", "tokens", "tok/s", "time")
DOWNSTREAM = {"ce_score": "CE score", "kl": "KL"}  # columns of runs that measured them


def types_tables(names: Iterable[str]) -> RenderableType:
    """One table per variant: its options with types, defaults and meaning."""
    return Group(*(_type_table(name) for name in names))


def _type_table(name: str) -> RenderableType:
    cls = sae_core.registry.get(name)
    hints = typing.get_type_hints(cls.Config)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("option", "default", "type", "meaning"):
        table.add_column(column, overflow="fold")
    for spec in dataclasses.fields(cls.Config):
        if spec.name == "d_in":
            continue
        default = "" if spec.default is dataclasses.MISSING else str(spec.default)
        choices = spec.metadata.get("choices")
        kind = " | ".join(choices) if choices else describe(hints[spec.name])
        default = {"d_sae": "8 * d_in", "dead_after_tokens": "5 % of the run"}.get(spec.name, default)
        table.add_row(spec.name, escape(default), escape(kind), escape(str(spec.metadata.get("help", ""))))
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
    for column in ("d_sae", "k", "L0 train", "L0", "FVU", *(DOWNSTREAM[n] for n in downstream), *_LAST_COLUMNS):
        table.add_column(column, justify="right", no_wrap=True)
    for summary in summaries:
        table.add_row(*_result_cells(summary, downstream))
    return table


def _result_cells(summary: Mapping[str, Any], downstream: Sequence[str]) -> list[str]:
    numbers = summary["eval"]
    l0_train = summary["l0_train"]
    return [
        escape(str(summary["name"])),
        str(summary["type"]),
        f"{summary['d_sae']:,}",
        "" if summary["k"] is None else str(summary["k"]),
        "" if l0_train is None else f"{l0_train:.1f}",
        f"{numbers['l0']:.1f}" if "l0" in numbers else "",
        f"{numbers['fvu']:.4f}" if "fvu" in numbers else "",
        *(_share(numbers[name]) if name in numbers else "" for name in downstream),
        f"{summary['dead']:.1%}",
        quantity(summary["tokens"]),
        quantity(summary["tokens_per_second"]),
        f"{summary['seconds']:.0f} s",
    ]


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def notes(summaries: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the reports say beside their numbers, each with its run."""
    return [f"{summary['name']}: {note}" for summary in summaries for note in summary.get("notes", ())]


def show_results(summaries: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of some runs and their notes."""
    show(result_table(summaries))
    for line in notes(summaries):
        echo(line)


def similarity_line(summary: Mapping[str, Any]) -> str | None:
    """How alike the latents are, with the other name that tools of the field give it."""
    value = summary["eval"].get("decoder_max_cosine")
    if value is None:
        return None
    return f"decoder_max_cosine {value:.3f} (also called feature absorption: likeness of latents, lower is better)"


def show(renderable: RenderableType) -> None:
    """Print to standard output, as wide as needed when that is no terminal."""
    make_console(width=160).print(renderable)
