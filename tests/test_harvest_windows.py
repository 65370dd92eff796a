"""Documents -> windows -> buffers -> batches: every token once, in its place, from any state."""

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from fork_kit import LIMIT
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_granary.common.rows import FLAG_SPECIAL, FLAG_WINDOW_START
from sae_granary.common.threads import THREADS
from sae_granary.models.tokens.batches import collate, plan_batches
from sae_granary.models.tokens.contexts import StreamState, Window, WindowRules
from sae_granary.models.tokens.document import Document
from sae_granary.models.tokens.stream import Tokenized, WindowStream, buffers, tokenize_ahead, tokenize_stream

PREFIX, SUFFIX, SEPARATOR = 201, 202, 203


def fake_tokenize(texts: Sequence[str]) -> list[np.ndarray]:
    """A token per letter; "-" has none."""
    return [np.array([ord(char) for char in text if char != "-"], np.int32) for text in texts]


def document(doc_id: int, text: str) -> Document:
    return Document(doc_id, text, "test", doc_id, skipped=None if text else "empty")


def stream(docs: Sequence[str], rules: WindowRules, state: StreamState | None = None, **limits: int) -> WindowStream:
    state = state or StreamState()
    items = (document(i, text) for i, text in enumerate(docs) if i >= state.next_doc)
    return WindowStream(tokenize_stream(items, fake_tokenize), rules, state, **limits)


def as_tuples(windows: Sequence[Window]) -> list[tuple[object, ...]]:
    return [
        (w.number, w.ids.tolist(), w.doc_id.tolist(), w.doc_position.tolist(), w.flags.tolist(), w.documents)
        for w in windows
    ]


documents_ = st.lists(st.text(alphabet="abcdefgh-", max_size=30), max_size=12)
single_rules = st.builds(
    lambda room, before, after: WindowRules(room + before + after, (PREFIX,) * before, (SUFFIX,) * after),
    st.integers(1, 9), st.integers(0, 2), st.integers(0, 2),
)  # fmt: skip
packed_rules = st.builds(
    lambda room, before: WindowRules(room + before, (PREFIX,) * before, (), SEPARATOR),
    st.integers(1, 9), st.integers(0, 1),
)  # fmt: skip


def test_a_long_document_by_hand() -> None:
    rules = WindowRules(5, (PREFIX,), (SUFFIX,))
    windows = list(stream(["abcd", "", "ef"], rules))
    a, b, c, d, e, f = (ord(char) for char in "abcdef")
    assert [w.ids.tolist() for w in windows] == [[PREFIX, a, b, c, SUFFIX], [PREFIX, d, SUFFIX], [PREFIX, e, f, SUFFIX]]
    assert [w.doc_position.tolist() for w in windows] == [[-1, 0, 1, 2, -1], [-1, 3, -1], [-1, 0, 1, -1]]
    assert [w.doc_id.tolist() for w in windows] == [[0] * 5, [0] * 3, [2] * 4]
    assert windows[0].flags.tolist() == [FLAG_SPECIAL | FLAG_WINDOW_START, 0, 0, 0, FLAG_SPECIAL]
    assert [len(w.documents) for w in windows] == [1, 0, 1]


def test_packing_by_hand() -> None:
    rules = WindowRules(5, (PREFIX,), (), SEPARATOR)
    windows = list(stream(["abc", "de", "f"], rules))
    a, b, c, d, e, f = (ord(char) for char in "abcdef")
    assert [w.ids.tolist() for w in windows] == [
        [PREFIX, a, b, c, SEPARATOR], [PREFIX, d, e, SEPARATOR, f], [PREFIX, SEPARATOR],
    ]  # fmt: skip
    assert [w.doc_id.tolist() for w in windows] == [[0] * 5, [1, 1, 1, 1, 2], [2, 2]]
    assert [w.doc_position.tolist() for w in windows] == [[-1, 0, 1, 2, -1], [-1, 0, 1, -1, 0], [-1, -1]]
    assert [[d.doc_id for d in w.documents] for w in windows] == [[0], [1, 2], []]


@given(documents_, st.one_of(single_rules, packed_rules))
def test_every_token_exactly_once(docs: list[str], rules: WindowRules) -> None:
    found: dict[tuple[int, int], int] = {}
    windows = list(stream(docs, rules))
    for window in windows:
        assert len(window) <= rules.ctx_len
        for token, doc, position in zip(window.ids, window.doc_id, window.doc_position, strict=True):
            if position >= 0:
                assert (int(doc), int(position)) not in found
                found[int(doc), int(position)] = int(token)
    tokens = [fake_tokenize([text])[0] for text in docs]
    assert found == {(doc, i): int(token) for doc, ids in enumerate(tokens) for i, token in enumerate(ids)}
    assert [d.doc_id for w in windows for d in w.documents] == [doc for doc, ids in enumerate(tokens) if len(ids)]
    assert [w.number for w in windows] == list(range(len(windows)))
    if rules.separator is not None:
        assert sum(int((w.ids == SEPARATOR).sum()) for w in windows) == sum(len(ids) > 0 for ids in tokens)


