"""What several test files share: a real model without a hub, two threads, no network."""

import os
import re
import shutil
import subprocess

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_X_SERVICE_WAIT"] = os.environ["WANDB_INIT_TIMEOUT"] = "200"  # seconds; its process may start late
# Tests run in two processes; more threads than cores slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from fork_kit import forks  # noqa: F401

from sae_granary.common import threads
from sae_granary.train.result import notes

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Under CI=true a test that is skipped because it "needs root", Chromium or namespaces has failed."""
    report: Any = yield
    reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
    if os.environ.get("CI") == "true" and re.search(r"\bneeds (root|Chromium|namespaces)\b", reason):
        report.outcome, report.longrepr = "failed", f"{reason}; under CI=true it must run"
    return report


@pytest.fixture(autouse=True, scope="module")
def no_sync() -> Iterator[None]:
    """Tests kill processes, not machines: syncing would only make them wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(autouse=True)
def _commands_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that a test runs and that hangs is killed after 5 minutes, so that it does not outlive its test."""
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: real(*args, **{"timeout": 300, **options}))


@pytest.fixture(autouse=True)
def _silent_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine adds no lines about waits to what a command prints, nor to the notes on a run."""
    monkeypatch.setattr(threads, "FIRST_SECONDS", 1000.0)
    monkeypatch.setattr(notes, "WAITED_SECONDS", 1000.0)


@pytest.fixture(scope="session")
def _written_caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return tmp_path_factory.mktemp("caches"), {}


@pytest.fixture
def make_cache(tmp_path: Path, _written_caches: tuple[Path, dict[str, Path]]) -> Callable[..., Path]:
    """A small cache of sparse mixtures with documents, windows and special tokens; see `write_cache`.

    Each is written once in a session and copied.
    """
    folder, written = _written_caches

    def make(name: str = "toy", **options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in written:
            written[key] = write_cache(folder / str(len(written)), **options)
        return Path(shutil.copytree(written[key], tmp_path / name))

    return make


def write_cache(
    path: Path,
    *,
    n_docs: int = 120,
    d_in: int = 16,
    hooks: tuple[str, ...] = ("layer_3",),
    dtype: str = "float32",
    rows_per_shard: int = 1000,
    decoder: bool = False,
    with_special: bool = True,
    seed: int = 0,
    columns: dict[str, tuple[Any, ...]] | None = None,
    vocabulary: list[str] | None = None,
    source: str = "toy",
    on_document: Callable[[int], None] = lambda doc: None,
) -> Path:
    """Each row is a sparse combination of 4 * d_in directions; each document has 1 to 3 windows of 5 to 40 tokens.

    Document i keeps the value i % n of each of `columns`. `on_document` is called after each document, while the cache
    is being written.
    """
    import numpy as np
    from cache_kit import make_rows

    from sae_granary.cache.format.spec import CacheSpec
    from sae_granary.cache.write.writer import CacheWriter
    from sae_granary.common.rows import FLAG_SPECIAL, FLAG_WINDOW_START, DocumentRow, HookPoint

    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(len(hooks), 4 * d_in, d_in))
    points = tuple(HookPoint(h, f"encoder.{h.replace('_', '.')}", "output", 0, d_in) for h in hooks)
    model = {"id": "toy-model", "revision": None, "kind": "transformer", "is_decoder": decoder}
    kept = columns or {}
    fingerprint, provenance = {"model": "toy", "seed": seed}, {"model": model}
    spec = CacheSpec(
        "token", points, dtype, rows_per_shard, provenance, fingerprint, vocabulary, kept_columns=tuple(kept)
    )
    n_windows = 0
    with CacheWriter.open(path, spec) as writer:
        for doc in range(n_docs):
            writer.begin_buffer({"next_doc": doc})
            lengths = rng.integers(5, 41, size=rng.integers(1, 4))
            position = np.concatenate([np.arange(n) for n in lengths])
            special = np.concatenate([(np.arange(n) == 0) | (np.arange(n) == n - 1) for n in lengths]) & with_special
            n_rows = int(lengths.sum())
            codes = rng.random((n_rows, 4 * d_in)) * (rng.random((n_rows, 4 * d_in)) < 0.05)
            flags = special * FLAG_SPECIAL + (position == 0) * FLAG_WINDOW_START
            vectors = {
                h: (codes @ directions[i] + 0.01 * rng.normal(size=(n_rows, d_in))).astype(np.float32)
                for i, h in enumerate(hooks)
            }
            window = np.repeat(np.arange(n_windows, n_windows + len(lengths)), lengths)
            rows = make_rows(
                vectors, token_id=np.arange(n_rows), doc_id=np.full(n_rows, doc), window=window, position=position,
                doc_position=np.where(special, -1, position), flags=flags,
            )  # fmt: skip
            n_windows += len(lengths)
            values = {name: each[doc % len(each)] for name, each in kept.items()}
            writer.append(rows, [DocumentRow(doc, source, doc, f"document {doc}", values)])
            on_document(doc)
        writer.finish({"documents": n_docs})
    return path
