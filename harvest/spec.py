"""What a cache records about its harvest: what determines its contents, and where they come from."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any, cast

from sae_granary.cache.format.manifest import Manifest
from sae_granary.cache.format.records import existing_manifest, has_records
from sae_granary.cache.format.spec import CacheSpec, Unit
from sae_granary.harvest.prepare import Prepared
from sae_granary.models.config_files import config_hash
from sae_granary.models.load import model_record
from sae_granary.models.locate import weights_hash
from sae_granary.models.tokens.tokenizer import tokenizer_hash
from sae_granary.models.tokens.vocabulary import vocabulary

_LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "sentence-transformers", "numpy", "zarr")

# Keys of the fingerprint that caches of earlier versions may lack, in words; a missing key is not compared.
_LATER = {"model_config_xxh3": "model configuration", "dataset_full_xxh3": "hash of the whole text"}


# Of a local text that a cache is extended with: more of it may have come since. What was harvested is compared.
_GROWS = ("dataset_xxh3", "dataset_full_xxh3")
GROWN = "grown"  # in provenance.dataset: what of them the last extension found


def cache_spec(prepared: Prepared) -> CacheSpec:
    """The specification of the cache. Hashes all files of a local model, and local text."""
    out = prepared.config.out_path
    have = existing_manifest(out)
    kept = have if have is not None and (have.complete or has_records(out)) else None
    determined_by = {
        key: value
        for key, value in fingerprint(prepared).items()
        if kept is None or key not in _LATER or key in kept.fingerprint
    }
    if kept is not None and kept.complete:
        known = (kept.provenance.get("dataset") or {}).get(GROWN)
        found = grown(prepared, kept)
        if found == known or prepared.config.extend:
            determined_by |= {key: kept.fingerprint[key] for key in found}
    return CacheSpec(
        unit=cast(Unit, prepared.unit),
        hook_points=tuple(hook.point() for hook in prepared.hooks),
        dtype=prepared.dtype,
        rows_per_shard=prepared.rows_per_shard,
        provenance=provenance(prepared, determined_by),
        fingerprint=determined_by,
        vocabulary=vocabulary(prepared.tokenizer) if prepared.unit == "token" else None,
        kept_columns=prepared.config.text.keep_columns,
        block_docs=prepared.config.block_docs,
    )


def grown(prepared: Prepared, manifest: Manifest) -> dict[str, Any]:
    """Hashes of a local text that differ from those of the cache: more text may have come, or other text."""
    have, source = manifest.fingerprint, prepared.source.identity
    if source["dataset"] != "files":  # others are not compared from their first document on
        return {}
    return {key: source[key] for key in _GROWS if key in have and source[key] != have[key]}


def extended_provenance(prepared: Prepared, manifest: Manifest) -> dict[str, Any]:
    """Where a cache that was extended comes from: as before, and which version of a local text it now ends in."""
    dataset = dict(manifest.provenance.get("dataset") or {})
    if found := grown(prepared, manifest):
        dataset[GROWN] = found
    return {**manifest.provenance, "dataset": dataset}


def not_recorded(manifest: Manifest) -> str:
    """What determines the rows of a cache but was not recorded when it was begun; empty if all was."""
    have = manifest.fingerprint
    expected = {"model_config_xxh3": have.get("weights_xxh3"), "dataset_full_xxh3": have.get("dataset") == "files"}
    return " and ".join(_LATER[key] for key, wanted in expected.items() if wanted and key not in have)


def fingerprint(prepared: Prepared) -> dict[str, str | int | bool | None]:
    """What determines the contents, flat. The extent (`--max-tokens`, `--max-docs`) does not belong to it."""
    model, located = _model_record(prepared), prepared.located
    weights = weights_hash(located) if located.is_local else None
    configs = config_hash(located)
    return {
        "model": model["id"],
        "model_revision": model["revision"],
        "weights_xxh3": weights,
        **({"model_config_xxh3": configs} if configs is not None else {}),  # else the revision tells
        "tokenizer_xxh3": tokenizer_hash(prepared.tokenizer) if prepared.tokenizer is not None else None,
        "unit": prepared.unit,
        "hook_points": ", ".join(hook.name for hook in prepared.hooks),
        "dtype": prepared.dtype,
        "compute_dtype": prepared.compute_dtype,
        "device": prepared.device.split(":")[0],  # a GPU and a CPU round differently
        "ctx_len": prepared.rules.ctx_len if prepared.unit == "token" else prepared.located.max_seq_length,
        "prefix": " ".join(map(str, prepared.rules.prefix)),
        "suffix": " ".join(map(str, prepared.rules.suffix)),
        "separator": prepared.rules.separator,
        "batch_tokens": prepared.batch_tokens,
        "buffer_tokens": prepared.buffer_tokens,
        "rows_per_shard": prepared.rows_per_shard,
        **_compiled(prepared),  # it rounds differently
        **prepared.located.placement.record(),
        **_prompted(prepared),
        **_loaded_with(prepared),
        **_in_blocks(prepared),
        **prepared.source.identity,
    }


def provenance(prepared: Prepared, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Where the cache comes from, given its fingerprint; no clock and no host name."""
    tokens = prepared.config.tokens
    return {
        "model": _model_record(prepared) | {"weights_xxh3": fingerprint["weights_xxh3"]},
        "tokenizer": {
            "id": prepared.located.model_id,
            "class": type(prepared.tokenizer).__name__ if prepared.tokenizer is not None else None,
            "xxh3": fingerprint["tokenizer_xxh3"],
            "special_ids": sorted(prepared.rules.special_ids),
            "control_ids": sorted(prepared.rules.control_ids),
        },
        "dataset": {"name": prepared.source.name, **prepared.source.identity},
        "windows": {
            "ctx_len": fingerprint["ctx_len"],
            "bos": tokens.bos,
            "pack": tokens.pack,
            "prefix": list(prepared.rules.prefix),
            "suffix": list(prepared.rules.suffix),
            "separator": prepared.rules.separator,
            **_prompted(prepared),
        },
        "compute": {
            "dtype": prepared.compute_dtype,
            "device": prepared.device.split(":")[0],
            "batch_tokens": prepared.batch_tokens,
            "buffer_tokens": prepared.buffer_tokens,
            **_compiled(prepared),
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
    }


def as_begun(prepared: Prepared, provenance: Mapping[str, Any]) -> Prepared:
    """With the flags of the cache that is continued: one begun before FLAG_CONTROL records no control tokens."""
    if "control_ids" in (provenance.get("tokenizer") or {}):
        return prepared
    return replace(prepared, rules=replace(prepared.rules, control_ids=frozenset()))


def _model_record(prepared: Prepared) -> dict[str, Any]:
    """The record of the model in provenance."""
    return model_record(prepared.located, prepared.model_class, prepared.n_layers)


def _compiled(prepared: Prepared) -> dict[str, bool]:
    """An entry only where it was asked for: without it a cache says what it said before there was `--compile`."""
    return {"compile": True} if prepared.config.model.compile else {}


def _in_blocks(prepared: Prepared) -> dict[str, int]:
    """Documents of a block, where there are blocks: no sort buffer and no packed context spans two of them."""
    docs = prepared.config.block_docs
    return {} if docs is None else {"block_docs": docs}


def _prompted(prepared: Prepared) -> dict[str, str]:
    """The prompt in front of every text, where the model has one; `encode` of --unit text adds it by itself."""
    prompt = prepared.located.prompt
    return {"prompt": prompt} if prompt and prepared.unit == "token" else {}


def _loaded_with(prepared: Prepared) -> dict[str, str]:
    """Arguments that a Sentence-Transformer gives to its config, weights and tokenizer; before, they were left out."""
    kwargs = {kind: values for kind, values in prepared.located.kwargs.items() if values}
    return {"loaded_with": json.dumps(kwargs, sort_keys=True)} if kwargs and prepared.unit == "token" else {}
