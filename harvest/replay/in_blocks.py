"""A cache that was harvested in blocks: each block is a harvest of its own range of documents, and comes again as one.

No sort buffer and no packed context spans two blocks, and cursors count within a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from sae_granary.cache.format.manifest import Manifest, ShardRecord
from sae_granary.cache.format.records import load_records
from sae_granary.cache.write.committed import Committed
from sae_granary.common.rows import DocumentRow, Rows
from sae_granary.harvest.prepare import Prepared
from sae_granary.harvest.ranks.blocks import BlockSource, Records
from sae_granary.harvest.replay.on_rows import AddingWriter
from sae_granary.harvest.replay.one_shard import Unwritten


def of_block(prepared: Prepared, text: Records, records: Sequence[ShardRecord], block: int) -> Prepared:
    """A harvest of the documents of a block again, up to the last one that has rows; `records` are of the cache."""
    docs = prepared.config.block_docs
    assert docs is not None
    n_documents = Committed.of(record for record in records if record.block == block).n_documents
    source = BlockSource(prepared.source, text, (block + 1) * docs)
    return replace(prepared, source=source, config=replace(prepared.config, max_tokens=None, max_docs=n_documents))


def ends_of(manifest: Manifest, block: int) -> tuple[int, ...]:
    """The numbers of documents of a block at which harvests of it ended, where the cache was extended since."""
    mine = [record for record in manifest.shards if record.block == block]
    ends = [
        Committed.of(record for record in mine if record.shard < int(summary["n_shards"])).n_documents
        for summary in manifest.extended
        if any(record.shard < int(summary["n_shards"]) for record in mine)
    ]
    return tuple(dict.fromkeys(ends))


class BlockWriter(Unwritten):
    """Takes the rows of one block for a cache of added hook points, as the writer of a harvest of that block alone."""

    def __init__(self, writer: AddingWriter, committed: Committed) -> None:
        super().__init__(writer.path, committed)
        self._writer, self.layout = writer, writer.layout

    @property
    def n_rows(self) -> int:
        """Rows of all blocks so far, for the progress."""
        return self._writer.n_rows

    @property
    def bytes_written(self) -> int:
        """Bytes of all blocks so far."""
        return self._writer.bytes_written

    def begin_buffer(self, source_state: Mapping[str, int]) -> None:
        """As the writer takes it."""
        self._writer.begin_buffer(source_state)

    def skip(self, n_rows: int) -> None:
        """As the writer takes it."""
        self._writer.skip(n_rows)

    def append(self, rows: Rows, documents: Sequence[DocumentRow] = ()) -> None:
        """As the writer takes it."""
        self._writer.append(rows, documents)


def unfinished_blocks(writer: AddingWriter) -> Iterator[tuple[int, BlockWriter]]:
    """The blocks whose hook points are not all committed yet, each with what takes its rows; one after the other."""
    done = load_records(writer.path, writer.manifest)
    for block, group in groupby(writer.base.records, key=lambda record: record.block or 0):
        records = list(group)
        if records[-1].shard >= len(done):
            writer.begin_block(block)
            yield block, BlockWriter(writer, Committed.of(record for record in done if record.block == block))
            writer.end_block(records[-1])
