"""The table that `sae-analyze eval` prints: one column per SAE, one table per cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from sae_granary.common.app import echo, make_console

Evaluation = Mapping[str, Any]

# name -> format; in the order of the table
METRICS = {
    "l0": "{:.2f}",
    "fvu": "{:.4f}",
    "explained_variance": "{:.4f}",
    "mse": "{:.4g}",
    "cosine": "{:.4f}",
    "l2_ratio": "{:.4f}",
    "l1": "{:.4g}",
    "activation_mean": "{:.4g}",
    "activation_max": "{:.4g}",
    "dead": "{:.1%}",
    "rare": "{:.1%}",
    "never_fired": "{:.1%}",
    "decoder_max_cosine": "{:.4f}",
}
DOWNSTREAM = {
    "ce_score": "{:.4f}",
    "kl": "{:.4f}",
    "ce_clean": "{:.4f}",
    "ce_spliced": "{:.4f}",
    "ce_ablated": "{:.4f}",
    "n_predicted": "{:,}",
    "embedding_cosine": "{:.4f}",
    "embedding_rank_correlation": "{:.4f}",
    "embedding_cosine_ablated": "{:.4f}",
    "n_embeddings": "{:,}",
}


def show_evaluations(found: Sequence[Evaluation]) -> None:
    """Print one table for each cache, a warning where there are several, and the notes of each SAE."""
    groups = by_cache(found)
    if len(groups) > 1:
        names = " and ".join(str(group[0]["cache"]) for group in groups)
        echo(f"warning: the SAEs are on different caches, {names}: compare within one only", err=True, color="yellow")
    for group in groups:
        if any(one["selection"] != group[0]["selection"] for one in group):
            echo(
                f"warning: the SAEs on {group[0]['cache']} were evaluated on different rows of it: "
                "each on those that its own training held out",
                err=True,
                color="yellow",
            )
        echo(f"{group[0]['cache']}, {', '.join(dict.fromkeys(one['part'] for one in group))} rows")
        make_console(width=160).print(_table(group))
    for one in found:
        for note in one["notes"]:
            echo(f"{one['name']}: {note}")


def by_cache(found: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """Evaluations on equal caches together, in the order in which they came."""
    groups: list[list[Evaluation]] = []
    for one in found:
        key = {name: one["identity"][name] for name in ("cache", "shards")}
        same = (group for group in groups if {name: group[0]["identity"][name] for name in key} == key)
        group = next(same, None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    return groups


def _table(group: Sequence[Evaluation]) -> Table:
    table = Table()
    table.add_column("")
    for one in group:
        table.add_column(escape(one["name"]), justify="right", overflow="fold")
    table.add_row("type", *(escape(str(one["type"])) for one in group))
    table.add_row("hook point", *(escape(", ".join(one["hooks"])) for one in group))
    table.add_row("d_sae", *(f"{one['d_sae']:,}" for one in group))
    table.add_row("rows", *(f"{one['n_rows']:,}" for one in group), end_section=True)
    for name, form in METRICS.items():
        _add(table, name, form, [one["metrics"] for one in group])
    if any(one["losses"] for one in group):
        _add(table, "loss", "{:.4f}", [one["losses"] or {} for one in group])
    if any(one["downstream"] for one in group):
        table.add_section()
        for name, form in DOWNSTREAM.items():
            _add(table, name, form, [one["downstream"] or {} for one in group])
    return table


def _add(table: Table, name: str, form: str, numbers: Sequence[Mapping[str, float | None]]) -> None:
    """A row, unless none of the SAEs has the metric."""
    if any(name in each for each in numbers):
        cells = (
            "" if name not in each else "n/a" if each[name] is None else form.format(each[name]) for each in numbers
        )
        table.add_row(name, *cells)
