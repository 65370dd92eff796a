"""JSON and safetensors files; an unreadable file raises NotAnSAEError with its name."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sae_granary.common.errors import one_line
from sae_granary.common.files import read_regular
from sae_granary.common.signed import parse_object, short
from sae_granary.sae_core.errors import NonFiniteError, NotAnSAEError

T = TypeVar("T")

CHECKSUM = "sha256"
FLOATING = {torch.float32, torch.float64, torch.float16, torch.bfloat16}
KEPT_FLOAT32 = ("threshold",)  # SAELens keeps it so beside bfloat16 weights (SAELens#728)


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


def entry(body: Mapping[str, Any], name: str, kind: type[T], default: T | None = None) -> T:
    """Return an entry of exactly this type (True is not an integer), or the default if absent. Raises NotAnSAEError."""
    value = body.get(name, default)
    if type(value) is not kind:
        raise NotAnSAEError(f"{name} is {short(value)}, expected {kind.__name__}")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors by name with their checksum in the header's metadata; return the checksum."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    checksum = checksum_of(tensors)
    # One entry: of several the order is random, and the same weights must give the same bytes.
    # Written through open(): safetensors' own writer makes files that only their owner can read.
    path.write_bytes(save_tensors(tensors, {CHECKSUM: checksum}))
    return checksum


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError, with the names of the tensors, if weights hold NaN or Inf."""
    if found := _non_finite(tensors):
        raise NonFiniteError(f"NaN or Inf in {', '.join(found)}")


def _non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]


def read_tensors(path: Path, checksum: str | None = None) -> dict[str, Tensor]:
    """Return tensors by name. Raises NotAnSAEError if there are none, or others than were written.

    A file that we wrote carries its checksum; `checksum` is what the file that describes it says.
    """
    try:
        data = read_regular(path)
        tensors: dict[str, Tensor] = load_tensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except FileNotFoundError:
        raise NotAnSAEError(f"{path} is missing") from None
    except (OSError, SafetensorError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise NotAnSAEError(f"{path} is not a readable safetensors file: {one_line(error)}") from error
    expected = {header.get("__metadata__", {}).get(CHECKSUM), checksum} - {None}
    if expected and expected != {checksum_of(tensors)}:
        raise NotAnSAEError(f"{path} does not hold what was written (its checksum differs): restore it from a copy")
    return tensors


def checksum_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return tensors of exactly these names and shapes as float32.

    They must have one floating dtype (thresholds may be float32 beside it), which is converted before anything is
    computed, and finite values. Raises NotAnSAEError.
    """
    unfit = "the weights do not fit their configuration:"
    if tensors.keys() != shapes.keys():
        raise NotAnSAEError(f"{unfit} they are {_named(tensors)}, expected {_named(shapes)}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise NotAnSAEError(f"{unfit} {name} is {tuple(tensors[name].shape)}, expected {tuple(shape)}")
    dtypes = {t.dtype for name, t in tensors.items() if name not in KEPT_FLOAT32 or t.dtype != torch.float32}
    if len(dtypes) > 1 or not dtypes <= FLOATING:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise NotAnSAEError(f"the weights are {found}: expected one of float32, float64, float16, bfloat16 for all")
    converted = {name: tensor.float() for name, tensor in tensors.items()}
    if damaged := _non_finite(converted):
        raise NotAnSAEError(f"NaN or Inf in {', '.join(damaged)}")
    return converted


def check_size(config: Any, tensors: Iterable[Tensor]) -> None:
    """Refuse a configuration with more weights than the file holds, before allocation. Raises NotAnSAEError."""
    held, d_sae = sum(tensor.numel() for tensor in tensors), config.d_sae
    needed = {"d_in": config.d_in * d_sae, "d_out": (getattr(config, "d_out", None) or 0) * d_sae}
    needed["n_hooks"] = config.d_in * (getattr(config, "n_hooks", None) or 0)
    for name, count in needed.items():
        if count > held:
            found = f"{name}={short(getattr(config, name))} and d_sae={short(d_sae)}"
            raise NotAnSAEError(f"{found} need more weights than the {held:,} in the file")


def _named(names: Iterable[str]) -> str:
    return short(", ".join(sorted(names)))
