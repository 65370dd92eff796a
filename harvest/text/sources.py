"""`--dataset` -> the source it means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sae_granary.common.errors import ConfigError
from sae_granary.harvest.config import DEFAULT_DATASET, DEFAULT_DATASET_CONFIG, TextConfig
from sae_granary.harvest.errors import SourceError
from sae_granary.harvest.text.demo_source import DemoSource
from sae_granary.harvest.text.document import TextSource
from sae_granary.harvest.text.formats import COMPRESSED, PLAIN, TABLES
from sae_granary.harvest.text.local_files import FileSource
from sae_granary.harvest.text.stdin_source import StdinSource
from sae_granary.models.demo import DEMO

_HUB_FLAGS = ("--split", "--dataset-config", "--dataset-revision")


def open_source(config: TextConfig, say: Callable[[str], None]) -> TextSource:
    """demo, -, a local file or folder, else a dataset of the hub."""
    if config.dataset == DEMO:
        _refuse(config, "the demo text", (*_HUB_FLAGS, "--text-column", "--documents", "--shuffle-buffer"))
        _refuse(config, "the demo text, which has no columns", ("--keep-columns",))
        return DemoSource()
    if config.dataset == "-":
        _refuse(config, "standard input", _HUB_FLAGS)
        return StdinSource(config)
    path = _local(config.dataset)
    if path.exists():
        _refuse(config, "local files", _HUB_FLAGS[1:] if path.is_dir() else _HUB_FLAGS)
        source = FileSource(replace(config, dataset=str(path)), say)
        if source.kinds.isdisjoint(TABLES):
            _refuse(config, "plain text, which has no columns", ("--text-column", "--keep-columns"))
        if source.kinds.isdisjoint(PLAIN):
            _refuse(config, "tables, which hold a document per record", ("--documents",))
        return source
    suffixes = {suffix.lower() for suffix in path.suffixes}
    if path.is_absolute() or config.dataset.startswith((".", "~")) or suffixes & {*PLAIN, *TABLES, *COMPRESSED}:
        raise SourceError(f"there is no file or folder {config.dataset}: give a path, a dataset of the hub, -, or demo")
    _refuse(config, "a dataset of the hub", ("--documents",))
    if config.dataset == DEFAULT_DATASET and config.dataset_config is None:
        config = replace(config, dataset_config=DEFAULT_DATASET_CONFIG)
    from sae_granary.harvest.text.hub_source import HubSource

    return HubSource(config, say)


def _local(dataset: str) -> Path:
    try:
        return Path(dataset).expanduser()
    except RuntimeError as error:  # ~name of a user that there is not
        raise SourceError(f"--dataset {dataset} names no folder: {error}; give a whole path") from error


def _refuse(config: TextConfig, where: str, flags: tuple[str, ...]) -> None:
    """Refuse flags that are set and would be ignored."""
    values = {
        "--split": config.split,
        "--dataset-config": config.dataset_config,
        "--dataset-revision": config.dataset_revision,
        "--text-column": ",".join(config.text_columns) or None,
        "--keep-columns": ",".join(config.keep_columns) or None,
        "--documents": None if config.documents == "auto" else config.documents,
        "--shuffle-buffer": config.shuffle_buffer or None,
    }
    for flag in flags:
        if values[flag] is not None:
            raise ConfigError(
                f"{flag} {values[flag]} does not apply to --dataset {config.dataset} ({where}): leave it out"
            )
