"""Finding the model that a cache was harvested from, by the harvest's record of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sae_granary.common.errors import one_line
from sae_granary.common.files import home_path
from sae_granary.models.demo import DEMO, DEMO_MODEL_ID, demo_folder, demo_model_path
from sae_granary.models.device.placement import Placement
from sae_granary.models.errors import ModelError, SpliceError
from sae_granary.models.locate import Located, is_path, read_configs, weights_hash
from sae_granary.models.online import quiet


def remedy(option: str = "--lm") -> str:
    """What to do if the recorded model is missing; `option` is the flag for another location."""
    return f"name its hub id or folder with {option}"


def check_recorded_weights(located: Located, record: Mapping[str, Any], option: str = "--lm") -> str | None:
    """The hash of a local model's weights, None of a hub model's. Raises SpliceError for others than were harvested."""
    found, wanted = weights_hash(located) if located.is_local else None, record.get("weights_xxh3")
    if wanted and found and found != wanted:
        raise SpliceError(
            f"{located.source} has other weights ({found}) than the model that the cache was harvested from "
            f"({wanted}): {remedy(option)}, or harvest again"
        )
    return found


def locate_recorded(record: Mapping[str, Any], lm: str | None, option: str = "--lm") -> Located:
    """The folder or hub model, in the revision that was harvested; the local copy of a hub model if there is one.

    `lm`, given by the flag `option`, names another place: a folder, a hub id, or demo.
    Raises ModelError, a SpliceError for a model that is missing or that the record does not name.
    """
    if lm is None and record.get("id") is None:
        raise SpliceError(f"the cache names no model that its rows came from (imported vectors?); {remedy(option)}")
    model_id = str(record.get("id"))
    was_local = lm is None and record.get("weights_xxh3") is not None
    name = _demo_or(lm, model_id, option, was_local=was_local) or model_id
    wanted = f"the model {name!r}" + ("" if name != model_id or lm else " that the cache was harvested from")
    folder = home_path(name)
    is_local = folder.is_dir()
    if not is_local and (is_path(name) or was_local):
        raise SpliceError(f"{wanted} is not there: no such folder; {remedy(option)}")
    quiet()
    located = Located(
        name,
        model_id,
        str(folder) if is_local else name,
        revision=record.get("revision") if name == model_id else None,
        subfolder="" if is_local else record.get("subfolder") or "",
        local_only=True,
        placement=Placement.of(record),
    )
    try:
        return read_configs(located)
    except ModelError as error:
        problem = error
    if not is_local:
        try:
            return read_configs(replace(located, local_only=False))
        except ModelError as error:
            problem = error
    raise SpliceError(f"{wanted} cannot be found ({one_line(problem.__cause__ or problem)}); {remedy(option)}")


def _demo_or(lm: str | None, model_id: str, option: str, *, was_local: bool) -> str | None:
    """The folder that `lm` means: `demo`, or nothing said about a cache that was harvested from it. Else `lm`."""
    if lm == DEMO:
        return str(demo_model_path(option))
    folder = demo_folder() if was_local and model_id == DEMO_MODEL_ID else None
    return str(folder) if folder is not None else lm
