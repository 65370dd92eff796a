"""Properties of a loaded model, measured by a few tiny passes before the first batch; its state is restored afterwards.

Does a context's row depend on padding, on the other contexts of its batch, or on earlier passes? If so, batches have
one length or one context, or the model is refused. Does a token attend to later ones? Does a pass change the model?
Shapes: S sequences, T tokens, D = d_in, N rows of all hook points of a context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sae_granary.common.errors import GranaryError, one_line
from sae_granary.models.behavior.passes import Ids, Rows, batch_of
from sae_granary.models.behavior.state import State, unchanged
from sae_granary.models.errors import HookError, MemoryLimitError, ModelError
from sae_granary.models.hooks import Hook, own_multiple, tensor_of, vocabulary_size

if TYPE_CHECKING:
    import torch
    from torch import nn

# What two passes may differ by, of a row's length; more where windows of one length differ by more.
_ROUNDING = {"torch.float32": 1e-4, "torch.bfloat16": 3e-2, "torch.float16": 1e-2}
_TIMES_ROUNDING = 10
_LONGEST = 24  # tokens of the longer windows


@dataclass(frozen=True)
class Behavior:
    """What a harvest must know about a model before its first batch."""

    batching: Literal["padded", "equal", "single"] = "padded"  # windows of like length, of one length, one window
    causal: bool | None = None  # whether no token sees a later one; None: not found out
    changed: tuple[str, ...] = ()  # what of the model itself a pass changes
    multiple: int = 1  # batches are padded to a multiple of it, which the model itself would do in front of its blocks

    @property
    def notice(self) -> str:
        """One line about an unusual model; empty for others."""
        return {
            "padded": "",
            "equal": "padding changes this model's rows: batches hold windows of one length only",
            "single": "what shares a batch changes this model's rows: batches hold one window or text",
        }[self.batching]


USUAL = Behavior()


def failure(error: BaseException) -> str:
    """One-line description of an error in a model's own code."""
    return f"{type(error).__name__}: {one_line(error)}"


def pad_id_for(base: nn.Module, pad_id: int | None) -> int:
    """The tokenizer's pad token, or 0 if there is none or the embedding lacks it: padding is masked."""
    n = vocabulary_size(base)
    return 0 if pad_id is None or pad_id < 0 or (n is not None and pad_id >= n) else int(pad_id)


