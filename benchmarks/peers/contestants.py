"""Who takes part in which type."""

from functools import partial

from benchmarks.peers.contest import Trainer
from benchmarks.peers.dictionary_learning import dictionary_learning_steps
from benchmarks.peers.ours import our_steps
from benchmarks.peers.saelens import saelens_steps
from benchmarks.peers.sparsify import sparsify_steps


def contestants(kind: str) -> dict[str, Trainer]:
    """Who trains a type, by name."""
    found: dict[str, Trainer] = {
        "ours": partial(our_steps, kind),
        "SAELens": partial(saelens_steps, kind),
        "dictionary_learning": partial(dictionary_learning_steps, kind),
    }
    if kind == "topk":
        found["sparsify"] = partial(sparsify_steps, "signum")
        found["sparsify (adam)"] = partial(sparsify_steps, "adam")
    return found
