"""Sparse products against dense ones: values and every gradient, on codes that are easy to get wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sae_granary.sae_core.autograd import Centered, center, decode, empty_encoder, encode_at, per_entry, sum_by_latent
from sae_granary.sae_core.codes import Codes, Pattern
from sae_granary.sae_core.kernels import bag_sum, reference, sampled_dot, sparse, true_entries
from sae_granary.sae_core.pre_acts import PreActs

# (N, F) masks of stored entries
PATTERNS = {
    "some": torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [1, 1, 0, 1, 0]]).bool(),
    "empty row": torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool(),
    "nothing": torch.zeros(3, 5).bool(),
    "everything": torch.ones(3, 5).bool(),
    "one latent": torch.tensor([[0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0]]).bool(),
}


def params(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    W_enc = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    b_enc = torch.randn(5, generator=generator, dtype=torch.float64)
    W_dec = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return tuple(tensor.requires_grad_() for tensor in (x, W_enc, b_enc, W_dec))


@pytest.mark.parametrize("mask", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("full", [False, True])
def test_encode_and_decode_equal_the_dense_products_in_values_and_gradients(mask: torch.Tensor, full: bool) -> None:
    target = torch.arange(12, dtype=torch.float64).view(3, 4)

    def gradients(x_hat: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        grads = torch.autograd.grad((x_hat - target).square().sum(), leaves, allow_unused=True)
        return tuple(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True))

    dense = params()
    x, W_enc, b_enc, W_dec = dense
    expected = ((x @ W_enc + b_enc) * mask) @ W_dec

    ours = params()
    x, W_enc, b_enc, W_dec = ours
    pattern = Pattern(3, 5) if full else Pattern.of_mask(mask)
    p = encode_at(Centered(x), W_enc, b_enc, PreActs(x, W_enc, b_enc).at(pattern))
    codes = Codes(p * mask if full else p, pattern)
    x_hat = decode(codes, W_dec)

    torch.testing.assert_close(x_hat, expected)
    torch.testing.assert_close(gradients(x_hat, ours), gradients(expected, dense))


@pytest.mark.parametrize("threshold", [-9.0, 0.5, 2.0, 9.0])
def test_entries_that_are_stored_at_zero_change_nothing(threshold: float) -> None:
    def outcome(x_hat: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return x_hat, *torch.autograd.grad((x_hat - 1).square().sum(), leaves)

    dense = params()
    x, W_enc, b_enc, W_dec = dense
    expected = outcome(torch.relu(x @ W_enc + b_enc - threshold) @ W_dec, dense)
    ours = params()
    x, W_enc, b_enc, W_dec = ours
    pattern = Pattern.of_mask(PATTERNS["everything"])
    p = encode_at(Centered(x), W_enc, b_enc, PreActs(x, W_enc, b_enc).at(pattern))
    torch.testing.assert_close(outcome(decode(Codes(torch.relu(p - threshold), pattern), W_dec), ours), expected)


@pytest.mark.parametrize("mask", PATTERNS.values(), ids=PATTERNS.keys())
def test_sparse_products_equal_their_dense_references(mask: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    pattern = Pattern.of_mask(mask)
    indices, indptr = pattern.entries
    table = torch.randn(5, 4, generator=generator)
    rows = torch.randn(3, 4, generator=generator)
    weights = torch.randn(indices.numel(), generator=generator)

    expected = reference.bag_sum(indices, table, indptr, weights)
    torch.testing.assert_close(bag_sum(indices, table, indptr, weights), expected)
    expected = reference.sampled_dot(rows, table, indptr, indices)
    torch.testing.assert_close(sampled_dot(rows, table, indptr, indices), expected)
    # The path of devices without a sampled product.
    monkeypatch.setattr(sparse, "_has_sampled_product", lambda rows: False)
    monkeypatch.setattr(sparse, "GATHER_CHUNK", 2)
    torch.testing.assert_close(sampled_dot(rows, table, indptr, indices), expected)


def test_sampled_dot_keeps_the_order_of_unsorted_entries() -> None:
    rows, columns = torch.eye(2), torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    indices, indptr = torch.tensor([2, 0, 1, 0]), torch.tensor([0, 2, 4])
    assert sampled_dot(rows, columns, indptr, indices).tolist() == [3.0, 1.0, 20.0, 10.0]


@pytest.mark.parametrize("mask", PATTERNS.values(), ids=PATTERNS.keys())
def test_per_entry_spreads_and_sum_by_latent_gathers(mask: torch.Tensor) -> None:
    per_latent = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64, requires_grad=True)
    pattern = Pattern.of_mask(mask)
    spread = per_entry(per_latent, pattern)
    assert spread.tolist() == pattern.take(per_latent.detach().expand(3, 5)).tolist()
    spread.sum().backward()
    counts = mask.sum(0).double()
    torch.testing.assert_close(per_latent.grad, counts)
    torch.testing.assert_close(sum_by_latent(torch.ones_like(spread), pattern).detach(), counts)


def test_the_encoder_gradient_has_the_strides_of_the_parameter() -> None:
    W_enc = torch.nn.Parameter(torch.nn.init.normal_(empty_encoder(4, 5)))
    x = torch.randn(3, 4)
    pattern = Pattern.of_mask(PATTERNS["some"])
    encode_at(Centered(x), W_enc, torch.zeros(5), PreActs(x, W_enc, torch.zeros(5)).at(pattern)).sum().backward()
    assert W_enc.grad is not None
    assert W_enc.grad.stride() == W_enc.stride() == (1, 4)


def test_codes_count_and_slice() -> None:
    acts = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 4.0]])
    for codes in (Codes.from_dense(acts), Codes(acts, Pattern(3, 4))):
        assert torch.equal(codes.dense(), acts)
        assert codes.l0() == pytest.approx(4 / 3)
        assert codes.fired().tolist() == [1, 1, 0, 2]
        assert torch.equal(codes.rows(1, 3).dense(), acts[1:])


def test_a_stored_zero_is_not_active() -> None:
    codes = Codes(torch.tensor([0.0, 2.0]), Pattern.fixed_k(torch.tensor([[3, 1]]), 4))
    assert codes.l0() == 1.0
    assert codes.fired().tolist() == [0, 1, 0, 0]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 33), st.floats(0, 1), st.integers(0, 2**16))
def test_true_entries_are_those_of_nonzero(n: int, m: int, share: float, seed: int) -> None:
    mask = torch.rand(n, m, generator=torch.Generator().manual_seed(seed)) < share
    assert torch.equal(true_entries(mask), mask.reshape(-1).nonzero().squeeze(1))
    assert torch.equal(true_entries(mask.t()), mask.t().reshape(-1).nonzero().squeeze(1))


@pytest.mark.parametrize("rows_learn", [False, True])
def test_gradients_of_centered_rows_and_their_center(rows_learn: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    x, b, W, b_enc = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((6, 3), (3,), (3, 8), (8,)))
    pattern = Pattern.fixed_k(torch.tensor([[0, 5], [1, 2], [0, 7], [3, 4], [6, 7], [0, 1]]), 8)
    slopes = torch.randn(12, generator=generator, dtype=torch.float64)
    outcomes = []
    for ours in (True, False):
        leaves = [t.clone().requires_grad_() for t in (b, W, b_enc)]
        rows = x.clone().requires_grad_(rows_learn)
        dense = (rows - leaves[0]) @ leaves[1] + leaves[2]
        kept = Codes(pattern.take(dense.detach()), pattern)
        p = encode_at(center(rows, leaves[0]), leaves[1], leaves[2], kept) if ours else pattern.take(dense)
        (p * slopes).sum().backward()
        outcomes.append([leaf.grad for leaf in (*leaves, *([rows] if rows_learn else []))])
    torch.testing.assert_close(*outcomes)


def test_codes_share_no_indptr_with_later_ones() -> None:
    columns = torch.tensor([[0, 2], [1, 3]])
    Pattern.fixed_k(columns, 4).entries[1].add_(1)
    assert Pattern.fixed_k(columns, 4).entries[1].tolist() == [0, 2, 4]


def test_a_fake_tensor_leaves_nothing_behind() -> None:
    columns = torch.tensor([[0, 2], [1, 3]])
    with FakeTensorMode() as mode:
        Pattern.fixed_k(mode.from_tensor(columns), 4).transposed  # noqa: B018
    assert all(type(part) is Tensor for part in Pattern.fixed_k(columns, 4).transposed)
