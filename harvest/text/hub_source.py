"""Text from a Hugging Face dataset, streamed, with retries: no record is lost or doubled when the network fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from sae_granary.common.errors import one_line
from sae_granary.common.rows import Scalar
from sae_granary.harvest.config import DEFAULT_SPLIT, TextConfig
from sae_granary.harvest.errors import SourceError, SourceStoppedError
from sae_granary.harvest.text.columns import extractor, find_columns
from sae_granary.harvest.text.document import Record, shuffle_name
from sae_granary.harvest.text.kept import check_kept, keep, kept_identity
from sae_granary.models.online import OFFLINE_HINT, online

T = TypeVar("T")
Say = Callable[[str], None]

RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # waits between tries at the same record


class HubSource:
    """A streamed dataset of the hub (or a local folder that `datasets.load_dataset` understands)."""

    seekable = True

    def __init__(self, config: TextConfig, say: Say = lambda message: None) -> None:
        self._config = config = replace(config, split=config.split or DEFAULT_SPLIT)
        self.name, self._say = config.dataset, say
        self.revision = _resolve_revision(config)
        where = f"dataset {config.dataset}"
        if next(self._sample(), None) is None:
            raise SourceError(f"{where}, split {config.split}: no records")
        self.columns = find_columns(self._sample, config.text_columns, where)
        check_kept(self._sample, config.keep_columns, where)

    def _sample(self) -> Iterator[Mapping[str, Any]]:
        return retrying(self._open, 0, RETRY_SECONDS, self._say)

    @property
    def identity(self) -> Mapping[str, Scalar]:
        """Id, revision, config, split, columns and shuffling."""
        return {
            "dataset": self._config.dataset,
            "dataset_revision": self.revision,
            "dataset_config": self._config.dataset_config,
            "split": self._config.split,
            "text_columns": ",".join(self.columns),
            **kept_identity(self._config.keep_columns),
            "shuffle": shuffle_name(self._config),
        }

    def records(self, start: int) -> Iterator[Record]:
        """Records from ordinal `start` on; a network error is tried again from the record where it happened."""
        extract, kept = extractor(self.columns), self._config.keep_columns
        in_order = self._config.shuffle_buffer < 2
        for offset, item in enumerate(retrying(self._open, start, RETRY_SECONDS, self._say)):
            row = start + offset if in_order else -1
            yield Record(extract(item), self._config.dataset, row, columns=keep(item, kept))

    def n_bytes(self) -> int | None:
        """Not known without reading it."""
        return None

    def _open(self, start: int) -> Iterator[Mapping[str, Any]]:
        config = self._config
        stream = _load(config, self.revision)
        if config.shuffle_buffer > 1:
            stream = stream.shuffle(seed=config.shuffle_seed, buffer_size=config.shuffle_buffer)
        return iter(stream.skip(start) if start else stream)


def retrying(
    open_at: Callable[[int], Iterator[T]], start: int, waits: tuple[float, ...], say: Say, sleep: Any = time.sleep
) -> Iterator[T]:
    """Items from `start` on; after a network error the stream is opened again at the item that failed.

    `waits` are the pauses between tries at one item; when they are used up the harvest stops cleanly.
    """
    position, tries = start, 0
    while True:
        try:
            for item in open_at(position):
                yield item
                position, tries = position + 1, 0
            return
        except _network_errors() as error:
            if tries == len(waits):
                raise SourceStoppedError(
                    f"the dataset broke off at record {position:,} after {tries} retries ({one_line(error)}); "
                    "the same command continues from the last committed shard"
                ) from error
            say(f"network error at record {position:,} ({one_line(error)}): retry {tries + 1} in {waits[tries]:.0f} s")
            sleep(waits[tries])
            tries += 1


def _network_errors() -> tuple[type[BaseException], ...]:
    errors: list[type[BaseException]] = [OSError, EOFError]  # also those of sockets and of requests
    for module, name in (("httpx", "HTTPError"), ("httpx2", "HTTPError"), ("aiohttp", "ClientError")):
        try:
            errors.append(getattr(__import__(module), name))
        except (ImportError, AttributeError):
            continue
    return tuple(errors)


def _resolve_revision(config: TextConfig) -> str | None:
    """The commit of the dataset now, so that a harvest continued later reads the same text."""
    from pathlib import Path

    if Path(config.dataset).exists():
        return None
    if not online():
        raise SourceError(f"dataset {config.dataset!r} is not reachable: {OFFLINE_HINT.format(kind='--dataset')}")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return HfApi().dataset_info(config.dataset, revision=config.dataset_revision).sha
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SourceError(
            f"unknown dataset {config.dataset!r}"
            + (f" at revision {config.dataset_revision!r}" if config.dataset_revision else "")
            + f" ({one_line(error)}): give a hub id, a local file or folder, -, or demo"
        ) from error


def _load(config: TextConfig, revision: str | None) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        return datasets.load_dataset(
            config.dataset, config.dataset_config, split=config.split, revision=revision, streaming=True
        )
    except ValueError as error:  # a wrong split or config: datasets names the ones there are
        raise SourceError(f"dataset {config.dataset}: {one_line(error)}") from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise SourceError(f"unknown dataset {config.dataset!r}: {one_line(error)}") from error
    except (RuntimeError, FileNotFoundError) as error:
        raise SourceError(f"dataset {config.dataset} cannot be read: {one_line(error)}") from error
