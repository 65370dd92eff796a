"""The Zarr v3 metadata of a cache, and the small arrays that follow from its description."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sae_granary.cache.format.layout import AFFINE, LITTLE, NORMS, VECTORS, ArrayLayout, CacheLayout
from sae_granary.cache.format.signed import FORMAT


def group_json(attributes: Mapping[str, Any], consolidated: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Zarr v3 metadata of a group."""
    body: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}
    if consolidated is not None:
        body["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": dict(consolidated)}
    return body


def zarr_files(layout: CacheLayout, n_shards: int) -> dict[str, bytes]:
    """Path -> content of every zarr.json, and of the steps and offsets where the dtype has them.

    The root repeats the metadata of the others, so that listing it opens no other file.
    """
    nodes: dict[str, dict[str, Any]] = {group: group_json({}) for group in layout.groups}
    nodes |= {array.path: array.zarr_json(n_shards) for array in layout.arrays}
    chunks: dict[str, bytes] = {}
    for hook, array in layout.activations.items() if layout.scales else ():
        nodes |= {f"{AFFINE}/{hook}/{name}": _vector_json(array.width or 1) for name in VECTORS}
    for hook, affine in (layout.affines or {}).items():
        values = (affine.step_D, affine.offset_D)
        chunks |= {f"{AFFINE}/{hook}/{v}/c.0": x.astype("<f4").tobytes() for v, x in zip(VECTORS, values, strict=True)}
    files = {f"{path}/zarr.json": node for path, node in nodes.items()}
    files["zarr.json"] = group_json({"format": FORMAT, "version": layout.version}, dict(sorted(nodes.items())))
    return {path: json.dumps(node, indent=1).encode() + b"\n" for path, node in files.items()} | chunks


def _vector_json(width: int) -> dict[str, Any]:
    """Zarr v3 metadata of a float32 vector in one chunk."""
    whole = ArrayLayout("", NORMS, None, width, width).zarr_json(1)
    return whole | {"codecs": [LITTLE], "dimension_names": ["d_in"]}
