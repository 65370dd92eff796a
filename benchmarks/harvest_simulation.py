"""`python -m benchmarks.harvest_simulation`: a harvest in blocks on 1 to 4,096 ranks that fail and differ in speed.

A simulation, not a measurement. The rules are those of `harvest.ranks`: a rank claims the first block that nobody works
on; the block of a rank that ended on another machine is free when its lease has been silent for `lease` seconds; the
next holder continues after the last committed shard. Waiting for the disk and joining the blocks are not simulated.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.scale import HARVEST
from benchmarks.table import markdown

RANKS = (1, 8, 64, 512, 4096)
BLOCK_MINUTES = (1, 5, 20, 60)


@dataclass(frozen=True)
class Harvest:
    """A harvest; all times in seconds, those of work on a rank of normal speed."""

    ranks: int
    blocks: int
    block: float
    shard: float  # work between two commits
    lease: float = 120.0
    restart: float = 300.0  # until a failed rank is back, its model loaded
    claim: float = 0.0  # from the claim of a block to its first row
    between_failures: float = math.inf  # of one rank, on average
    slow_share: float = 0.0  # of the ranks
    slow_factor: float = 2.0  # how much longer they take


@dataclass(frozen=True)
class Outcome:
    seconds: float  # until the last block was complete
    efficiency: float  # the work of all blocks, as a share of the time of all ranks
    wasted: float  # work that was done and not committed, as a share of all work
    failures: int


class _Simulation:
    def __init__(self, harvest: Harvest, seed: int, failures: Mapping[int, Sequence[float]] | None) -> None:
        self.h, self._random = harvest, random.Random(seed)
        self._given = {rank: list(times) for rank, times in failures.items()} if failures else None
        n_slow = round(harvest.slow_share * harvest.ranks)
        self._factor = [harvest.slow_factor if rank < n_slow else 1.0 for rank in range(harvest.ranks)]
        self._fails = [self._next_failure(rank, 0.0) for rank in range(harvest.ranks)]
        self._free, self._idle = list(range(harvest.blocks)), list[int]()
        self._committed = [0.0] * harvest.blocks
        self._events: list[tuple[float, int, str, int, int]] = []  # time, number, kind, rank, block
        self._number = self.n_failures = self.n_complete = 0
        self.wasted = self.now = 0.0

    def _next_failure(self, rank: int, now: float) -> float:
        if self._given is not None:
            later = [time for time in self._given.get(rank, []) if time > now]
            return min(later, default=math.inf)
        if math.isinf(self.h.between_failures):
            return math.inf
        return now + self._random.expovariate(1 / self.h.between_failures)

    def _at(self, time: float, kind: str, rank: int = -1, block: int = -1) -> None:
        self._number += 1
        heapq.heappush(self._events, (time, self._number, kind, rank, block))

    def run(self) -> Outcome:
        """All events until the last block is complete."""
        for rank in range(self.h.ranks):
            self._look(rank)
        while self.n_complete < self.h.blocks:
            self.now, _, kind, rank, block = heapq.heappop(self._events)
            if kind == "complete":
                self.n_complete += 1
                self._look(rank)
            elif kind == "back":
                self._look(rank)
            else:  # a lease has been silent long enough
                heapq.heappush(self._free, block)
                if self._idle:
                    self._look(self._idle.pop(0))
        work = self.h.blocks * self.h.block
        return Outcome(self.now, work / (self.h.ranks * self.now), self.wasted / work, self.n_failures)

    def _look(self, rank: int) -> None:
        """A rank claims the first free block, or waits for one."""
        if not self._free:
            self._idle.append(rank)
            return
        if self._fails[rank] < self.now:  # it failed while it waited, and has come back
            self._fails[rank] = self._next_failure(rank, self.now)
        block = heapq.heappop(self._free)
        left = self.h.block - self._committed[block]
        end = self.now + self.h.claim + left * self._factor[rank]
        if self._fails[rank] >= end:
            self._at(end, "complete", rank, block)
            return
        failed = self._fails[rank]
        worked = max(failed - self.now - self.h.claim, 0.0) / self._factor[rank]
        done = self._committed[block] + worked
        kept = max(self._committed[block], done // self.h.shard * self.h.shard)
        self._committed[block], self.wasted, self.n_failures = kept, self.wasted + done - kept, self.n_failures + 1
        self._fails[rank] = self._next_failure(rank, failed)
        self._at(failed + self.h.lease, "free", block=block)
        self._at(failed + self.h.restart, "back", rank)


def simulate(harvest: Harvest, seed: int = 0, failures: Mapping[int, Sequence[float]] | None = None) -> Outcome:
    """Simulate a harvest; `failures` gives the times at which ranks fail instead of random ones."""
    return _Simulation(harvest, seed, failures).run()


def rows_of_table(tokens: float, hours_between_failures: float) -> list[list[str]]:
    """For each number of ranks, the efficiency by the size of a block, and the largest share of work that was lost."""
    work = tokens / HARVEST
    rows = []
    for ranks in RANKS:
        cells, lost = [], 0.0
        for minutes in BLOCK_MINUTES:
            n = max(round(work / (60 * minutes)), 1)
            found = simulate(
                Harvest(
                    ranks, n, work / n, 262_144 / HARVEST, claim=1.0, slow_share=0.02,
                    between_failures=3600 * hours_between_failures,
                )
            )  # fmt: skip
            cells.append(f"{found.efficiency:.2f}")
            lost = max(lost, found.wasted)
        rows.append([f"{ranks:,}", f"{work / ranks / 3600:,.1f}", *cells, f"{lost:.4%}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.harvest_simulation", description=__doc__)
    parser.add_argument("--tokens", type=float, default=1e12)
    parser.add_argument("--hours-between-failures", type=float, default=500.0, help="of one rank")
    given = parser.parse_args()
    head = [
        "ranks",
        "hours of work each",
        *(f"blocks of {minutes} min" for minutes in BLOCK_MINUTES),
        "work lost at most",
    ]
    print(markdown(head, rows_of_table(given.tokens, given.hours_between_failures)))


if __name__ == "__main__":
    main()
