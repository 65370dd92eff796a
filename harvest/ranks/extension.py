"""Extend a cache in blocks: its last block is continued where it ended, as another harvest, and more blocks follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sae_granary.cache.format.affine import Affine
from sae_granary.cache.format.layout import blocks_path
from sae_granary.cache.format.manifest import Manifest
from sae_granary.cache.format.records import existing_manifest
from sae_granary.cache.write.committed import Committed
from sae_granary.common.errors import ConfigError
from sae_granary.harvest.prepare import Prepared
from sae_granary.harvest.ranks.blocks import BlockSource, Records, begin_of
from sae_granary.harvest.spec import grown
from sae_granary.harvest.text.document import documents
from sae_granary.models.tokens.contexts import StreamState
from sae_granary.models.tokens.stream import WindowStream, tokenize_stream


@dataclass(frozen=True)
class Begun:
    """What is there before the blocks of a harvest: nothing, or a complete cache that is extended."""

    n_shards: int = 0
    block: int = 0  # the first one that is harvested
    state: StreamState = field(default_factory=StreamState)  # where it continues
    n_rows: int = 0  # of the blocks before it, and their documents and counts of skipped records
    n_docs: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    affines: Mapping[str, Affine] | None = None

    @property
    def folder(self) -> str:
        """Where its blocks are, in the folder of the cache: one for each state of the cache."""
        return blocks_path(self.n_shards)

    def begin_of(self, block: int, block_docs: int) -> StreamState:
        """Where the harvest of a block starts."""
        return self.state if block == self.block and self.n_shards else begin_of(block, block_docs)

    def rows_of(self, block: int) -> int:
        """Rows of a block that are there."""
        return self.state.n_rows if block == self.block else 0


NEW = Begun()


def begun_of(prepared: Prepared) -> Begun:
    """What an extension of the complete cache at `--out` begins with. Raises ConfigError where its text has changed."""
    manifest = existing_manifest(prepared.config.out_path)
    assert manifest is not None
    if grown(prepared, manifest):
        raise ConfigError(
            f"the text of {prepared.config.out_path} has changed since it was harvested, and a cache in blocks is "
            "extended with the rest of the same text only: harvest the new text to another --out"
        )
    records = manifest.shards
    block = records[-1].block or 0
    before = Committed.of(record for record in records if record.block != block)
    state = _end_of(prepared, manifest, block)
    told, counts = manifest.summary or {}, state.skip_counts
    skipped = {f"skipped_{reason}": int(told.get(f"skipped_{reason}", 0)) - n for reason, n in counts.items()}
    return Begun(
        n_shards=len(records), block=block, state=state, n_rows=before.n_rows, n_docs=before.n_documents,
        counts={"repaired": int(told.get("repaired", 0)) - state.repaired, **skipped}, affines=manifest.affines,
    )  # fmt: skip


def _end_of(prepared: Prepared, manifest: Manifest, block: int) -> StreamState:
    """The state of the stream after the last row of a block: its last sort buffer is made again, without the model."""
    mine = Committed.of(record for record in manifest.shards if record.block == block)
    docs = prepared.config.block_docs
    assert docs is not None
    assert mine.cursor is not None
    begin = StreamState.from_ints(dict(mine.cursor.source))
    source = BlockSource(prepared.source, Records(prepared.source), (block + 1) * docs)
    text = tokenize_stream(documents(source, begin.next_doc, prepared.render), prepared.tokenize)
    stream = WindowStream(text, prepared.rules, begin, max_docs=mine.n_documents)
    for _ in stream:
        pass
    return stream.state
