"""The sinks of a run. A new kind of sink is one module of this folder that says when it is opened:

@register
def opened(config: TrainConfig, folder: Path, run_id: str) -> BaseSink | None:
    return MySink(folder) if config.my_setting else None
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path

from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.sinks.jsonl_sink import JsonlSink
from sae_granary.train.sinks.sink import BaseSink, Sinks

# From the settings, the run's folder and an id that stays over resumes to a sink, or None if it is not asked for.
Opener = Callable[[TrainConfig, Path, str], BaseSink | None]

_OPENERS: dict[str, Opener] = {}


def register(opener: Opener) -> Opener:
    """Decorator: call this function when the sinks of a run are opened."""
    _OPENERS[opener.__module__] = opener
    return opener


def open_sinks(config: TrainConfig, folder: Path, run_id: str, extra: Sequence[BaseSink] = ()) -> Sinks:
    """metrics.jsonl, the registered sinks that the settings ask for, and those given."""
    package = importlib.import_module("sae_granary.train.sinks")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    opened = [opener(config, folder, run_id) for opener in _OPENERS.values()]
    return Sinks([JsonlSink(folder), *filter(None, opened), *extra])
