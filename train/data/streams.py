"""The batches of a run from any of its steps on: shuffled rows, and whole windows where it goes through the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sae_granary.cache.load.loader import Batch, LoaderState
from sae_granary.cache.load.whole_contexts import Contexts, ContextsState
from sae_granary.models.language.language_model import LanguageModel
from sae_granary.train.config.phases import first_window_step
from sae_granary.train.data.run_data import RunData, open_stream
from sae_granary.train.spliced_input import SplicedInput
from sae_granary.train.step_input import RowInput


class RunStream:
    """One stream for runs of equal `RunData.stream_key`, from a step on.

    `state` is that of the newest batch taken. At the first step of windows it is still the loader's, and the windows
    start with the first of the cache.
    """

    def __init__(self, runs: Sequence[RunData], state: LoaderState, step: int) -> None:
        self._runs, self._step = runs, step
        self._first_window_step = first_window_step(runs[0].config)
        self._loader = None if self._at_windows else open_stream(runs, state)
        begun = self._first_window_step is not None and step > self._first_window_step
        self._state = ContextsState(state.epoch, state.cursor) if begun else ContextsState()
        self._windows: Iterator[Contexts] | None = None

    @property
    def _at_windows(self) -> bool:
        return self._first_window_step is not None and self._step >= self._first_window_step

    def __next__(self) -> Batch | Contexts:
        if not self._at_windows:
            assert self._loader is not None
            self._step += 1
            return next(self._loader)
        if self._windows is None:
            self.close()
            self._windows = self._runs[0].windows(self._state)
        self._step += 1
        return next(self._windows)

    def close(self) -> None:
        """Stop the loader's threads."""
        if self._loader is not None:
            self._loader.close()


def step_input(data: RunData, batch: Batch | Contexts) -> RowInput | SplicedInput:
    """What a run's step takes of a batch of its stream."""
    if isinstance(batch, Batch):
        assert isinstance(batch.x, dict)
        return RowInput(data.inputs(batch.x))
    assert isinstance(data.language_model, LanguageModel)
    finetunes = data.config.finetune_kl is not None
    return SplicedInput(data.language_model, batch, "kl" if finetunes else data.config.options["loss"], finetunes)


def state_after(data: RunData, batch: Batch | Contexts) -> LoaderState:
    """Where the stream stands behind a batch, as a checkpoint keeps it: of windows the cursor is their reader's."""
    if isinstance(batch, Batch):
        return batch.state
    return LoaderState(data.order.seed, batch.state.epoch, batch.state.cursor)
