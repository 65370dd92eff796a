"""The demo text: Python's own help topics, in English."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

from sae_granary.common.rows import Scalar
from sae_granary.harvest.text.document import Record
from sae_granary.models.demo import DEMO


class DemoSource:
    """The topics of `pydoc_data.topics`, one document each, in sorted order."""

    name = DEMO
    seekable = False
    columns: tuple[str, ...] = ()

    @property
    def identity(self) -> Mapping[str, Scalar]:
        """Identity of the text, which changes slightly between Python versions."""
        import xxhash

        text = "\0".join(f"{name}\0{topic}" for name, topic in self._topics())
        return {"dataset": "pydoc_data.topics", "dataset_xxh3": xxhash.xxh3_128_hexdigest(text.encode())}

    def records(self, start: int) -> Iterator[Record]:
        """The topics from index `start` on."""
        for row, (name, topic) in enumerate(islice(self._topics(), start, None), start):
            yield Record(topic, f"pydoc_data.topics:{name}", row, n_bytes=len(topic.encode()))

    def n_bytes(self) -> int | None:
        """Size of all topics in bytes."""
        return sum(len(topic.encode()) for _, topic in self._topics())

    def _topics(self) -> Iterator[tuple[str, str]]:
        from pydoc_data.topics import topics

        yield from sorted(topics.items())
