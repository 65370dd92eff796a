"""Who takes part in which type."""

import argparse

from benchmarks.peers.contest import Maker
from benchmarks.peers.dictionary_learning import dictionary_learning_step
from benchmarks.peers.ours import our_step
from benchmarks.peers.saelens import saelens_step
from benchmarks.peers.sparsify import sparsify_step


def contestants(args: argparse.Namespace) -> dict[str, Maker]:
    """'type trainer' -> what builds its step."""
    found: dict[str, Maker] = {}
    for kind in args.types:
        found[f"{kind} ours"] = lambda x, a, kind=kind: our_step(kind, x, a)
        found[f"{kind} SAELens"] = lambda x, a, kind=kind: saelens_step(kind, x, a)
        found[f"{kind} dictionary_learning"] = lambda x, a, kind=kind: dictionary_learning_step(kind, x, a)
        if kind == "topk":
            found["topk sparsify"] = lambda x, a: sparsify_step("signum", x, a)
            found["topk sparsify (adam)"] = lambda x, a: sparsify_step("adam", x, a)
    return found
