"""What all processes see of a harvest in blocks: outcomes in source order, where it ends, and what is left to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_granary.harvest.ranks.blocks import Outcome
from sae_granary.harvest.ranks.extension import NEW, Begun
from sae_granary.harvest.ranks.lease import Leases
from sae_granary.models.tokens.document import SKIP_REASONS

LIMITED = ".cut"  # ends the name of a block that may end the harvest


@dataclass(frozen=True)
class Limits:
    """Rows and documents that are wanted; None for all."""

    max_rows: int | None
    max_docs: int | None

    def reached(self, n_rows: int, n_docs: int) -> bool:
        """Whether these are enough."""
        rows, docs = self.max_rows, self.max_docs
        return (rows is not None and n_rows >= rows) or (docs is not None and n_docs >= docs)

    def after(self, n_rows: int, n_docs: int) -> Limits:
        """What is still wanted after these."""
        rows, docs = self.max_rows, self.max_docs
        return Limits(None if rows is None else rows - n_rows, None if docs is None else docs - n_docs)

    @property
    def given(self) -> bool:
        """Whether anything but the source ends the harvest."""
        return self.max_rows is not None or self.max_docs is not None


@dataclass(frozen=True)
class Task:
    """A block to harvest; with `limits` it ends where they are reached."""

    block: int
    limits: Limits | None

    @property
    def name(self) -> str:
        """That of its lease, its folder and its outcome."""
        return f"{self.block:08d}" + (LIMITED if self.limits is not None else "")


class Board:
    """The folder of the blocks, as one process sees it."""

    def __init__(self, folder: Path, block_docs: int, limits: Limits, leases: Leases, begun: Begun = NEW) -> None:
        self._folder, self._block_docs, self._limits, self._leases = folder, block_docs, limits, leases
        self._begun = begun
        self._outcomes: dict[str, Outcome] = {}
        self.done: list[tuple[int, Outcome]] = []  # the first blocks that are harvested, without a gap
        self.n_rows, self.n_docs = self._begun.n_rows, self._begun.n_docs  # of these, and of the blocks before
        self.ended = ""  # why the harvest ends with the last of these: max_tokens, max_docs or source
        self.last: int | None = None  # the block with which it ends, or one that is past that; None if not known yet

    @property
    def _next(self) -> int:
        """The first block that is not done."""
        return self._begun.block + len(self.done)

    def look(self) -> None:
        """Take in what other processes have completed."""
        while not self.ended:
            block = self._next
            if (found := self._found(block)) is None:
                return
            n_rows, n_docs = self.n_rows + found.n_rows, self.n_docs + found.n_documents
            reached = self._limits.reached(n_rows, n_docs)
            if reached and not found.limited:  # it goes past the end: it is harvested again up to there
                self.last = block
                return
            self.done.append((block, found))
            self.n_rows, self.n_docs = n_rows, n_docs
            if reached:
                rows = self._limits.max_rows
                self.ended = "max_tokens" if rows is not None and n_rows >= rows else "max_docs"
            elif found.n_records < self._block_docs:
                self.ended = "source"
            if self.ended:
                self.last = block

    def tasks(self) -> Iterator[Task]:
        """What may be claimed, in source order; endless where the end of the source is not known yet."""
        block, n_rows, n_docs = self._next, self.n_rows, self.n_docs
        while not self.ended and (self.last is None or block <= self.last):
            if block > self._next and self._limits.reached(n_rows, n_docs):
                return  # the blocks before have enough
            task = self._task(block)
            if task is not None:
                yield task
            known = self._outcome(f"{block:08d}")
            if known is not None and known.n_records < self._block_docs:
                return
            n_rows += self._rows_of(block)
            n_docs += known.n_documents if known is not None else 0
            block += 1

    def _rows_of(self, block: int) -> int:
        """Rows of a block that are known: of a complete one, or those that the process that harvests it has told."""
        if (found := self._found(block)) is not None:
            return found.n_rows
        return self._begun.rows_of(block) + max(map(self._leases.n_rows, _names(block)))

    def _task(self, block: int) -> Task | None:
        whole = Task(block, None)
        if block > self._next or not self._limits.given:
            return None if self._outcome(whole.name) else whole
        limited = Task(block, self._limits.after(self.n_rows, self.n_docs))
        if self._outcome(whole.name):
            return limited  # else it would be done
        return whole if self._leases.exists(whole.name) else limited

    def is_past_end(self, task: Task) -> bool:
        """Whether a block is no longer wanted."""
        return bool(self.ended) or (self.last is not None and task.block > self.last)

    def summary(self) -> dict[str, Any]:
        """Of a harvest that has ended, as its manifest holds it."""
        counts: Counter[str] = Counter(self._begun.counts)
        for _, outcome in self.done:
            counts.update(outcome.counts)
        names = ("repaired", *(f"skipped_{reason}" for reason in SKIP_REASONS))
        numbers = {name: counts[name] for name in names}
        return {"n_rows": self.n_rows, "n_documents": self.n_docs, "ended": self.ended, **numbers}

    def rows_in_work(self) -> int:
        """Rows of blocks after the first gap: of complete blocks, and of those in work as their leases say."""
        total, block = 0, self._next
        while not self.ended and (self.last is None or block <= self.last):
            if self._found(block) is None and not any(map(self._leases.exists, _names(block))):
                return total
            total += self._rows_of(block)
            block += 1
        return total

    def n_shown(self) -> int:
        """Rows of all blocks, for the progress: no more than are wanted, though blocks past the end may be in work."""
        total, wanted = self.n_rows + self.rows_in_work(), self._limits.max_rows
        return total if wanted is None or self.ended else min(total, max(wanted, self.n_rows))

    def _found(self, block: int) -> Outcome | None:
        """The outcome of a block."""
        return next(filter(None, map(self._outcome, _names(block))), None)

    def _outcome(self, name: str) -> Outcome | None:
        if name not in self._outcomes and (found := Outcome.read(self._folder / f"{name}.json")) is not None:
            self._outcomes[name] = found
        return self._outcomes.get(name)


def _names(block: int) -> tuple[str, str]:
    """Of the tasks of a block: where it may end the harvest, and whole."""
    return f"{block:08d}{LIMITED}", f"{block:08d}"
