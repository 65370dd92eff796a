"""Median times on a device's own clock."""

import statistics
import time
from collections.abc import Callable

import torch


def median_ms(function: Callable[[], object], device: str, repeats: int = 20, warmup: int = 3) -> float:
    """Milliseconds of a call: CUDA events around each, so that waiting for the host counts.

    On a CPU, where only the script is tested, the host's clock around three calls.
    """
    if device == "cpu":
        return statistics.median(_host_ms(function) for _ in range(3))
    for _ in range(warmup):
        function()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for first, last in events:
        first.record()
        function()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in events)


def _host_ms(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)
