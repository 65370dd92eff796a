"""Whole contexts for a run through its language model: to train on and to evaluate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sae_granary.cache.load.selection import Part
from sae_granary.cache.load.whole_contexts import Contexts, ContextsState, read_contexts
from sae_granary.models.language.language_model import LanguageModel
from sae_granary.train.config.phases import first_context_step
from sae_granary.train.config.resolve import selection_of
from sae_granary.train.data.run_data import RunData
from sae_granary.train.memory.capacity import check_logits

EVALUATION_ROWS = 2**10  # in one pass through a language model: each predicts its whole vocabulary


def check_language_model(data: RunData) -> None:
    """Load the model if the run goes through it, so that its problems are reported before anything is spent.

    Raises SpliceError, SelectionError, or ConfigError where its predictions do not fit the memory.
    """
    if isinstance(data.language_model, LanguageModel) and first_context_step(data.config) is not None:
        check_logits(data.config, data.language_model.vocab_size)


def training_contexts(data: RunData, state: ContextsState | None = None) -> Iterator[Contexts]:
    """Endless batches of whole contexts, shuffled in each epoch, of at most `batch_size` rows each."""
    return _contexts(data, "train", data.config.batch_size, state=state, seed=data.order.seed)


def evaluation_contexts(data: RunData) -> Iterator[Contexts]:
    """The first contexts of the evaluated part, in micro-batches, with about `downstream_rows` rows."""
    taken = 0
    size = min(data.config.batch_size // data.config.grad_acc_steps, EVALUATION_ROWS)
    for batch in _contexts(data, data.eval_part, size, epochs=1):
        yield batch
        taken += batch.n_rows
        if taken >= data.config.downstream_rows:
            return


def _contexts(data: RunData, part: Part, batch_rows: int, **options: Any) -> Iterator[Contexts]:
    selection = selection_of(data.config, part)
    return read_contexts(data.cache, data.config.hook[0], batch_rows=batch_rows, selection=selection, **options)
