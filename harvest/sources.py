"""`--dataset` -> the source it means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from harvest.config import DEFAULT_DATASET, DEFAULT_DATASET_CONFIG, TextConfig
from harvest.demo import DEMO, DemoSource
from harvest.errors import SourceError
from harvest.file_formats import COMPRESSED, PLAIN, TABLES
from harvest.text import TextSource
from harvest.text_files import FileSource, StdinSource


def open_source(config: TextConfig, say: Callable[[str], None]) -> TextSource:
    """demo, -, a local file or folder, else a data set of the hub."""
    if config.dataset == DEMO:
        return DemoSource()
    if config.dataset == "-":
        return StdinSource(config)
    path = Path(config.dataset).expanduser()
    if path.exists():
        return FileSource(replace(config, dataset=str(path)))
    suffixes = {suffix.lower() for suffix in path.suffixes}
    if path.is_absolute() or config.dataset.startswith((".", "~")) or suffixes & {*PLAIN, *TABLES, *COMPRESSED}:
        raise SourceError(
            f"there is no file or folder {config.dataset}: give a path, a data set of the hub, -, or demo"
        )
    if config.dataset == DEFAULT_DATASET and config.config is None:
        config = replace(config, config=DEFAULT_DATASET_CONFIG)
    from harvest.text_hub import HubSource

    return HubSource(config, say)
