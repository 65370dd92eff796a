"""Steps and offsets of a dtype with scales, of a cache in blocks: fitted to the first rows of its text, once for all.

Whoever begins a block first harvests the first sort buffer of the text for that, and publishes what it found in
`blocks/affine.json`. The same rows give the same numbers, so that it does not matter who does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sae_granary.cache.format.affine import Affine, affines_json, parse_affine
from sae_granary.cache.format.signed import Fields, dump_signed
from sae_granary.cache.write.calibrate import fit_rows
from sae_granary.cache.write.committed import Committed
from sae_granary.common.files import write_first
from sae_granary.common.rows import DocumentRow, Rows
from sae_granary.harvest.pipeline import Model, Pipeline
from sae_granary.harvest.prepare import Prepared
from sae_granary.harvest.progress import Progress, RunLog
from sae_granary.harvest.ranks.blocks import BlockSource, Records, begin_of
from sae_granary.harvest.replay.one_shard import Unwritten
from sae_granary.harvest.replay.stream import Replay

_FILE = "affine.json"


class _FirstRows(Unwritten):
    """Keeps the rows of the first sort buffer."""

    rows: Rows | None = None

    def append(self, rows: Rows, documents: Sequence[DocumentRow] = ()) -> None:
        if self.rows is None:
            self.rows = rows


def shared_affines(
    folder: Path, prepared: Prepared, model: Model, log: RunLog, say: Callable[[str], None], check: Callable[[], None]
) -> Mapping[str, Affine] | None:
    """The steps and offsets of this cache, by hook point; None where its text has no rows.

    Raises StorageLossError where the dtype would lose too much, or the first block has too few rows to tell.
    """
    place = folder / _FILE
    if not place.exists():
        rows = _first_rows(prepared, model, log, check)
        if rows is None:
            return None
        affines, warnings = fit_rows(rows.activations, prepared.layout)
        for warning in warnings:
            say(f"warning: {warning}")
            log.write(f"warning: {warning}")
        write_first(place, dump_signed({"affine": affines_json(affines)}))
    fields = Fields.of_file(place, "remove it, and run the same command again", signed_since=1)
    return fields.mapping("affine", parse_affine)


def _first_rows(prepared: Prepared, model: Model, log: RunLog, check: Callable[[], None]) -> Rows | None:
    """The rows of the first sort buffer of the first block that has any."""
    docs, text, block = prepared.config.block_docs, Records(prepared.source), 0
    assert docs is not None
    with Progress(prepared.unit, None, quiet=True) as silent:
        while True:
            source = BlockSource(prepared.source, text, (block + 1) * docs)
            taker = _FirstRows(prepared.config.out_path, Committed())
            taker.layout = prepared.layout
            replay = Replay(until=1, compare=False, begin=begin_of(block, docs))
            pipeline = Pipeline(replace(prepared, source=source), model, taker, silent, log, check, replay)
            pipeline.fill()
            if taker.rows is not None or pipeline.state.next_doc < (block + 1) * docs:
                return taker.rows
            block += 1
