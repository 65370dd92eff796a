"""Folders that an earlier version wrote open as before: tests/data/saes holds one of each kind, with what it gave.

They were written before the files became the adapters' business: inference form, native form and sparsify's.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_granary import sae_core
from sae_granary.sae_core import SAE

SAES = Path(__file__).parent / "data" / "saes"
FOLDERS = sorted(folder for kind in ("inference", "native", "sparsify") for folder in SAES.glob(f"*/{kind}"))


def load(folder: Path) -> SAE:
    return sae_core.load_native(folder).eval() if folder.name == "native" else sae_core.load(folder)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: "-".join(folder.parts[-2:]))
def test_a_folder_gives_what_it_gave(folder: Path) -> None:
    expected = load_file(folder.parent / "expected.safetensors")
    x = {name.removeprefix("in."): rows for name, rows in expected.items() if name.startswith("in.")}
    with torch.no_grad():
        out = load(folder)(x)
    norm = out.x.norm(dim=1).max()
    assert float((out.x_hat - expected["x_hat"]).norm(dim=1).max() / norm) < 1e-5
    assert torch.equal(out.codes.dense() != 0, expected["codes"] != 0)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: "-".join(folder.parts[-2:]))
def test_the_same_files_are_written_again(folder: Path, tmp_path: Path) -> None:
    sae = load(folder)
    if folder.name == "native":
        sae_core.save_native(sae, tmp_path)
    elif folder.name == "sparsify":
        sae_core.save_sparsify(sae, tmp_path)
    else:
        sae_core.save(sae, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in folder.iterdir())
    for file in folder.glob("*.safetensors"):
        before, after = load_file(file), load_file(tmp_path / file.name)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_the_native_form_folds_into_the_inference_form(tmp_path: Path) -> None:
    for native in SAES.glob("*/native"):
        out = tmp_path / native.parent.name
        sae_core.save(sae_core.load_native(native), out)
        for file in (native.parent / "inference").glob("*.safetensors"):
            before, after = load_file(file), load_file(out / file.name)
            assert all(torch.equal(before[name], after[name]) for name in before), native
