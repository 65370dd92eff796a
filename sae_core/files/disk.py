"""JSON and safetensors on disk; what cannot be read is a NotAnSAEError that names the file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sae_granary.common.files import read_regular
from sae_granary.common.signed import parse_object
from sae_granary.sae_core.errors import NonFiniteError, NotAnSAEError


def write_json(path: Path, value: Mapping[str, Any]) -> Path:
    """Write a JSON object and return its path."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object. Raises NotAnSAEError if there is none."""
    try:
        return parse_object(read_regular(path), allow_nan=True)
    except FileNotFoundError:
        raise NotAnSAEError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise NotAnSAEError(f"{path} cannot be read: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write tensors by name and return the path."""
    # Written through open(): safetensors' own writer makes files that only their owner can read.
    path.write_bytes(save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))
    return path


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that must not be written. Raises NonFiniteError with the names of those that hold NaN or Inf."""
    if found := [name for name, t in tensors.items() if not bool(t.isfinite().all())]:
        raise NonFiniteError(f"NaN or Inf in {', '.join(found)}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return tensors by name. Raises NotAnSAEError if there are none."""
    try:
        tensors: dict[str, Tensor] = load_tensors(read_regular(path))
    except FileNotFoundError:
        raise NotAnSAEError(f"{path} is missing") from None
    except (OSError, SafetensorError) as error:
        raise NotAnSAEError(f"{path} is not a readable safetensors file: {error}") from error
    return tensors
