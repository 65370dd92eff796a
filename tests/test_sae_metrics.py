"""Streaming metrics against one-line formulas on all rows at once."""

import pytest
import torch

from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.metrics import Evaluator, decoder_max_cosine


def test_metrics_do_not_depend_on_the_batches_and_equal_the_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 5, generator=generator) + 1000.0  # a large mean: fvu must not cancel
    x_hat = x + 0.1 * torch.randn(90, 5, generator=generator)
    acts = torch.relu(torch.randn(90, 7, generator=generator) - 1)
    results = []
    for size in (90, 20):
        evaluator = Evaluator(5, 7)
        for start in range(0, 90, size):
            rows = slice(start, start + size)
            evaluator.update(x[rows], x_hat[rows], Codes.from_dense(acts[rows]))
        results.append(evaluator.result())
    assert results[0] == pytest.approx(results[1])

    x, x_hat = x.double(), x_hat.double()
    fvu = float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    assert results[0]["fvu"] == pytest.approx(fvu, rel=1e-9)
    assert results[0]["explained_variance"] == pytest.approx(1 - fvu)
    assert results[0]["mse"] == pytest.approx(float((x - x_hat).square().sum(1).mean()))
    assert results[0]["l0"] == pytest.approx(float((acts != 0).sum(1).double().mean()))
    assert results[0]["cosine"] == pytest.approx(float(torch.cosine_similarity(x, x_hat).mean()))


def test_rare_and_never_fired_are_two_numbers() -> None:
    acts = torch.zeros(4000, 3)
    acts[:, 0] = 1.0
    acts[0, 1] = 1.0  # fires once in 4000 rows: rare, but not silent
    evaluator = Evaluator(2, 3)
    evaluator.update(torch.randn(4000, 2), torch.randn(4000, 2), Codes.from_dense(acts))
    assert evaluator.densities().tolist() == [1.0, 1 / 4000, 0.0]
    assert evaluator.result()["rare"] == pytest.approx(2 / 3)
    assert evaluator.result()["never_fired"] == pytest.approx(1 / 3)


def test_decoder_max_cosine_in_chunks() -> None:
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [1.0, 1.0]])
    # largest |cosine| to another row: 1 (row 2), sqrt(1/2) (row 3), 1 (row 0), sqrt(1/2)
    expected = (1 + 0.5**0.5 + 1 + 0.5**0.5) / 4
    assert decoder_max_cosine(W_dec) == pytest.approx(expected)
    assert decoder_max_cosine(W_dec, chunk=3) == pytest.approx(expected)


def test_an_empty_batch_changes_nothing() -> None:
    evaluator = Evaluator(2, 3)
    for n in (0, 5, 0):
        evaluator.update(torch.ones(n, 2).cumsum(0), torch.zeros(n, 2), Codes.from_dense(torch.ones(n, 3)))
    assert evaluator.n_rows == 5
    assert evaluator.result()["fvu"] == evaluator.result()["fvu"]
