"""Steps of sparsify (with its Triton kernels), SAELens (autocast) and dictionary_learning (autocast) beside ours.

Each has a process of its own, which imports while earlier parts run; then they take their steps in turn. One that is
not installed, fails, or is not ready in time is reported, and the race continues without it.
"""

import argparse
import statistics
import sys
import time
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec

from benchmarks.apart import Contestant, Player
from benchmarks.cuda_visit.part import tell
from benchmarks.cuda_visit.place import CPU_PATIENCE, Place
from benchmarks.peers.contestants import contestants
from benchmarks.peers.step import product, train
from benchmarks.table import markdown

KINDS = ("topk", "batchtopk")
PACKAGES = {"SAELens": "sae_lens", "dictionary_learning": "dictionary_learning", "sparsify": "sparsify"}
IMPORT_SECONDS, STEP_SECONDS = 200.0, 30.0
TURN_SECONDS = 120.0  # of its turn that a peer is waited for: the race needs the rest of this part's limit
NOT_INSTALLED = "not installed"
Name = tuple[str, str]  # type, who trains it


def run(at: Place) -> bool:
    """Start all, wait for the turn of this part, race."""
    sizes = (
        {"d_in": 32, "d_sae": 256, "k": 4, "batch_size": 128} if at.tiny else {"d_in": 768, "d_sae": 24_576, "k": 32}
    )
    args = argparse.Namespace(**{"batch_size": 8192, **sizes}, cache=None, device=at.device, keep_freed=False)
    args.autocast = not at.tiny
    wanted: dict[Name, Contestant] = {
        (kind, who): partial(train, trainer, args) for kind in KINDS for who, trainer in contestants(kind).items()
    }
    wanted["", "encoder product in float32"] = partial(product, args)
    why: dict[Name, str] = {name: NOT_INSTALLED for name in wanted if not _installed(name)}
    with ExitStack() as stack:
        players = {
            name: stack.enter_context(Player(" ".join(name), contestant))
            for name, contestant in wanted.items()
            if name not in why
        }
        patience = CPU_PATIENCE if at.tiny else 1
        end = time.monotonic() + patience * IMPORT_SECONDS
        sys.stdin.readline()  # the visit says when it is this part's turn
        end = min(end, time.monotonic() + patience * TURN_SECONDS)
        for name in list(players):
            _attempt(players, why, name, max(1.0, end - time.monotonic()))
        seconds = _race(players, why, 2 if at.tiny else 20)
        print(_table(args, seconds, why), flush=True)
    return bool(seconds) and set(why.values()) <= {NOT_INSTALLED}


def _installed(name: Name) -> bool:
    package = PACKAGES.get(name[1].removesuffix(" (adam)"))
    return package is None or find_spec(package) is not None


def _attempt(players: dict[Name, Player], why: dict[Name, str], name: Name, limit: float) -> None:
    tell(f"waiting for {' '.join(name)}, at most {limit:.0f} s")
    try:
        players[name].ready(limit)
    except RuntimeError as error:
        why[name] = str(error)
        del players[name]


def _race(players: dict[Name, Player], why: dict[Name, str], repeats: int) -> dict[Name, float]:
    """Median seconds of those that finish; two steps in a turn, of which the second counts."""
    seconds: dict[Name, list[float]] = {name: [] for name in players}
    for turn in range(repeats + 1):
        for name in list(players):
            try:
                players[name].step(STEP_SECONDS)
                took = players[name].step(STEP_SECONDS)
            except RuntimeError as error:
                why[name] = str(error)
                del players[name], seconds[name]
                continue
            if turn:
                seconds[name].append(took)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _table(args: argparse.Namespace, seconds: dict[Name, float], why: dict[Name, str]) -> str:
    lines = []
    for name, spent in seconds.items():
        ours = seconds.get((name[0], "ours"))
        against = "" if ours is None or name[1] == "ours" else f"{spent / ours:.2f}"
        lines.append([*name, f"{1e3 * spent:.2f}", against])
    lines += [[*name, reason, ""] for name, reason in why.items()]
    products = "bfloat16 products" if args.autocast else "float32"
    title = f"d_in {args.d_in}, d_sae {args.d_sae}, k {args.k}, batch {args.batch_size}, {products} on {args.device}."
    return f"{title}\n\n{markdown(['type', 'trainer', 'ms per step', 'times ours'], lines)}"
