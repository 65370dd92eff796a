"""The end of a harvest in blocks: its blocks become one cache, or nothing where there are no rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sae_granary.cache.errors import CacheError
from sae_granary.cache.format.records import remove_contents
from sae_granary.cache.write.blocks import join_blocks, remove_blocks
from sae_granary.common.quantities import counted
from sae_granary.harvest.errors import NoRowsError
from sae_granary.harvest.prepare import Prepared
from sae_granary.harvest.ranks.board import Board
from sae_granary.harvest.ranks.extension import Begun
from sae_granary.harvest.text.document import skipped_counts


def join(prepared: Prepared, board: Board, begun: Begun, folder: Path, is_complete: Callable[[], bool]) -> str:
    """Join the blocks of a board that has ended; what was done, for the log. Raises NoRowsError, CacheError."""
    path, summary = prepared.config.out_path, board.summary()
    blocks = [(block, folder / found.folder) for block, found in board.done if found.n_rows > begun.rows_of(block)]
    if not blocks and begun.n_shards:
        remove_blocks(path)
        return "the text has no further rows"
    if not blocks:
        remove_contents(path, prepared.layout)
        counts = {name.removeprefix("skipped_"): n for name, n in summary.items() if name.startswith("skipped_")}
        raise NoRowsError(prepared.source.name, skipped_counts(counts), prepared.source.columns)
    try:
        join_blocks(path, blocks, summary, begun.n_shards)
    except (CacheError, OSError):
        if not is_complete():
            raise
        return ""  # another process took this one for dead, joined the blocks and removed them
    return f"finished: {summary['n_rows']:,} rows in {counted(len(blocks), 'block')}"
