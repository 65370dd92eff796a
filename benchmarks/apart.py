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
from contextlib import ExitStack, suppress
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
        players = {name: stack.enter_context(Player(name, contestant)) for name, contestant in contestants.items()}
        for player in players.values():
            player.ready()
        for turn in range(repeats + 1):
            for name, player in players.items():
                player.step()
                took = player.step()
                if turn:
                    seconds[name].append(took)
    return {name: statistics.median(times) for name, times in seconds.items()}


class Player:
    """A process that takes a step when told. What it raises, or a limit exceeded, is a RuntimeError here."""

    def __init__(self, name: str, contestant: Contestant) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_play, args=(contestant, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(timeout=2)
        self._process.kill()

    def ready(self, limit: float | None = None) -> None:
        """Wait, at most so many seconds, until it has prepared its first step."""
        self._receive(limit)

    def step(self, limit: float | None = None) -> float:
        """Seconds of one step."""
        with suppress(BrokenPipeError):  # why it has ended is in the pipe
            self._pipe.send(None)
        return self._receive(limit)

    def _receive(self, limit: float | None) -> float:
        try:
            if not self._pipe.poll(limit):
                raise RuntimeError(f"{self._name}: no answer within {limit:.0f} s")
            received = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(f"{self._name} stopped: an error above, or too little memory") from None
        if isinstance(received, str):
            raise RuntimeError(f"{self._name}: {received}")
        return float(received)


def _play(contestant: Contestant, pipe: Connection) -> None:
    start = time.perf_counter()

    def turn(took: float | None = None) -> None:
        nonlocal start
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        try:
            pipe.send(time.perf_counter() - start if took is None else took)
            pipe.recv()
        except (EOFError, ConnectionError):  # the race is over; a trainer's threads may wait forever
            os._exit(0)
        start = time.perf_counter()

    try:
        contestant(turn)
    except Exception as error:
        pipe.send(" ".join(f"{type(error).__name__}: {error}".split())[:300])
        raise
