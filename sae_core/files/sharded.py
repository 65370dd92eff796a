"""Tensor files of an SAE whose latents are divided over ranks.

Each rank writes its part of a file: `sae-00002-of-00004.safetensors` has the second quarter of the latents. They are
read by any number of ranks, each of which takes its latents from the parts that have them. The inference form is one
file, as of any SAE: rank 0 writes what the others send it, a block at a time.

Shapes: F latents of all ranks.
"""

import hashlib
import json
import re
from collections.abc import Container, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_granary.common.errors import one_line
from sae_granary.sae_core.errors import NotAnSAEError
from sae_granary.sae_core.files.disk import CHECKSUM, read_tensors, write_tensors
from sae_granary.sae_core.ranks.reduce import Alone
from sae_granary.sae_core.ranks.sharded import latent_axis

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.")
BLOCK = 2**22  # entries that are sent and written at a time


def part_name(name: str, shards: Alone) -> str:
    """The name of this rank's part of a file."""
    stem, _, suffix = name.rpartition(".")
    return name if shards.n == 1 else f"{stem}-{shards.index + 1:05}-of-{shards.n:05}.{suffix}"


def part_of(name: str) -> tuple[int, int] | None:
    """(index, n) of a part; None for a file without parts."""
    found = _PART.search(name)
    return None if found is None else (int(found[1]) - 1, int(found[2]))


def has_latents_of(name: str, shards: Alone) -> bool:
    """Whether this rank reads a file: one that has any of its latents, or has no parts."""
    index, n = part_of(name) or (0, 1)
    return index * shards.n < (shards.index + 1) * n and shards.index * n < (index + 1) * shards.n


def parts(folder: Path, name: str) -> list[Path]:
    """The parts of a file in the order of their latents, or the file itself. Raises NotAnSAEError if one is missing."""
    path = folder / name
    found = {p: place for p in sorted(folder.glob(f"{path.stem}-*{path.suffix}")) if (place := part_of(p.name))}
    if path.is_file() or not found:
        return [path]
    if list(found.values()) != [(i, len(found)) for i in range(len(found))]:
        names = ", ".join(p.name for p in found)
        raise NotAnSAEError(f"{folder} does not hold all parts of {name}: found {names}")
    return list(found)


def read_parts(
    folder: Path,
    name: str,
    d_sae: int,
    per_latent: Container[str],
    shards: Alone,
    checksums: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """This rank's latents, of F = d_sae, from a file or its parts. Raises NotAnSAEError for files that lack them."""
    paths = parts(folder, name)
    size, n_own = d_sae // len(paths), d_sae // shards.n
    found: dict[str, list[Tensor]] = {}
    for number, path in enumerate(paths):
        first = shards.index * n_own - number * size
        start, stop = max(first, 0), min(first + n_own, size)
        if start < stop:
            checksum = (checksums or {}).get(path.name)
            for key, tensor in _cut(path, slice(start, stop), size, per_latent, checksum).items():
                found.setdefault(key, []).append(tensor)
    axes = {key: latent_axis(key, tensors[0].ndim, per_latent) for key, tensors in found.items()}
    return {key: t[0] if (axis := axes[key]) is None or len(t) == 1 else torch.cat(t, axis) for key, t in found.items()}


def _cut(path: Path, own: slice, size: int, per_latent: Container[str], checksum: str | None) -> dict[str, Tensor]:
    """Some latents of a part with `size` of them; its checksum is compared where all are read."""
    if own == slice(0, size):
        return read_tensors(path, checksum)
    cut = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                view = file.get_slice(name)
                axis = latent_axis(name, len(view.get_shape()), per_latent)
                cut[name] = file.get_tensor(name) if axis is None else view[own] if axis == 0 else view[:, own]
    except (OSError, SafetensorError) as error:
        raise NotAnSAEError(f"{path} is not a readable safetensors file: {one_line(error)}") from error
    return cut


def write_whole(path: Path, tensors: Mapping[str, Tensor], per_latent: Container[str], shards: Alone) -> str:
    """Write tensors, float32, with the latents of all ranks, as `write_tensors` does; return the checksum.

    Rank 0 writes; no rank holds more than a block of the others' latents.
    """
    if shards.n == 1:
        return write_tensors(path, tensors)
    axes = {name: latent_axis(name, t.ndim, per_latent) for name, t in tensors.items()}
    header: dict[str, object] = {"__metadata__": {CHECKSUM: "0" * 64}}
    shapes, end = {}, 0
    for name, tensor in sorted(tensors.items()):
        shapes[name] = tuple(n * (shards.n if axis == axes[name] else 1) for axis, n in enumerate(tensor.shape))
        start, end = end, end + 4 * torch.Size(shapes[name]).numel()
        header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") if shards.index == 0 else nullcontext() as file:
        if file is not None:
            file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in sorted(tensors.items()):
            assert tensor.dtype == torch.float32
            digest.update(f"{name} {tensor.dtype} {shapes[name]}\n".encode())
            for block in _blocks(tensor.detach(), axes[name], shards):
                if file is not None:
                    values = block.cpu().contiguous().numpy().data
                    digest.update(values)
                    file.write(values)
        checksum = shards.texts(digest.hexdigest())[0]
        if file is not None:
            file.seek(8)
            file.write(text.replace(b"0" * 64, checksum.encode()))
    return checksum


def _blocks(tensor: Tensor, axis: int | None, shards: Alone) -> Iterator[Tensor]:
    """The entries of a tensor of all ranks, in order; every rank gets them."""
    if axis is None:
        yield tensor
        return
    step = max(1, BLOCK // max(1, tensor[:1].numel()))
    for rank in range(shards.n if axis == 0 else 1):
        for start in range(0, len(tensor), step):
            part = tensor[start : start + step].contiguous()
            if axis == 0:
                block = part.clone()
                shards.broadcast([block], source=rank)
                yield block
            else:
                yield torch.cat([other.view_as(part) for other in shards.gather(part.reshape(-1))], dim=axis)