def probe_windows(prefix: Ids, suffix: Ids, ctx_len: int, n_ids: int, special: frozenset[int]) -> list[list[int]]:
    """Two windows of one length, a shorter one and the shortest, of ordinary tokens between the special ones."""
    plain = [i for i in range(min(n_ids, 50_000)) if i not in special] or [0]
    room = max(1, min(ctx_len, _LONGEST) - len(prefix) - len(suffix))
    pick = [plain[(i * 7919 + 13) % len(plain)] for i in range(3 * room)]
    pieces = pick[:room], pick[room : 2 * room], pick[2 * room : 2 * room + max(1, room // 3)], pick[:1]
    return [[*prefix, *piece, *suffix] for piece in pieces]


def observe(
    base: nn.Module,
    hooks: Sequence[Hook],
    windows: Sequence[Ids],
    *,
    pad_id: int,
    ctx_len: int,
    batch_tokens: int,
    name: str,
) -> Behavior:
    """What the model does with a long window, another of its length and a short one. Leaves the model as it was.

    The short one is also run beside the longest window that shares a batch of `batch_tokens`: some models read a text
    otherwise from a length on. Where a pass changes the model, windows of lengths between are run beside it as well.
    Raises ModelError where the model fails on text of any length, or gives other rows for a window again.
    """
    long, other, short, shortest = windows
    longest = ([*long] * ctx_len)[:ctx_len]
    with running(base, name) as state:
        rows = Rows(base, hooks, pad_id, state)
        try:
            rows.multiple = _multiple(rows, own_multiple(base), (long, longest[:-1], longest))
            for window in (short, shortest, long, longest):
                rows.check(window)
            changed = state.changed()
            longest = longest[: batch_tokens // 2]
            batching = _batching(rows, long, other, short, longest, _halves(len(longest)) if changed else (), name)
        finally:
            rows.close()
        return Behavior(batching, _causal(base, long, other, state), changed, rows.multiple)


@contextmanager
def running(base: nn.Module, name: str) -> Iterator[State]:
    """Context manager: passes leave the model unchanged, and any error becomes a ModelError."""
    import torch

    with unchanged(base) as state, torch.inference_mode():
        try:
            yield state
        except GranaryError:
            raise
        except torch.OutOfMemoryError as error:
            raise MemoryLimitError(
                f"{name}: a single window does not fit the memory of the device: use a smaller --ctx-len, "
                "--compute-dtype bfloat16, or another --device"
            ) from error
        except Exception as error:  # of the model's code, which may be anyone's
            raise ModelError(
                f"{name} cannot run on text alone ({failure(error)}): give a model that reads text, or the text part "
                "of this one saved by itself"
            ) from error


def _multiple(rows: Rows, own: int, windows: Sequence[Ids]) -> int:
    """The multiple `own` if the model pads one of these contexts by itself, before its blocks; else 1."""
    if own == 1:
        return 1
    try:
        for window in filter(None, windows):
            rows.restore()
            rows.check(window)
    except HookError:
        return own
    finally:
        rows.restore()
    return 1


def _batching(
    rows: Rows, long: Ids, other: Ids, short: Ids, longest: Ids, between: Sequence[int], name: str
) -> Literal["padded", "equal", "single"]:
    """The kind of batches in which a context's rows equal its rows alone; also checked for the lengths `between`."""
    want = [rows([window])[0] for window in (long, other, short)]
    limit = _ROUNDING.get(str(want[0].dtype), 1e-4)
    if _difference(want[0], rows([long])[0]) > limit:
        raise ModelError(
            f"{name} gives other activations for the same text at each pass (it draws random numbers): "
            "no row of it could be computed again"
        )
    together = rows([long, other])
    rounding = max(_difference(want[0], together[0]), _difference(want[1], together[1]))
    if rounding > limit * _TIMES_ROUNDING:
        return "single"
    padded = rows([long, short])
    leak = max(_difference(want[0], padded[0]), _difference(want[2], padded[1]))
    leak = max(leak, _difference(want[2], rows([longest, short])[1]))
    for n in between:
        leak = max(leak, _difference(rows([longest[:n]])[0], rows([longest, longest[:n]])[1]))
    return "equal" if leak > max(limit, _TIMES_ROUNDING * rounding) else "padded"


def observe_texts(model: nn.Module, encode: Callable[[Sequence[str]], torch.Tensor], n_words: int) -> Behavior:
    """What a model that embeds whole texts does with a short one beside one of its length and one of `n_words`.

    `encode` gives the embeddings (S, D) of S texts in one batch. Leaves the model as it was.
    """
    if next(model.parameters(), None) is None:
        return USUAL
    short, long = "a", "a " * n_words
    with running(model, type(model).__name__) as state:

        def found(*texts: str) -> torch.Tensor:
            state.restore()
            return encode(texts)[:1]

        alone = found(short)
        limit = _ROUNDING.get(str(next(model.parameters()).dtype), 1e-4)
        rounding = _difference(alone, found(short, "I"))
        leak = _difference(alone, found(short, long))
        state.restore()
        for text in (long, short):
            encode([text])
        changed = state.changed()
        for text in ("a " * n for n in (_halves(n_words) if changed else ())):
            leak = max(leak, _difference(found(text), found(text, long)))
    padded = leak <= max(limit, _TIMES_ROUNDING * rounding) and rounding <= _TIMES_ROUNDING * limit
    return Behavior("padded" if padded else "single", changed=changed)


def _causal(base: nn.Module, long: Ids, other: Ids, state: State) -> bool | None:
    """Whether changing the second half of a context leaves the rows of the first half unchanged."""
    half = len(long) // 2
    outputs = []
    for window in (long, [*long[:half], *other[half:]]):
        state.restore()
        try:
            tensor, _ = tensor_of(base(input_ids=batch_of([window], 0, base)[0]))
        except Exception:  # behind the last hook point, where a harvest never comes
            return None
        if tensor is None or tensor.shape[:-1].numel() != len(window):
            return None
        outputs.append(tensor.reshape(len(window), -1)[:half].clone())
    limit = _ROUNDING.get(str(outputs[0].dtype), 1e-4)
    return None if half == 0 else _difference(*outputs) <= limit


def _halves(n: int) -> list[int]:
    """n / 2, n / 4, ... 1."""
    return [n >> i for i in range(1, n.bit_length())]


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest distance between two rows (N, D), relative to their length."""
    a, b = a.float(), b.float()
    found = (a - b).norm(dim=-1) / a.norm(dim=-1).clamp_min(1e-12)
    return float(found.max())  # NaN compares as no difference: the cache refuses such rows by itself
