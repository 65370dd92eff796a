"""The JSON form of a cache's specification; invalid values are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sae_granary.cache.errors import SpecError
from sae_granary.cache.format.spec import CacheSpec


def plain_spec(spec: CacheSpec) -> CacheSpec:
    """The spec with its JSON as a reader will see it: tuples become lists, keys strings."""
    return replace(
        spec,
        provenance=plain_json(spec.provenance, "provenance"),
        fingerprint=plain_json(spec.fingerprint, "fingerprint"),
    )


def plain_json(part: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of the spec as JSON gives it back. Raises SpecError."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(part), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SpecError(f"{name} must be JSON: {error}") from None
    return plain


def vocabulary_bytes(words: Sequence[str] | None) -> bytes | None:
    """The token strings as a JSON list, one per line."""
    if words is None:
        return None
    if not all(isinstance(word, str) for word in words):
        raise SpecError("vocabulary must hold a string for every token id (an empty one for an id that is not used)")
    return json.dumps(list(words), indent=0).encode() + b"\n"
