"""Codes pooled per document, by hand and against the dense matrix."""

import numpy as np
import pytest

from sae_granary.analyze.encoding.blocks import CodeBlock, is_ascending
from sae_granary.analyze.encoding.pool import pool_documents
from sae_granary.analyze.settings import POOLINGS


def block_of(dense: np.ndarray, doc_ids, special=None) -> CodeBlock:
    rows, latents = np.nonzero(dense)
    counts = np.bincount(rows, minlength=len(dense))
    special = np.zeros(len(dense), bool) if special is None else np.array(special)
    values = dense[rows, latents].astype(np.float32)
    return CodeBlock(counts, latents.astype(np.int32), values, np.array(doc_ids), special)


def dense_of(blocks, d_sae: int) -> tuple[list[int], np.ndarray]:
    parts, doc_ids = [], []
    for block in blocks:
        out = np.zeros((len(block.counts), d_sae))
        out[np.repeat(np.arange(len(out)), block.counts), block.indices] = block.values
        assert (block.values != 0).all()
        parts.append(out)
        doc_ids += block.doc_ids.tolist()
    return doc_ids, np.concatenate(parts)


def strongest(matrix: np.ndarray, axis: int) -> np.ndarray:
    return np.take_along_axis(matrix, np.abs(matrix).argmax(axis)[None], axis)[0]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("max", [[3, -2, 0], [-2, 0, 0], [0, 0, 0]]),  # of largest magnitude
        ("mean", [[2, -1, 0], [-1.5, 0, 0], [0, 0, 0]]),
        ("sum", [[4, -2, 0], [-3, 0, 0], [0, 0, 0]]),
    ],
)
def test_pooling_by_hand(how: str, expected: list[list[float]]) -> None:
    dense = np.array([[9, 9, 9], [1, -2, 0], [3, 0, 0], [-1, 0, 0], [-2, 0, 0], [0, 0, 0]])
    special = [True, False, False, False, False, False]
    block = block_of(dense, [4, 4, 4, 7, 7, 9], special)
    doc_ids, found = dense_of(pool_documents([block], 3, how), 3)
    assert doc_ids == [4, 7, 9]
    assert found.tolist() == expected


@pytest.mark.parametrize("how", POOLINGS)
@pytest.mark.parametrize("size", [1, 7, 64, 200])
def test_pooling_in_blocks_is_that_of_the_dense_matrix(how: str, size: int) -> None:
    generator = np.random.default_rng(0)
    dense = generator.normal(size=(200, 10)) * (generator.random((200, 10)) < 0.3)
    doc_ids = np.sort(generator.integers(0, 25, 200)) * 3
    special = generator.random(200) < 0.1
    cuts = [slice(start, start + size) for start in range(0, 200, size)]
    blocks = (block_of(dense[cut], doc_ids[cut], special[cut]) for cut in cuts)
    found_ids, found = dense_of(pool_documents(blocks, 10, how), 10)
    assert found_ids == np.unique(doc_ids).tolist()
    reduce = {"max": strongest, "mean": np.mean, "sum": np.sum}[how]
    expected = [reduce(dense[(doc_ids == i) & ~special].astype(np.float32), axis=0) for i in found_ids]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_no_rows_give_no_documents() -> None:
    assert list(pool_documents([], 3, "max")) == []
    assert (is_ascending(np.array([1, 1, 2])), is_ascending(np.array([1, 0])), is_ascending(np.array([]))) == (
        True, False, True,
    )  # fmt: skip
