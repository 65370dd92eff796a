"""Training batches of a run from any step on: shuffled rows, or whole contexts through the language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sae_granary.cache.load.loader import Batch, Loader, LoaderState
from sae_granary.cache.load.whole_contexts import Contexts, ContextsState
from sae_granary.models.language.language_model import LanguageModel
from sae_granary.train.config.phases import first_context_step
from sae_granary.train.config.resolve import selection_of
from sae_granary.train.data.language import training_contexts
from sae_granary.train.data.run_data import RunData
from sae_granary.train.spliced_input import SplicedInput
from sae_granary.train.step_input import RowInput


def open_stream(runs: Sequence[RunData], state: LoaderState | None = None) -> Loader:
    """One loader of endless training batches for runs of equal `stream_key`: the rows of all their hook points."""
    first, config = runs[0], runs[0].config
    return Loader(
        first.cache,
        list(dict.fromkeys(hook for run in runs for hook in run.config.hook)),
        batch_size=config.batch_size,
        device=config.device,
        selection=selection_of(config),
        state=state,
        previous=first.reads_previous,
        counts=first.counts,
        order=first.order,
        share=first.share,
    )


class RunStream:
    """One stream for runs of equal `RunData.stream_key`, from a step on.

    `state` is that of the newest batch taken. At the first step of contexts it is still the loader's, and the contexts
    start with the first of the cache.
    """

    def __init__(self, runs: Sequence[RunData], state: LoaderState, step: int) -> None:
        self._runs, self._step = runs, step
        self._first_context_step = first_context_step(runs[0].config)
        self._loader = None if self._at_contexts else open_stream(runs, state)
        begun = self._first_context_step is not None and step > self._first_context_step
        self._state = ContextsState(state.epoch, state.cursor) if begun else ContextsState()
        self._contexts: Iterator[Contexts] | None = None

    @property
    def _at_contexts(self) -> bool:
        return self._first_context_step is not None and self._step >= self._first_context_step

    def __next__(self) -> Batch | Contexts:
        if not self._at_contexts:
            assert self._loader is not None
            self._step += 1
            return next(self._loader)
        if self._contexts is None:
            self.close()
            self._contexts = training_contexts(self._runs[0], self._state)
        self._step += 1
        return next(self._contexts)

    def close(self) -> None:
        """Stop the loader's threads."""
        if self._loader is not None:
            self._loader.close()


def step_input(data: RunData, batch: Batch | Contexts) -> RowInput | SplicedInput:
    """A run's step input from a batch of its stream."""
    if isinstance(batch, Batch):
        assert isinstance(batch.x, dict)
        sizes = None if data.share.n == 1 else data.share.sizes(data.config.batch_size)
        return RowInput(data.inputs(batch.x), data.limits, sizes, data.config.batch_size)
    assert isinstance(data.language_model, LanguageModel)
    finetunes = data.config.finetune_kl is not None
    return SplicedInput(data.language_model, batch, "kl" if finetunes else data.config.options["loss"], finetunes)


def state_after(data: RunData, batch: Batch | Contexts) -> LoaderState:
    """The stream's state after a batch, as a checkpoint stores it; for contexts the cursor is their reader's."""
    if isinstance(batch, Batch):
        return batch.state
    return LoaderState(data.order.seed, batch.state.epoch, batch.state.cursor)


def state_to_resample(data: RunData, step: int, state: LoaderState) -> LoaderState:
    """Where the rows start that dead latents are resampled from after a step, which left the stream at `state`."""
    first_context = first_context_step(data.config)
    at_contexts = first_context is not None and step > first_context  # whose state is not the loader's
    return LoaderState(data.order.seed) if at_contexts else state
