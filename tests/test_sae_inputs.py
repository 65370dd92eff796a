"""What people hand to an SAE: arrays and tensors of any number type and shape are encoded, the rest is one line."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from sae_kit import new

from sae_granary.sae_core import SAE
from sae_granary.sae_core.errors import OptionError

D_IN, D_SAE = 8, 24


def make(name: str = "topk", **options: object) -> SAE:
    return new(name, {"k": 3}, d_in=D_IN, d_sae=D_SAE, **options).eval()


ROWS = torch.randn(6, D_IN, generator=torch.Generator().manual_seed(0)).bfloat16().float()  # exact in every type below


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("normalize", ["dataset", "unit_norm"])
@pytest.mark.parametrize(
    "given",
    [
        ROWS.bfloat16(),
        ROWS.double(),
        ROWS.numpy(),
        ROWS.numpy().astype(np.float64),
        ROWS.numpy().astype(ml_dtypes.bfloat16),
        read_only(ROWS.numpy().astype(ml_dtypes.bfloat16)),  # as a cache gives them; warnings are errors here
        np.asfortranarray(ROWS.numpy()),
        ROWS.numpy()[::-1][::-1],
        ROWS.tolist(),
        ROWS.view(2, 3, D_IN),
        ROWS.view(1, 2, 3, D_IN).numpy(),
    ],
    ids=lambda given: f"{type(given).__name__}-{getattr(given, 'dtype', '')}-{getattr(given, 'ndim', '')}",
)
def test_every_form_of_the_same_rows_has_the_same_codes(given: Any, normalize: str) -> None:
    sae = make(normalize=normalize)
    expected = sae.encode(ROWS).dense()
    assert expected.shape == (6, D_SAE)
    assert torch.equal(sae.encode(given).dense(), expected)
    out = sae(given)
    assert out.x_hat.dtype == out.x.dtype == torch.float32
    assert torch.equal(sae.decode(out.codes, like=given), out.x_hat)


def test_one_row_and_half_precision() -> None:
    sae = make()
    assert torch.equal(sae.encode(ROWS[2]).dense(), sae.encode(ROWS[2:3]).dense())
    assert torch.equal(sae.encode(ROWS.numpy()[2]).dense(), sae.encode(ROWS[2:3]).dense())
    half = ROWS.half()
    assert torch.equal(sae.encode(half).dense(), sae.encode(half.float()).dense())
    assert torch.equal(sae.encode(half.numpy()).dense(), sae.encode(half.float()).dense())
    assert torch.equal(sae.encode(np.arange(D_IN)).dense(), sae.encode(torch.arange(D_IN).float()).dense())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a text", r"rows: a str, expected activations: .* `encode_texts` encodes texts"),
        (["a text", "another"], "rows: a list, expected activations"),
        ([[1.0, 2.0], [1.0]], "rows: a list, expected activations"),
        (None, "rows: a NoneType, expected activations"),
        (np.array(["1.5"] * D_IN), "rows: a ndarray, expected activations"),
        (np.zeros((2, D_IN), complex), "rows: a ndarray, expected activations"),
        (torch.zeros(2, D_IN, dtype=torch.int64), r"rows: torch.int64 of shape \(2, 8\), expected floating rows"),
        (torch.tensor(1.0), r"rows: torch.float32 of shape \(\), expected floating rows"),
        (torch.zeros(2, 5), r"rows: shape \(2, 5\), expected rows of width 8, as \(..., 8\)"),
        (np.zeros((4, 2, 5)), r"rows: shape \(4, 2, 5\), expected rows of width 8"),
        ({"layer_3": torch.zeros(2, 9)}, r"layer_3: shape \(2, 9\), expected rows of width 8"),
    ],
    ids=str,
)
def test_what_is_no_activation_is_one_line(given: Any, message: str) -> None:
    for method in (make().encode, make()):
        with pytest.raises(OptionError, match=message) as caught:
            method(given)
        assert len(str(caught.value).splitlines()) == 1


def test_hook_points_have_widths_of_their_own() -> None:
    sae = make("transcoder", d_out=5)
    sae({"in": torch.zeros(4, D_IN), "out": torch.zeros(4, 5)})
    with pytest.raises(OptionError, match=r"out: shape \(4, 8\), expected rows of width 5"):
        sae({"in": torch.zeros(4, D_IN), "out": torch.zeros(4, D_IN)})
    with pytest.raises(OptionError, match="different numbers of rows"):
        sae({"in": torch.zeros(4, D_IN), "out": torch.zeros(3, 5)})
