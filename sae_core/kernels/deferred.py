"""What a step asks of its device, answered together, so that the host waits for the device once.

On a CPU a number is read as soon as it is needed. On a GPU each reading makes the host wait until everything that it
launched has run, and the device then waits for the next launches.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate, pairwise
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from sae_granary.sae_core.ranks.reduce import ALONE, Alone

FLOAT32_MAX = torch.finfo(torch.float32).max
CODES = {torch.float32: "f", torch.float64: "d", torch.int64: "q", torch.int32: "i", torch.bool: "?"}  # of `struct`

Bounded = tuple[Tensor, float]  # a scalar, and the largest magnitude that it should have
Matrix = tuple[int, torch.Size]  # address and shape

ROOM, MIN_ROOM = 1.25, 4096  # slots for entries, relative to the number of the step before; and more


def host_waits(tensor: Tensor) -> bool:
    """Whether the host waits when it reads a number of this tensor, or a size that depends on its values."""
    return tensor.device.type != "cpu"


class Answers(NamedTuple):
    """What `Deferred.read` found."""

    held: bool  # whether all numbers were within their limits
    fits: bool  # whether every selection had room for what it found
    numbers: list[float]


class RowGradient(NamedTuple):
    """The gradient of some rows of a matrix (F, D), or of some numbers of a vector (F,)."""

    parameter: Tensor  # (F, D), (D, F) or (F,)
    axis: int  # of the parameter, which counts F
    rows: Tensor  # (A,) distinct
    grad: Tensor  # (A, D) or (A,)


class Deferred:
    """Numbers of one step that are read together, and those that the next step knows beforehand."""

    def __init__(self) -> None:
        self._bounded: list[Bounded] = []
        self._fits: list[Tensor] = []
        self._counts_found: list[tuple[Tensor, int, int]] = []  # by each selection of this step; of how many; its room
        self._codes = ""  # of the numbers asked for
        self._last_shares: list[float] = []  # by each of the step before
        self._counts: dict[str, tuple[ref[Tensor], int, int]] = {}  # name -> (tensor, its version, its count)
        self._found: dict[str, Tensor] = {}  # what `once` has found in this step
        self._rows: list[RowGradient] = []
        self._matrices: dict[Matrix, bool] = {}  # whose gradients' norms are wanted; True: without the part along rows
        self._squares: dict[Matrix, tuple[Tensor, int, int] | None] = {}
        self.exact = False  # selections wait for the number that they find

    @contextmanager
    def of_this_step(self, *, exact: bool = False) -> Iterator[None]:
        """Context manager: selections use this object. With `exact` they wait for the number that they find."""
        self._bounded.clear()
        self._fits.clear()
        self._counts_found.clear()
        self._found.clear()
        self._rows.clear()
        self.exact = exact
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def failed(self, numbers: Iterable[Bounded], ranks: Alone = ALONE) -> bool:
        """Whether a number of some rank exceeds its limit or is NaN.

        Where the host would wait: False for now, and `read` tells of this rank's numbers.
        """
        given = list(numbers)
        if given and host_waits(given[0][0]):
            self._bounded += given
            return False
        return not ranks.all(are_within(given))

    def expected_share(self) -> float | None:
        """Share of (N, F) that the next selection found in the step before; None if it must be counted first."""
        place = len(self._counts_found)
        return None if self.exact or place >= len(self._last_shares) else self._last_shares[place]

    def note_share(self, count: Tensor, n_entries: int, room: int) -> None:
        """Report how many of n_entries a selection found, a scalar, and how many it had room for."""
        self._counts_found.append((count, n_entries, room))

    def note_fits(self, fits: Tensor) -> None:
        """Report whether a selection had room for what it found, a scalar; if not, the step is taken again."""
        self._fits.append(fits)

    def read(self, *numbers: Tensor) -> Answers:
        """All answers, and the values of scalars: the only wait of a step."""
        return self.answers(to_host(self.asked(*numbers)))

    def asked(self, *numbers: Tensor) -> Tensor:
        """What `read` reads, as a vector of bytes: one launch joins all types. Several steps can be read together."""
        found = [count for count, _, _ in self._counts_found]
        given = [*(number for number, _ in self._bounded), *self._fits, *found, *numbers]
        known = [number if number.dtype in CODES else number.float() for number in given]
        self._codes = "=" + "".join(CODES[number.dtype] for number in known)
        return torch.cat([number.view(1).view(torch.uint8) for number in known])

    def answers(self, found: bytes) -> Answers:
        """The answers in the values of what was asked."""
        values = struct.unpack(self._codes, found)
        ends = list(accumulate((len(self._bounded), len(self._fits), len(self._counts_found)), initial=0))
        bounded, fits, counts = (values[start:end] for start, end in pairwise(ends))
        held = all(abs(number) <= limit for number, (_, limit) in zip(bounded, self._bounded, strict=True))
        roomy = all(count <= room for count, (_, _, room) in zip(counts, self._counts_found, strict=True))
        self._last_shares = [count / n for count, (_, n, _) in zip(counts, self._counts_found, strict=True)]
        return Answers(held, all(fits) and roomy, list(values[ends[-1] :]))

    def want_squares(self, matrices: Mapping[Tensor, bool]) -> None:
        """Ask the kernels of this step for the squared norms of the gradients of matrices (F, D).

        True: that of what remains without the parts along the matrix's unit-norm rows.
        """
        self._matrices = {_matrix(tensor): projects for tensor, projects in matrices.items()}
        self._squares.clear()

    def wants_square(self, matrix: Tensor) -> bool | None:
        """How the squared norm of a matrix's gradient is wanted, see `want_squares`; None if it is not."""
        return self._matrices.get(_matrix(matrix))

    def note_square(self, matrix: Tensor, grad: Tensor, square: Tensor) -> None:
        """Report the squared norm, a scalar, of a gradient of a matrix."""
        key = _matrix(matrix)  # of several gradients, which autograd adds, none has the norm of the sum
        self._squares[key] = None if key in self._squares else (square, grad.data_ptr(), grad._version)

    def add_to_square(self, matrix: Tensor, grad: Tensor, more: Tensor) -> None:
        """Report that a gradient has changed, and how much larger its squared norm is, a scalar; for `square`."""
        if (square := self.square(matrix, grad)) is not None:
            torch.autograd.graph.increment_version(grad)
            self._squares[_matrix(matrix)] = ((square + more).clamp_min_(0.0), grad.data_ptr(), grad._version)

    def square(self, matrix: Tensor, grad: Tensor) -> Tensor | None:
        """The squared norm of the gradient of a matrix; None if none was reported of it as it is now."""
        square, *noted = self._squares.get(_matrix(matrix)) or (None,)
        return square if noted == [grad.data_ptr(), grad._version] else None

    def once(self, name: str, find: Callable[[], Tensor]) -> Tensor:
        """What `find` returns, called by the first micro-batch of a step that asks; the others get the same tensor."""
        if name not in self._found:
            self._found[name] = find()
        return self._found[name]

    def note_rows(self, found: RowGradient) -> None:
        """Report a gradient that is not spread over its parameter: `rows_to_add` gives it after the backward pass."""
        self._rows.append(found)

    def rows_to_add(self) -> Iterator[RowGradient]:
        """What was reported, each once."""
        while self._rows:
            yield self._rows.pop(0)

    def remember_count(self, name: str, tensor: Tensor, count: int) -> None:
        """Note a count that follows from the values that the tensor has now."""
        self._counts[name] = (ref(tensor), tensor._version, count)

    def count(self, name: str, tensor: Tensor) -> int | None:
        """The noted count; None if none was, or if the tensor has changed since."""
        known, version, count = self._counts.get(name, (None, 0, 0))
        return count if known is not None and known() is tensor and version == tensor._version else None


def _matrix(tensor: Tensor) -> Matrix:
    return tensor.data_ptr(), tensor.shape


_current: ContextVar[Deferred | None] = ContextVar("deferred", default=None)


def current() -> Deferred | None:
    """That of the training step which runs in this thread; None outside of one."""
    return _current.get()


def known_count(name: str, tensor: Tensor) -> int | None:
    """What `Deferred.count` of the step says; None outside of a step."""
    deferred = current()
    return None if deferred is None else deferred.count(name, tensor)


def finite(*numbers: Tensor) -> list[Bounded]:
    """Numbers that may have any value but NaN and Inf."""
    return [(number.detach(), FLOAT32_MAX) for number in numbers]


def are_within(numbers: Iterable[Bounded]) -> bool:
    """Whether no number exceeds its limit or is NaN; the host waits."""
    return all(abs(float(number)) <= limit for number, limit in numbers)


def room_for(share: float, n_entries: int) -> int:
    """Slots for about this share of n_entries."""
    return min(n_entries, int(ROOM * share * n_entries) + MIN_ROOM)


def to_host(found: Tensor) -> bytes:
    """Read a vector of bytes, waiting for its device."""
    return bytes(found.tolist())
