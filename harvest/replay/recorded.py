"""The settings of a harvest, from what its cache records: to harvest the same rows again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_granary.cache.convert import CONVERTED
from sae_granary.cache.format.manifest import Manifest
from sae_granary.common.errors import ConfigError
from sae_granary.harvest.config import HarvestConfig, TextConfig
from sae_granary.harvest.errors import HarvestError
from sae_granary.harvest.prepare import Prepared
from sae_granary.harvest.spec import fingerprint, grown
from sae_granary.models.config import ModelConfig, TokenConfig, WhereConfig
from sae_granary.models.demo import DEMO, DEMO_MODEL_ID


def recorded_config(
    path: Path,
    manifest: Manifest,
    where: WhereConfig,
    out: Path,
    *,
    model: str | None = None,
    dataset: str | None = None,
    device: str | None = None,
) -> HarvestConfig:
    """The config that gives the rows of a complete cache again, at other hook points; `out` is where they go.

    `model` and `dataset` are where these are now, if they were moved. Raises ConfigError for a cache that does not
    record its harvest.
    """
    told, provenance = manifest.fingerprint, manifest.provenance
    windows, summary = provenance.get("windows"), manifest.summary or {}
    if not isinstance(windows, Mapping) or "n_documents" not in summary or "buffer_tokens" not in told:
        raise ConfigError(f"{path} does not record how it was harvested, as caches of sae-harvest do")
    record = manifest.model
    shuffle = re.fullmatch(r"buffer (\d+), seed (-?\d+)", str(told.get("shuffle")))
    of_tokens = manifest.unit == "token"
    return HarvestConfig(
        model=ModelConfig(
            model or _model_name(record),
            None if record.get("weights_xxh3") else record.get("revision"),
            trust_remote_code=bool(record.get("trust_remote_code")),
            compute_dtype=str(told["compute_dtype"]),
            device=device or str(told["device"]),
            compile=bool(told.get("compile", False)),
            device_map=told.get("device_map"),
            load_in=told.get("load_in"),
        ),
        where=where,
        text=TextConfig(
            dataset or _dataset_name(provenance),
            dataset_config=told.get("dataset_config"),
            split=told.get("split"),
            dataset_revision=told.get("dataset_revision"),
            text_columns=tuple(filter(None, str(told.get("text_columns", "")).split(","))),
            keep_columns=manifest.kept_columns,
            documents=str(told.get("documents", "auto")),
            shuffle_buffer=int(shuffle[1]) if shuffle else 0,
            shuffle_seed=int(shuffle[2]) if shuffle else 0,
        ),
        tokens=TokenConfig(
            ctx_len=windows.get("ctx_len") if of_tokens else None,
            bos=windows.get("bos") if of_tokens else None,
            pack=bool(windows.get("pack")),
            batch_tokens=int(told["batch_tokens"]),
        ),
        out=out,
        dtype=manifest.dtype,
        max_docs=int(summary["n_documents"]),
        rows_per_shard=manifest.rows_per_shard,
        block_docs=manifest.block_docs,
    )


def _model_name(record: Mapping[str, Any]) -> str:
    is_demo = record.get("id") == DEMO_MODEL_ID and record.get("weights_xxh3") is not None
    return DEMO if is_demo else str(record.get("id"))


def _dataset_name(provenance: Mapping[str, Any]) -> str:
    dataset = provenance.get("dataset") or {}
    names = {"pydoc_data.topics": DEMO, "standard input": "-"}
    kind = str(dataset.get("dataset"))
    return names.get(kind, str(dataset.get("name")) if kind == "files" else kind)


def recorded_where(manifest: Manifest) -> WhereConfig:
    """The hook points of a cache as they are named for a harvest."""
    if manifest.unit == "text":
        return WhereConfig(unit="text")
    layers = [hook for hook in manifest.hook_points if re.fullmatch(r"layer_\d+", hook.name)]
    modules = [hook for hook in manifest.hook_points if hook not in layers]
    return WhereConfig(
        layers=tuple(int(hook.name.removeprefix("layer_")) for hook in layers),
        hooks=tuple(hook.module + (":in" if hook.side == "input" else "") for hook in modules),
    )


def refuse_other_source(path: Path, prepared: Prepared, manifest: Manifest) -> None:
    """Raise HarvestError where the model, the text or a setting is not what a cache records, with what differs.

    A local text that has grown is not refused: its rows are compared one by one.
    """
    have, now = manifest.fingerprint, fingerprint(prepared)
    if CONVERTED in have:
        raise HarvestError(
            f"{path} was converted from a cache of {have[CONVERTED]}: its rows do not come from a model; "
            "do this to that cache, and convert it again"
        )
    same = {"hook_points", *grown(prepared, manifest)}
    if have.get("weights_xxh3") and have["weights_xxh3"] == now["weights_xxh3"]:
        same.add("model")  # it was moved
    differing = [
        f"{name}: the cache has {have.get(name)!r}, now it is {now.get(name)!r}"
        for name in {**have, **now}
        if name not in same and name in have and have[name] != now.get(name)
    ]
    if differing:
        raise HarvestError(
            f"{path} was harvested with other settings, from another model or text: {'; '.join(differing)}; give what "
            "the cache has (--model and --dataset name a new place of it), or harvest a new cache"
        )


def refuse_other_batching(manifest: Manifest, prepared: Prepared) -> None:
    """Raise HarvestError where the loaded model needs other batches than those whose rows are stored."""
    begun = (manifest.provenance.get("compute") or {}).get("batching", "padded")
    if begun != prepared.batching:
        raise HarvestError(
            f"the rows were computed in {begun} batches, {prepared.located.name} now needs {prepared.batching} ones:"
            " use the versions of torch and transformers that the cache records"
        )
