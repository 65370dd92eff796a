"""Claiming and locking the folders of runs and sweeps; `common.finished_run` defines their contents."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from sae_granary.common import files
from sae_granary.common.errors import ConfigError
from sae_granary.common.files import read_regular
from sae_granary.common.finished_run import CONFIG, RECORD, SUMMARY, NotARunError, read_record
from sae_granary.common.imports.code import code_folder
from sae_granary.common.lock import FolderLock, LockedError
from sae_granary.common.settings.yaml_file import load_yaml
from sae_granary.common.signed import digest
from sae_granary.train.config.merge import from_sections
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.errors import RunExistsError

LOCK = ".lock"
PLAN = "sweep.json"  # of a sweep, which holds the folders of its runs
FAILURE = "failure.json"  # what stopped a run of a sweep


def claim_folder(config: TrainConfig, *, overwrite: bool) -> Path:
    """Create the run's folder. Raises RunExistsError if it is not empty, ConfigError if it cannot be created."""
    try:
        return _claim(config, overwrite=overwrite)
    except RunExistsError:
        raise
    except OSError as error:
        where = Path(config.runs_dir) / str(config.name)
        raise ConfigError(
            f"the run's folder {where} cannot be made: {error.strerror}; change --runs-dir or --name"
        ) from None


def check_name(name: str) -> str:
    """Check the name of a run or sweep folder. Raises ConfigError if it is not a valid folder name."""
    if Path(name).name != name or name in (".", "..") or not name.isprintable():
        raise ConfigError(f"name={name!r}: expected one folder name, without slashes")
    return name


def _claim(config: TrainConfig, *, overwrite: bool) -> Path:
    assert config.name is not None
    folder = Path(config.runs_dir) / config.name
    check_name(config.name)
    refuse_code(folder)
    if is_sweep(folder):
        raise RunExistsError(
            f"{folder} is a sweep: continue it with sae-train resume {folder}, or choose another --name"
        )
    if folder.exists() and not is_unused(folder):
        ours = (folder / RECORD).is_file()
        if not (overwrite and ours):
            continued = (
                "" if (folder / SUMMARY).is_file() or not ours else f"continue it with: sae-train resume {folder}, "
            )
            replaced = ", or replace it with --overwrite" if ours else ""
            raise RunExistsError(f"{folder} exists: {continued}choose another --name{replaced}")
        _remove(folder, config.init_from)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def refuse_code(folder: Path, options: str = "--runs-dir or --name") -> None:
    """Refuse folders of Python code as a place for results. Raises RunExistsError."""
    if code := code_folder(folder):
        raise RunExistsError(f"{folder} belongs to Python code ({code.name}/): choose another {options}")


def _remove(folder: Path, *starts: str | None) -> None:
    """Remove a run or a sweep that no process trains and that nothing starts from (`init_from`)."""
    for start in starts:
        if start is not None and Path(start).resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"init_from={start} is inside {folder}, which --overwrite removes: choose another --name")
    with ExitStack() as held:
        for lock in [folder / LOCK, *folder.glob(f"*/{LOCK}")]:
            held.enter_context(exclusive(lock.parent))
        shutil.rmtree(folder)


def claim_sweep_folder(folder: Path, *, overwrite: bool, starts: Sequence[str | None] = ()) -> None:
    """Make a sweep's folder; `starts` are what its SAEs start from.

    Raises RunExistsError if it holds anything else or is being trained, ConfigError if it cannot be made.
    """
    refuse_code(folder)
    used = folder.exists() and not is_unused(folder)
    if used and not (overwrite and is_sweep(folder)):
        raise RunExistsError(f"{folder} exists and is not a sweep: choose another --name")
    try:
        if used:
            _remove(folder, *starts)
        folder.mkdir(parents=True, exist_ok=True)
    except RunExistsError:
        raise
    except OSError as error:
        raise ConfigError(f"the sweep's folder {folder} cannot be made: {error.strerror}; change --runs-dir") from None


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep."""
    return (folder / PLAN).is_file()


def check_one_run(folder: Path) -> None:
    """Refuse a sweep where a single run is expected. Raises ConfigError with the runs in it."""
    if is_sweep(folder):
        runs = sorted(path.parent.name for path in folder.glob(f"*/{RECORD}"))
        named = f"{', '.join(runs[:4])}{', ...' if len(runs) > 4 else ''}" or "none yet"
        raise ConfigError(f"{folder} is a sweep of several runs: name one of the folders in it ({named})")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock a run's folder. Raises RunExistsError while another process trains in it, NotARunError if it is gone."""
    lock = FolderLock(folder / LOCK)
    try:
        lock.acquire()
    except LockedError as error:
        raise RunExistsError(f"{folder} is being trained by {error.holder}: wait for it or stop it") from None
    except FileNotFoundError:
        raise NotARunError(f"{folder} was removed by another process: run the same command again") from None
    try:
        yield
    finally:
        lock.release()


def is_unused(folder: Path) -> bool:
    """Whether a folder holds only what a start leaves behind that was killed immediately."""
    if not folder.is_dir():
        return False
    return all(p.name in (CONFIG, LOCK) or p.name.startswith(files.TEMP_PREFIX) for p in folder.iterdir())


def read_run(folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The resolved config and the record of a run's folder. Raises NotARunError."""
    record, path = read_record(folder), folder / CONFIG
    try:
        data = read_regular(path)
        if digest(data) != record.get("config_xxh3", digest(data)):
            raise NotARunError(
                f"{path} was changed since the run started, which resumes with its own settings only: restore the "
                f"file, or start a new run with: sae-train run --config {path} --name NEW"
            )
        content = load_yaml(data.decode())
    except NotARunError:
        raise
    except FileNotFoundError:
        raise NotARunError(f"{folder} holds no run: {CONFIG} is missing") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise NotARunError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise NotARunError(f"{path} holds no settings")
    return from_sections(content, str(path)), record
