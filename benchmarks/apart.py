"""Medians of contestants that each have a process of their own, and take their steps in turn.

In one process they would share more than the machine: the threads of one make OpenMP's threads of another sleep where
they wait, and the C library's settings hold for all of them.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Protocol

import torch

Contestant = Callable[["Turn"], object]  # takes steps forever; can be pickled


class Turn(Protocol):
    """Called before every step; returns when the step may begin."""

    def __call__(self, took: float | None = None) -> None:
        """`took` are the seconds of the step before, where not all of it counts."""


def apart(contestants: Mapping[str, Contestant], repeats: int) -> dict[str, float]:
    """Return the median seconds of a step of each; drift hits them alike.

    In a turn each takes two steps, and the second one counts: the first brings back to the caches what the others
    drove out, as it would be in a training. Raises RuntimeError for a contestant that fails.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    with ExitStack() as stack:
        players = {name: stack.enter_context(_Player(name, contestant)) for name, contestant in contestants.items()}
        for turn in range(repeats + 1):
            for name, player in players.items():
                player.step()
                took = player.step()
                if turn:
                    seconds[name].append(took)
    return {name: statistics.median(times) for name, times in seconds.items()}


class _Player:
    """A process that takes a step when told."""

    def __init__(self, name: str, contestant: Contestant) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_play, args=(contestant, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> _Player:
        self._receive()  # ready for its first step
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def step(self) -> float:
        """Seconds of one step."""
        return self._receive(send=True)

    def _receive(self, *, send: bool = False) -> float:
        try:
            if send:
                self._pipe.send(None)
            return float(self._pipe.recv())
        except (EOFError, BrokenPipeError):
            raise RuntimeError(f"{self._name} stopped: an error above, or too little memory") from None


def _play(contestant: Contestant, pipe: Connection) -> None:
    start = time.perf_counter()

    def turn(took: float | None = None) -> None:
        nonlocal start
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - start if took is None else took)
        try:
            pipe.recv()
        except EOFError:  # the race is over; a trainer's threads may wait forever
            os._exit(0)
        start = time.perf_counter()

    contestant(turn)
