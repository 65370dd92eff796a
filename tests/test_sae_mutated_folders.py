"""2,000 mutated SAE folders: each is refused in one line, is the SAE that it was, or says that it is another."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mutations import mutate_bytes, mutate_value
from sae_kit import new
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_granary import sae_core
from sae_granary.sae_core import SAE
from sae_granary.sae_core.errors import NotAnSAEError

D_IN, D_SAE, K, PER_KIND = 6, 16, 3, 250
HOOKS = ("layer_1", "layer_2")
# Entries of files without checksums that say what is computed.
SHAPE = ("architecture", "normalize_activations", "k", "transcode", "skip_connection", "signed", "expansion_factor")
OLDER = ("activation_fn", "activation_fn_str", "activation_fn_kwargs", "format", "type", "config")
MEANING = (*SHAPE, *OLDER, "apply_b_dec_to_input", "rescale_acts_by_decoder_norm")


def make(name: str, **options: object) -> SAE:
    sae = new(name, {"k": K}, d_in=D_IN, d_sae=D_SAE, **options)
    sae.initialize(inputs(sae), torch.Generator().manual_seed(1))
    return sae.eval()


def inputs(sae: SAE) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = {hook: torch.randn(40, D_IN, generator=generator) + 1.0 for hook in HOOKS}
    return rows if sae.reads.several else {"layer_1": rows["layer_1"]}


def ours(name: str, **options: object) -> Callable[[Path], object]:
    return lambda folder: sae_core.save(make(name, **options), folder, {"model_name": "toy", "seed": [1, 2.5, None]})


def of_before(folder: Path) -> None:
    """Format 1: no checksums."""
    ours("topk")(folder)
    record = json.loads((folder / "granary.json").read_text())
    del record["sha256"]
    (folder / "granary.json").write_text(json.dumps({**record, "format": 1}))
    without_checksum(folder / "sae_weights.safetensors")


def saelens(name: str, **options: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        ours(name, **options)(folder)
        (folder / "granary.json").unlink()
        without_checksum(folder / "sae_weights.safetensors")

    return write


def sparsify(folder: Path) -> None:
    sae_core.save_sparsify(make("skip_transcoder"), folder)
    without_checksum(folder / "sae.safetensors")


def without_checksum(path: Path) -> None:
    save_file(load_file(path), path)


# What is written, what reads it, whether checksums cover every byte.
KINDS: dict[str, tuple[Callable[[Path], object], Callable[[Path], SAE], bool]] = {
    "topk": (ours("topk"), sae_core.load, True),
    "route": (ours("route", n_hooks=2, base="batchtopk"), sae_core.load, True),
    "skip_transcoder": (ours("skip_transcoder"), sae_core.load, True),
    "native": (
        lambda folder: sae_core.save_native(make("jumprelu", l0_target=4.0), folder),
        sae_core.load_native,
        True,
    ),
    "format 1": (of_before, sae_core.load, False),
    "saelens gated": (saelens("gated", normalize="unit_norm"), sae_core.load, False),
    "saelens topk": (saelens("topk"), sae_core.load, False),
    "sparsify": (sparsify, sae_core.load, False),
}


def result(sae: SAE) -> list[Tensor]:
    with torch.no_grad():
        out = sae(inputs(sae))
    return [out.x_hat, out.codes.dense()]


def mutate(path: Path, content: bytes, chance: random.Random, *, whole: bool) -> bytes:
    """Another content; of tensors without a checksum only the header, since no reader can see flipped values."""
    if path.suffix == ".json":
        return mutate_bytes(content, chance) if chance.random() < 0.5 else _mutated_json(content, chance)
    end = 8 + int.from_bytes(content[:8], "little")
    if whole and chance.random() < 0.5:
        return mutate_bytes(content, chance)
    return mutate_bytes(content[:end], chance) + content[end:]


def _mutated_json(content: bytes, chance: random.Random) -> bytes:
    return json.dumps(mutate_value(json.loads(content), chance)).encode()


def meaning(folder: Path) -> list[object]:
    """What the JSON of a folder says that it computes."""
    found = next(path for name in ("granary.json", "cfg.json") if (path := folder / name).is_file())
    body = json.loads(found.read_bytes())
    return [body.get(name, "absent") for name in MEANING]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_folder_is_refused_or_the_same(kind: str, tmp_path: Path) -> None:
    write, read, signed = KINDS[kind]
    write(tmp_path)
    files = sorted(path for path in tmp_path.iterdir() if not (signed and path.name == "cfg.json"))
    chance = random.Random(len(kind))
    expected, said = result(read(tmp_path)), None if signed else meaning(tmp_path)
    one_line: list[bool] = []
    for i in range(PER_KIND):
        path = chance.choice(files)
        content = path.read_bytes()
        path.write_bytes(mutate(path, content, chance, whole=signed))
        try:
            found = result(read(tmp_path))
        except NotAnSAEError as error:
            one_line.append(len(str(error).splitlines()) == 1)
        else:
            is_same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert is_same or (said is not None and meaning(tmp_path) != said), (kind, i, path.name)
        path.write_bytes(content)
    assert len(one_line) > PER_KIND / 4
    assert all(one_line)
