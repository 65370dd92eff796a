"""Shuffling a stream of records through a buffer."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from sae_granary.harvest.config import TextConfig
from sae_granary.harvest.text.document import Record


def shuffled(records: Iterable[Record], buffer_size: int, seed: int) -> Iterator[Record]:
    """Draw from a buffer that is filled up again; a function of the records, the size and the seed only."""
    if buffer_size < 2:
        yield from records
        return
    draw = random.Random(seed)
    buffer: list[Record] = []
    for record in records:
        if len(buffer) < buffer_size:
            buffer.append(record)
            continue
        index = draw.randrange(buffer_size)
        buffer[index], record = record, buffer[index]
        yield record
    draw.shuffle(buffer)
    yield from buffer


def shuffle_name(config: TextConfig) -> str:
    """How the stream is shuffled, for the fingerprint."""
    return f"buffer {config.shuffle_buffer}, seed {config.shuffle_seed}" if config.shuffle_buffer > 1 else "none"
