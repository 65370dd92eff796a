"""Triton kernels against the dense references: on a GPU, or in Triton's interpreter on the CPU (`make kernels`)."""

from collections.abc import Iterator

import pytest
import torch
from sae_kit import new
from torch import Tensor
from triton_kit import DEVICE

from sae_granary.sae_core import Progress, registry
from sae_granary.sae_core.autograd import Centered, decode, encode_at, sum_by_latent
from sae_granary.sae_core.codes import Codes, Pattern
from sae_granary.sae_core.functional import remove_parallel, to_unit_norm
from sae_granary.sae_core.kernels import choose, reference, row_topk, triton_bag, triton_dot
from sae_granary.sae_core.pre_acts import PreActs

N_LATENTS = 40
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},  # the result is rounded once
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
}


def of_lengths(lengths: list[int], seed: int = 0) -> Pattern:
    """Rows with that many entries each; latents repeat."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    indices = torch.randint(N_LATENTS, (len(rows),), generator=generator)
    return Pattern.of_rows(rows, indices, len(lengths), N_LATENTS)


PATTERNS = {
    "random": of_lengths([3, 7, 1, 12, 5]),
    "one entry": of_lengths([0, 1, 0]),
    "nothing": of_lengths([0, 0, 0]),
    "no rows": Pattern.fixed_k(torch.zeros(0, 4, dtype=torch.int64), N_LATENTS),
    "empty rows between long ones": of_lengths([0, 70, 0, 0, 33, 0]),
    "one row holds everything": of_lengths([0, 200, 0]),
    "one latent": Pattern.fixed_k(torch.full((90, 1), 7), N_LATENTS),
    "one latent, repeated": Pattern.fixed_k(torch.full((3, 50), 7), N_LATENTS),
    "k = d_sae": Pattern.fixed_k(torch.arange(N_LATENTS).expand(4, -1), N_LATENTS),
    "k = the chunk": Pattern.fixed_k(torch.arange(48).view(3, 16) % N_LATENTS, N_LATENTS),
    "unsorted": Pattern.fixed_k(torch.tensor([[9, 1, 39, 0], [39, 2, 2, 5]]), N_LATENTS),
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_bag, "CHUNK", 16)
    choose("triton")
    yield
    choose(None)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def check_bag_sum(
    indices: Tensor, offsets: Tensor, table: Tensor, weights: Tensor, dtype: torch.dtype | None = None
) -> None:
    got = [triton_bag.bag_sum(*(t.to(DEVICE) for t in (indices, table, offsets, weights))) for _ in range(2)]
    assert torch.equal(*got)
    assert got[0].dtype == (dtype or table.dtype)
    expected = reference.bag_sum(indices, table.double(), offsets, weights.double())
    torch.testing.assert_close(got[0].cpu().double(), expected, **TOLERANCE[table.dtype])


def check_sampled_dot(pattern: Pattern, rows: Tensor, columns: Tensor, dtype: torch.dtype | None = None) -> None:
    indices, indptr = pattern.entries
    got = [triton_dot.sampled_dot(*(t.to(DEVICE) for t in (rows, columns, indptr, indices))) for _ in range(2)]
    assert torch.equal(*got)
    assert got[0].dtype == (dtype or rows.dtype)
    expected = reference.sampled_dot(rows.double(), columns.double(), indptr, indices)
    torch.testing.assert_close(got[0].cpu().double(), expected, **TOLERANCE[columns.dtype])


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("width", [1, 5, 16, 300])
def test_bags_by_row_and_by_latent(pattern: Pattern, width: int) -> None:
    indices, indptr = pattern.entries
    weights = normal(indices.numel())
    check_bag_sum(indices, indptr, normal(N_LATENTS, width), weights)
    order, rows, offsets = pattern.transposed
    check_bag_sum(rows, offsets, normal(pattern.n_rows, width), weights[order])


@pytest.mark.parametrize("start", range(18))
@pytest.mark.parametrize("length", [14, 15, 16, 17, 31, 32, 33, 48])
def test_a_bag_may_start_anywhere_in_a_chunk(start: int, length: int) -> None:
    indices, indptr = of_lengths([start, length, 3]).entries
    check_bag_sum(indices, indptr, normal(N_LATENTS, 3), normal(indices.numel()))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("width", [1, 5, 16, 300])
def test_dots_at_entries(pattern: Pattern, width: int) -> None:
    check_sampled_dot(pattern, normal(pattern.n_rows, width), normal(N_LATENTS, width))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("other", TOLERANCE, ids=str)
def test_sums_are_at_least_float32(dtype: torch.dtype, other: torch.dtype) -> None:
    pattern = PATTERNS["one latent, repeated"]
    indices, indptr = pattern.entries
    wider = torch.promote_types(dtype, other)
    weights = 0.1 * normal(indices.numel(), dtype=other)
    check_bag_sum(indices, indptr, normal(N_LATENTS, 24, dtype=dtype), weights, wider)
    check_sampled_dot(pattern, normal(3, 24, dtype=other), normal(N_LATENTS, 24, dtype=dtype), wider)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_long_sums_do_not_stall(dtype: torch.dtype) -> None:
    """Counting in bfloat16 ends at 256, in float16 at 2048."""
    n = 4096
    one, ones, zeros = (t.to(DEVICE) for t in (torch.ones(1, 1), torch.ones(n), torch.zeros(n, dtype=torch.int64)))
    assert triton_bag.bag_sum(zeros, one.to(dtype), torch.tensor([0, n], device=DEVICE), ones.to(dtype)).item() == n
    row = torch.ones(1, n, dtype=dtype, device=DEVICE)
    assert triton_dot.sampled_dot(row, row, torch.tensor([0, 1], device=DEVICE), zeros[:1]).item() == n


def test_what_is_not_contiguous() -> None:
    pattern = PATTERNS["random"]
    indices, indptr = pattern.entries
    weights = normal(2 * indices.numel())[::2]
    spread = torch.stack([indices, indices], 1)[:, 0]
    for table in (normal(20, N_LATENTS).t(), normal(N_LATENTS, 40)[:, ::2], normal(2 * N_LATENTS, 20)[::2]):
        check_bag_sum(spread, indptr, table, weights)
        check_sampled_dot(pattern, normal(20, pattern.n_rows).t(), table)
    check_bag_sum(indices, indptr, normal(1, 20).expand(N_LATENTS, -1), normal(1).expand(indices.numel()))


def test_rows_with_weight_zero_are_not_read() -> None:
    table = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")]], device=DEVICE)
    indices, offsets = torch.tensor([0, 1, 0], device=DEVICE), torch.tensor([0, 2, 3], device=DEVICE)
    weights = torch.tensor([3.0, 0.0, 1.0], device=DEVICE)
    assert triton_bag.bag_sum(indices, table, offsets, weights).tolist() == [[3.0, 6.0], [1.0, 2.0]]
    weights[1] = float("nan")
    assert triton_bag.bag_sum(indices, table, offsets, weights).isnan().tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_encoder_and_decoder(pattern: Pattern, dtype: torch.dtype) -> None:
    """Against dense products: the entries of a pattern as a matrix of counts."""
    n, d = pattern.n_rows, 5
    indices, indptr = pattern.entries
    counts = reference.dense_codes(torch.ones(indices.numel(), dtype=torch.float64), indices, indptr, N_LATENTS)
    numbers = normal(n, d), normal(d, N_LATENTS), normal(N_LATENTS), normal(N_LATENTS, d)
    target = normal(n, d, seed=1)

    def outcome(x_hat: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        loss = (x_hat - target.to(x_hat)).square().sum()
        return tuple(t.detach().cpu().double() for t in (x_hat, *torch.autograd.grad(loss, leaves)))

    dense = [t.double().requires_grad_() for t in numbers]
    x, W_enc, b_enc, W_dec = dense
    expected = outcome((torch.relu(x @ W_enc + b_enc) * counts) @ W_dec, dense)

    ours = [t.to(DEVICE, dtype).requires_grad_() for t in numbers]
    x, W_enc, b_enc, W_dec = ours
    on_device = Pattern(n, N_LATENTS, indices.to(DEVICE), indptr.to(DEVICE))
    p = encode_at(Centered(x), W_enc, b_enc, PreActs(x, W_enc, b_enc).at(on_device))
    got = outcome(decode(Codes(torch.relu(p), on_device), W_dec), ours)
    scale = {"rtol": TOLERANCE[dtype]["rtol"]}
    for mine, theirs in zip(got, expected, strict=True):
        atol = scale["rtol"] * max(float(theirs.abs().max()), 1.0) if theirs.numel() else 0.0
        torch.testing.assert_close(mine, theirs, atol=atol, **scale)
    sums = sum_by_latent(torch.ones(indices.numel(), device=DEVICE), on_device)
    assert sums.tolist() == counts.sum(0).tolist()


ONE_HOOK = [name for name in registry.names() if registry.get(name).reads.one_row]


@pytest.mark.parametrize("name", ONE_HOOK)
def test_a_step_of_every_type_is_that_of_the_eager_products(name: str) -> None:
    sae = new(name, {"k": 2, "l0_target": 2}, d_in=6, d_sae=24).to(DEVICE)
    x = normal(12, 6).to(DEVICE)
    sae.initialize(x, torch.Generator(device=DEVICE).manual_seed(0))
    if sae.config.wanted_l0 is None:
        with torch.no_grad():  # few active latents, so that the sparse products are taken
            sae.encoder_bias.sub_(sae.pre_acts(sae.encoder_input(x)).dense.quantile(0.95))
    sae.train()

    def outcome(kernels: str) -> dict[str, Tensor]:
        choose(kernels)
        sae.zero_grad(set_to_none=True)
        losses = sae.losses(sae(x), Progress(5, 10))
        torch.stack(list(losses.values())).sum().backward()
        grads = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
        return {**{name: loss.detach() for name, loss in losses.items()}, **grads}

    torch.testing.assert_close(outcome("triton"), outcome("eager"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 5, 64])
def test_the_largest_of_each_row_on_this_device(ties: bool, k: int) -> None:
    matrix = normal(7, 16 * 64).to(DEVICE)
    matrix = matrix.mul(2).round() if ties else matrix
    columns = row_topk(matrix, k)
    assert all(len(set(row)) == k for row in columns.tolist())
    assert torch.equal(matrix.gather(1, columns).sort(descending=True).values, matrix.topk(k).values)


@pytest.mark.parametrize("width", [1, 5, 300])
def test_unit_rows_and_gradients_without_parallel_parts(width: int) -> None:
    grad, rows = normal(9, width).to(DEVICE), normal(9, width, seed=1).to(DEVICE)
    rows[3] = 0.0
    outcomes = []
    for kernels in ("triton", "eager"):
        choose(kernels)
        unit, projected = rows.clone(), grad.clone()
        to_unit_norm(unit)
        remove_parallel(projected, unit)
        outcomes.append((unit, projected))
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-6)
    assert not outcomes[0][0][3].any()
