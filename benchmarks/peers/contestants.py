"""Who takes part in which type."""

import argparse
from functools import partial

from benchmarks.peers.contest import Trainer
from benchmarks.peers.dictionary_learning import dictionary_learning_steps
from benchmarks.peers.ours import our_steps
from benchmarks.peers.saelens import saelens_steps
from benchmarks.peers.sparsify import sparsify_steps


def contestants(args: argparse.Namespace) -> dict[str, Trainer]:
    """'type trainer' -> what takes its steps."""
    found: dict[str, Trainer] = {}
    for kind in args.types:
        found[f"{kind} ours"] = partial(our_steps, kind)
        found[f"{kind} SAELens"] = partial(saelens_steps, kind)
        found[f"{kind} dictionary_learning"] = partial(dictionary_learning_steps, kind)
        if kind == "topk":
            found["topk sparsify"] = partial(sparsify_steps, "signum")
            found["topk sparsify (adam)"] = partial(sparsify_steps, "adam")
    return found