@given(documents_, st.one_of(single_rules, packed_rules), st.integers(1, 60), st.integers(1, 100), st.data())
@settings(deadline=None)
def test_any_buffer_can_be_replayed(
    docs: list[str], rules: WindowRules, buffer_tokens: int, max_rows: int, data: st.DataObject
) -> None:
    whole = stream(docs, rules, max_rows=max_rows)
    all_buffers = list(buffers(whole, buffer_tokens))
    if not all_buffers:
        return
    i = data.draw(st.integers(0, len(all_buffers) - 1))
    state = StreamState.from_ints(all_buffers[i].state.to_ints())
    again = stream(docs, rules, state, max_rows=max_rows)
    replayed = list(buffers(again, buffer_tokens))
    assert [as_tuples(b.windows) for b in replayed] == [as_tuples(b.windows) for b in all_buffers[i:]]
    assert [b.state for b in replayed] == [b.state for b in all_buffers[i:]]
    assert (again.state, again.ended) == (whole.state, whole.ended)


@given(documents_, single_rules, st.integers(1, 100))
def test_max_tokens_stops_after_the_document_that_reaches_it(docs: list[str], rules: WindowRules, limit: int) -> None:
    part, whole = list(stream(docs, rules, max_rows=limit)), list(stream(docs, rules))
    assert as_tuples(part) == as_tuples(whole[: len(part)])
    n_rows = sum(map(len, part))
    if len(part) < len(whole):
        last = part[-1].doc_id[0]
        assert n_rows >= limit
        assert sum(len(w) for w in part if w.doc_id[0] != last) < limit
        assert whole[len(part)].doc_id[0] != last


def test_the_stream_says_why_it_ended_and_what_it_skipped() -> None:
    rules = WindowRules(8)
    for limits, ended, n_docs in (
        ({}, "source", 3),
        ({"max_rows": 3}, "max_tokens", 2),
        ({"max_docs": 1}, "max_docs", 1),
    ):
        windows = stream(["ab", "", "-", "cd", "ef"], rules, **limits)
        list(windows)
        assert (windows.ended, windows.state.n_docs) == (ended, n_docs)
    assert windows.state.to_ints()["next_doc"] == 1
    full = stream(["ab", "", "-", "cd"], rules)
    list(full)
    assert {k: v for k, v in full.state.to_ints().items() if v} == {
        "next_doc": 4, "next_window": 2, "n_rows": 4, "n_docs": 2, "skipped_empty": 1, "skipped_no_tokens": 1,
    }  # fmt: skip


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(1, 200))
def test_batches_hold_each_window_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget


def test_batches_by_hand() -> None:
    for lengths, budget, batches in (
        ([3, 5, 3, 5, 3], 10, [[1, 3], [0, 2, 4]]),  # ties keep their order
        ([50, 46, 44, 40], 200, [[0, 1], [2, 3]]),  # only like lengths
        ([5, 1, 2, 4], 160, [[0, 3, 2, 1]]),  # but not too few of them
    ):
        assert [batch.tolist() for batch in plan_batches(lengths, budget)] == batches


def test_padding_of_ragged_text_is_low() -> None:
    lengths = np.random.default_rng(0).lognormal(np.log(40), 0.8, 3000).clip(3, 256).astype(int)
    places = sum(len(batch) * lengths[batch].max() for batch in plan_batches(lengths.tolist(), 4096))
    assert 1 - lengths.sum() / places <= 0.05


@pytest.mark.parametrize("lengths", [[3, 1, 2], [2, 2]])
def test_collate_maps_real_tokens_to_their_rows(lengths: list[int]) -> None:
    rules = WindowRules(9)
    windows = list(stream(["abcdefgh"[:n] for n in lengths], rules))
    first_rows = np.cumsum([0, *lengths])[:-1].tolist()
    batch = collate(windows, np.arange(len(windows))[::-1], first_rows, pad_id=7)
    ids = np.concatenate([w.ids for w in windows])
    assert batch.input_ids.reshape(-1)[batch.flat].tolist() == ids[batch.rows].tolist()
    assert sorted(batch.rows.tolist()) == list(range(sum(lengths)))
    if len(set(lengths)) == 1:
        assert batch.attention_mask is None
    else:
        assert batch.attention_mask is not None
        assert (batch.input_ids[batch.attention_mask == 0] == 7).all()
        assert batch.attention_mask.sum() == sum(lengths)


def test_tokens_made_ahead_are_the_same_and_end_with_their_reader() -> None:
    ended: list[bool] = []

    def source(n: int) -> Iterator[Document]:
        try:
            yield from (document(i, "abc" if i % 3 else "") for i in range(n))
            raise OSError("the disk is gone")
        finally:
            ended.append(True)

    def made(tokenized: Iterator[Tokenized]) -> list[tuple[int, list[int]]]:
        found = []
        with pytest.raises(OSError, match="the disk is gone"):
            found.extend((doc.doc_id, ids.tolist()) for doc, ids in tokenized)
        return found

    assert made(tokenize_ahead(source(1000), fake_tokenize)) == made(tokenize_stream(source(1000), fake_tokenize)) != []
    ended.clear()
    ahead = tokenize_ahead(source(10_000), fake_tokenize)
    next(ahead)
    ahead.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread.name.startswith(THREADS):
            thread.join(LIMIT)
            assert not thread.is_alive()
    assert ended == [True]
