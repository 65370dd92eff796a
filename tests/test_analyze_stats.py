"""`sae-analyze stats` and `show`: numbers of each latent against a dense reference, examples spread over documents."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_kit import invoke, refused
from sae_kit import saved

from sae_granary.analyze.cli import app
from sae_granary.analyze.commands.shared import echo_line
from sae_granary.analyze.encoding import blocks as blocks_module
from sae_granary.analyze.encoding.encode import encode_cache
from sae_granary.analyze.errors import DamagedCodesError, MismatchError
from sae_granary.analyze.latents import coactive as coactive_module
from sae_granary.analyze.latents.coactive import coactive, sample_size, spread
from sae_granary.analyze.latents.latent_stats import Examples, bin_of, nearest_neighbors, quantile
from sae_granary.analyze.latents.quantile_examples import QuantileExamples, interval_of
from sae_granary.analyze.latents.search import pool_latent
from sae_granary.analyze.latents.show import Marked, latent_lines, marked, summary_lines
from sae_granary.analyze.latents.stats import blocks_of, compute_stats, find_stats, read_stats
from sae_granary.analyze.source import Source, open_source
from sae_granary.cache.read.context import Context
from sae_granary.common.errors import ConfigError
from sae_granary.common.lock import FolderLock, LockedError
from sae_granary.common.rows import FLAG_SPECIAL
from sae_granary.common.signed import write_signed

D_SAE = 24


@pytest.fixture
def source(make_cache, tmp_path: Path) -> Source:
    """A cache of 40 documents and a topk SAE with random weights, of which latent 5 never fires."""
    folder = saved(tmp_path / "sae", d_sae=D_SAE, silent=[5])
    return open_source(folder, make_cache(n_docs=40), device="cpu")


def test_bins_and_quantiles_by_hand() -> None:
    assert bin_of(np.array([2.0**-12, 1e-9, 1.0, 2.0, 1e9])).tolist() == [0, 0, 96, 104, 191]
    histogram = np.zeros((2, 192), np.int64)
    histogram[0, [96, 104]] = 3, 1  # three activations of 1, one of 2
    assert quantile(histogram, 0.5).tolist() == [2 ** (1 / 8), 0.0]
    assert quantile(histogram, 1.0).tolist() == [2 ** (9 / 8), 0.0]


def test_position_0_of_a_causal_model_is_left_out_as_training_does(make_cache, source: Source) -> None:
    causal = open_source(source.folder, make_cache("causal", n_docs=40, decoder=True, with_special=False), device="cpu")
    flags, position = causal.cache.column("flags")[:], causal.cache.column("position")[:]
    kept = (flags & FLAG_SPECIAL == 0) & (position != 0)
    assert (position[flags & FLAG_SPECIAL == 0] == 0).any()
    codes = encode_cache(causal, causal.place / "codes")
    found = compute_stats(causal, codes)
    assert found.n_rows == kept.sum()
    assert found.fired.tolist() == (codes.dense()[kept] != 0).sum(0).tolist()
    latent = int(found.fired.argmax())
    pooled = pool_latent(causal.cache, codes, latent, "sum")
    assert pooled.pooled.sum() == pytest.approx(codes.dense()[kept, latent].sum(), rel=1e-5)
    assert summary_lines(causal.cache, found)[0].endswith("(special tokens and position 0 left out)")
    assert summary_lines(source.cache, found)[0].endswith("(special tokens left out)")


def test_examples_by_hand() -> None:
    def update(examples: Examples, *entries: tuple[int, float, int, int]) -> None:
        latent, value, row, document = (np.array(column) for column in zip(*entries, strict=True))
        examples.update(latent, value.astype(np.float32), row, document, 3)

    examples = Examples(2)
    update(examples, (0, 1.0, 0, 7), (0, 3.0, 1, 7), (2, -5.0, 1, 7), (0, 2.0, 2, 8), (0, 2.0, 3, 8))
    rows, values = examples.tables(3)
    assert rows.tolist() == [[1, 2], [-1, -1], [1, -1]]
    assert values.tolist() == [[3.0, 2.0], [0.0, 0.0], [-5.0, 0.0]]
    update(examples, (0, 2.0, 4, 9), (0, 4.0, 5, 8), (1, 1.0, 5, 8))  # the equal one is too late
    assert examples.tables(3)[0].tolist() == [[5, 1], [5, -1], [1, -1]]


def test_neighbors_by_hand() -> None:
    latents, cosines = nearest_neighbors(torch.tensor([[1.0, 0.0], [3.0, 3.0], [0.0, 2.0]]), 5, chunk=2)
    assert latents.tolist() == [[1, 2], [0, 2], [1, 0]] or latents.tolist() == [[1, 2], [2, 0], [1, 0]]
    np.testing.assert_allclose(cosines, [[0.5**0.5, 0], [0.5**0.5, 0.5**0.5], [0.5**0.5, 0]], atol=1e-6)


def test_intervals_and_their_examples_by_hand() -> None:
    magnitudes = np.array([0.1, 0.2, 0.3, 0.99, 1.0])
    assert interval_of(magnitudes, np.ones(5)).tolist() == [0, 1, 1, 4, 4]
    examples = QuantileExamples(np.array([10.0, 0.0, 4.0], np.float32))
    latent, value = np.array([0, 0, 2]), np.array([10.0, 1.5, -3.0], np.float32)
    examples.update(latent, value, np.array([4, 5, 5]), np.array([1, 1, 1]))
    rows, values = examples.tables()
    assert rows.tolist() == [[5, -1, -1, -1, 4], [-1] * 5, [-1, -1, -1, 5, -1]]
    assert values[0].tolist() == [1.5, 0, 0, 0, 10.0]
    assert values[2].tolist() == [0, 0, 0, -3.0, 0]


def test_examples_of_intervals_come_from_the_cache_from_different_documents_in_any_blocks() -> None:
    rng = np.random.default_rng(0)
    n, n_latents = 6000, 20
    largest = np.ones(n_latents, np.float32)
    latent, value = rng.integers(0, n_latents, n), rng.random(n).astype(np.float32)
    row, document = np.arange(n), np.arange(n) // 100

    def chosen(size: int) -> tuple[list[list[int]], np.ndarray]:
        examples = QuantileExamples(largest)
        for start in range(0, n, size):
            part = slice(start, start + size)
            examples.update(latent[part], value[part], row[part], document[part])
        rows, values = examples.tables()
        np.testing.assert_array_equal(values, value[rows])
        return rows.tolist(), rows

    whole, rows = chosen(n)
    assert whole == chosen(70)[0]
    np.testing.assert_array_equal(latent[rows], [[i] * 5 for i in range(n_latents)])
    np.testing.assert_array_equal(np.floor(value[rows] * 5), [range(5)] * n_latents)
    assert [len(set(document[found])) for found in rows] == [5] * n_latents
    assert len({found // 2000 for found in rows.ravel()}) == 3  # from everywhere


def test_coactive_latents_by_hand() -> None:
    row, latent = np.array([0, 0, 0, 1, 1, 2, 3]), np.array([0, 1, 3, 0, 1, 0, 2])  # row 3: latent 2 alone
    latents, scores = coactive(row, latent, 5, 2)
    assert latents.tolist() == [[1, 3], [0, 3], [-1, -1], [1, 0], [-1, -1]]
    np.testing.assert_allclose(scores, [[2 / 3, 1 / 3], [2 / 3, 1 / 2], [0, 0], [1 / 2, 1 / 3], [0, 0]], rtol=1e-6)


def test_rows_of_a_sample_are_evenly_spread_and_fewer_where_many_latents_are_active() -> None:
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(3, 4).tolist() == [0, 1, 2]
    assert spread(0, 4).tolist() == []
    assert sample_size(16.0 * 8, 8) == 8  # four latents on each of eight rows: 16 pairs each
    assert sample_size(16.0 * 10**6, 10**6) == 2**14
    assert sample_size(1000.0**2 * 10**6, 10**6) == 2**29 // 1000**2
    assert sample_size(0.0, 0) == 0


@pytest.mark.parametrize("n_sampled", [50, 10**6])
def test_coactivation_is_that_of_the_dense_codes(source: Source, tmp_path: Path, monkeypatch, n_sampled) -> None:
    monkeypatch.setattr(blocks_module, "BLOCK_ROWS", 100)
    monkeypatch.setattr(coactive_module, "MAX_ROWS", n_sampled)
    monkeypatch.setattr(coactive_module, "BLOCK_COUNTS", 100)  # four latents at once, or fewer
    monkeypatch.setattr(coactive_module, "BLOCK_PAIRS", 300)
    codes = encode_cache(source, tmp_path / "codes")
    found = compute_stats(source, codes)
    active = codes.dense()[source.cache.column("flags")[:] & FLAG_SPECIAL == 0] != 0
    active = active[spread(len(active), n_sampled)].astype(np.float64)
    assert found.coactive_rows == len(active) <= n_sampled
    both = active.T @ active
    index = both / np.maximum(both.diagonal()[:, None] + both.diagonal() - both, 1)
    np.fill_diagonal(index, 0)
    expected = np.argsort(-index, axis=1, kind="stable")[:, :5]
    scores = np.take_along_axis(index, expected, 1)
    np.testing.assert_array_equal(found.coactive, np.where(scores > 0, expected, -1))
    np.testing.assert_allclose(found.coactive_score, scores, rtol=1e-6)


def test_statistics_are_those_of_the_dense_codes(source: Source, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(blocks_module, "BLOCK_ROWS", 100)
    monkeypatch.setattr(blocks_module, "BLOCK_ENTRIES", 301)
    codes = encode_cache(source, tmp_path / "codes")
    found = compute_stats(source, codes, n_examples=3)
    assert max(len(block.value) for block in blocks_of(source, codes)) <= 301
    plain = source.cache.column("flags")[:] & FLAG_SPECIAL == 0
    rows, document = np.flatnonzero(plain), source.cache.column("doc_id")[:]
    dense = codes.dense()[plain].astype(np.float64)
    assert 0 < len(rows) < len(codes)
    assert found.n_rows == len(rows)
    np.testing.assert_array_equal(found.fired, (dense != 0).sum(0))
    np.testing.assert_allclose(found.density, (dense != 0).mean(0))
    np.testing.assert_array_equal(found.largest, dense.max(0).astype(np.float32))
    assert (found.fired[5], found.mean[5], found.example_rows[5].tolist()) == (0, 0.0, [-1, -1, -1])
    for latent in range(D_SAE):
        values = dense[:, latent]
        active = values[values != 0]
        if not len(active):
            continue
        np.testing.assert_allclose(found.mean[latent], active.mean(), rtol=1e-6)
        exact = np.quantile(active, 0.9, method="inverted_cdf")
        assert exact <= quantile(found.histogram, 0.9)[latent] * (1 + 1e-6) <= exact * 1.0906
        intervals = np.minimum(np.floor(active / active.max() * 5), 4)
        for interval, row in enumerate(found.quantile_rows[latent].tolist()):
            assert (row >= 0) == (interval in intervals)
            if row >= 0:
                assert min(int(codes.dense(row, row + 1)[0, latent] / active.max() * 5), 4) == interval
                np.testing.assert_allclose(found.quantile_values[latent, interval], dense[rows == row, latent])
        seen: dict[int, tuple[int, float]] = {}
        for i in np.argsort(-values, kind="stable"):
            if values[i] != 0:
                seen.setdefault(int(document[rows[i]]), (int(rows[i]), values[i]))
        expected = list(seen.values())[:3]
        kept = found.example_rows[latent] >= 0
        assert found.example_rows[latent][kept].tolist() == [row for row, _ in expected]
        np.testing.assert_allclose(found.example_values[latent][kept], [value for _, value in expected])


def test_statistics_are_stored_and_only_their_own_are_read(source: Source, make_cache) -> None:
    first = find_stats(source, lambda: encode_cache(source, source.place / "codes"))
    again = find_stats(source, lambda: pytest.fail("encoded again"))
    assert again.logit_tokens_top is None
    for name, value in vars(first).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    other = open_source(source.folder, make_cache("other", n_docs=40, seed=1), device="cpu")
    assert other.place != source.place
    with pytest.raises(MismatchError, match="seed 0, expected seed 1"):
        read_stats(source.place / "stats", other.identity)
    with (source.place / "stats" / "stats.npz").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(DamagedCodesError, match="is not what was written"):
        read_stats(source.place / "stats", source.identity)


def test_statistics_that_another_process_computes_are_not_disturbed(source: Source) -> None:
    lock = FolderLock(source.place / ".stats.lock")
    codes = encode_cache(source, source.place / "codes")
    lock.acquire()
    with pytest.raises(LockedError):
        find_stats(source, lambda: codes)
    lock.release()
    assert find_stats(source, lambda: codes).n_rows > 0


def test_stored_statistics_of_an_older_format_are_computed_again(source: Source) -> None:
    first = find_stats(source, lambda: encode_cache(source, source.place / "codes"))
    record = source.place / "stats" / "stats.json"
    body = json.loads(record.read_text())
    del body["xxh3"]
    write_signed(record, {**body, "format": 1})
    with pytest.raises(DamagedCodesError, match="format is 1, expected 3"):  # never read as what it is not
        read_stats(record.parent, source.identity)
    again = find_stats(source, lambda: encode_cache(source, source.place / "codes"))
    np.testing.assert_array_equal(again.quantile_rows, first.quantile_rows)
    assert json.loads(record.read_text())["format"] == 3


def test_the_token_of_an_example_is_marked() -> None:
    context = Context(7, (6, 7, 8), ("the", "cat", "##s"), 1, "the cats", None)
    assert marked(context) == ("the ", "cat", "s")
    assert str(marked(context)) == "the [[cat]]s"
    assert str(marked(Context(7, (6, 7, 8), ("the", "cat", "##s"), 2, "", None))) == "the cat[[s]]"
    byte_level = ("\u0120a", "\u0120d", "ouble", "\u010a", "star")
    lines = [str(marked(Context(i, tuple(range(5)), byte_level, i, "", None))) for i in range(5)]
    assert lines == [
        "[[a]] double star",
        "a [[d]]ouble star",
        "a d[[ouble]] star",
        "a double[[\\n]]star",
        "a double [[star]]",
    ]
    pieces = ("\u2581a", "\u2581d", "ouble")
    assert str(marked(Context(7, (6, 7, 8), pieces, 2, "", None))) == "a d[[ouble]]"
    assert marked(Context(7, (7,), ("cat",), 0, "cat", None)) == ("", "cat", "")
    assert marked(Context(0, (0,), (), -1, "a whole\n text", None)) == "a whole text"


def test_a_latent_is_shown_and_one_that_is_not_there_refused(source: Source) -> None:
    found = find_stats(source, lambda: encode_cache(source, source.place / "codes"))
    lines = list(map(str, latent_lines(source.cache, found, 3, top=4)))
    top, weak = int(found.example_rows[3, 0]), int(found.quantile_rows[3, 0])
    assert lines[0].startswith(f"latent 3: active on {found.fired[3]:,} of {found.n_rows:,} rows")
    partner = f"active on the same rows: {found.coactive[3, 0]} ({found.coactive_score[3, 0]:.2f}), "
    assert lines[3].startswith(partner)
    assert lines[3].endswith(f"(Jaccard index over {found.n_rows:,} rows)")
    assert lines[4] == "strongest:"
    assert f"[[{source.cache.token(top)}]]" in lines[5]
    assert lines[5].endswith(f"({source.cache.document(top).source})")
    assert lines[9] == f"by share of the maximum, {found.largest[3]:.3g}:"
    assert lines[10].startswith(f"   0-20%  {found.quantile_values[3, 0]:.3f}  ")
    assert f"[[{source.cache.token(weak)}]]" in lines[10]
    assert len(lines) == 15
    assert not any("logits" in line for line in lines)
    assert list(latent_lines(source.cache, found, 5)) == [f"latent 5: active on 0 of {found.n_rows:,} rows (0.000%)"]
    with pytest.raises(ConfigError, match="--latent is 24, expected 0 to 23"):
        next(latent_lines(source.cache, found, 24))
    for wrong in (0, 11):
        with pytest.raises(ConfigError, match=f"--top is {wrong}, expected 1 to 10"):
            next(latent_lines(source.cache, found, 3, top=wrong))


HOSTILE = "a\x1b[2J\x1b]0;owned\x07\nlatent 3: forged\r\u202e\x9b31m"


def test_a_token_is_in_color_on_a_terminal_and_hostile_text_is_inert_there(monkeypatch) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()

    def line() -> str:
        """What was written, which the system may pass on a moment later."""
        data = b""
        while not data.endswith(b"\n"):
            data += os.read(ours, 4096)
        return data.decode()

    monkeypatch.delenv("NO_COLOR", raising=False)
    with os.fdopen(theirs, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        echo_line(Marked("b ", "cat", " a"))
        colored = line()
        echo_line(Marked(f"b {HOSTILE}", HOSTILE, HOSTILE))
        hostile = line()
        patch.setenv("NO_COLOR", "1")
        echo_line(Marked("b ", "cat", " a"))
        plain = line()
    os.close(ours)
    assert colored == "b \x1b[33m\x1b[1mcat\x1b[0m a\r\n"
    assert plain.replace("\x1b[0m", "") == "b [[cat]] a\r\n"
    assert hostile.count("\\x1b[2J\\x1b]0;owned\\x07") == 3
    controls = re.findall("[\x00-\x1f\x7f-\x9f\u202e]", hostile)
    assert controls == ["\x1b", "\x1b", "\x1b", "\r", "\n"]  # our colors, one line


def test_hostile_tokens_sources_and_columns_are_shown_in_one_line_without_control_characters(
    make_cache, source
) -> None:
    columns, words = {"category": (HOSTILE,)}, [f"{i}{HOSTILE}" for i in range(200)]
    shown = []
    for name, kept in (("hostile", None), ("columns", columns)):
        cache = make_cache(name, n_docs=12, source=HOSTILE, columns=kept, vocabulary=words)
        given = [str(source.folder), "--cache", str(cache), "--device", "cpu"]
        done = invoke(app, "show", *given, "--latent", "3", "--top", "2")
        shown.append(done.output)
    inert = "a\\x1b[2J\\x1b]0;owned\\x07 latent 3: forged \\u202e\\x9b31m"
    assert f"({inert})" in shown[0]
    assert "(category=a\\x1b[2J\\x1b]0;owned" in shown[1]
    for output in shown:
        assert re.search(rf"\[\[\d+{re.escape(inert)}]]", output)
        assert re.findall("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", output) == []
        assert sum(line.startswith("latent 3") for line in output.splitlines()) == 1


def test_the_commands_encode_where_codes_are_missing(source: Source) -> None:
    given = [source.folder, "--cache", source.cache.path, "--device", "cpu"]
    assert "never fired  1 of 24 latents" in invoke(app, "stats", *given).output
    shown = invoke(app, "show", *given, "--latent", "3")
    assert shown.output.count("[[") == 10  # five of the strongest, one of each interval
    both = invoke(app, "show", *given, "--latent", "3", "--latent", "4").output
    assert both.startswith(shown.output)
    assert "latent 4: " in both
    refused(app, "show", *given, "--latent", "99")
