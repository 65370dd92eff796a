"""The text files of a folder, and why other files are left out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sae_granary.cache.format.layout import MANIFEST
from sae_granary.cache.format.signed import FORMAT
from sae_granary.common.errors import ConfigError
from sae_granary.harvest.config import DEFAULT_SPLIT
from sae_granary.harvest.errors import SourceError
from sae_granary.harvest.text.formats import PLAIN, TABLES, json_object, kind_of, known_suffixes

ALL_SPLITS = "all"
_CARDS = {"readme", "license", "licence", "notice", "citation", "changelog"}
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # of the library datasets
_SPLIT = re.compile(r"(?:^|[-._ ])(train|training|validation|valid|dev|val|test|testing|eval|evaluation)(?:[-._ \d]|$)")
_SPLIT_NAMES = {"training": "train", "testing": "test", "eval": "test", "evaluation": "test"} | dict.fromkeys(
    ("valid", "dev", "val"), "validation"
)  # as datasets names them
_SHOWN = 3  # names of left out files per reason


@dataclass
class Folder:
    """Contents of a folder."""

    path: Path
    files: dict[Path, None] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)  # reason -> names

    def leave_out(self, file: Path, reason: str) -> None:
        """Exclude a file or folder, and record why."""
        self.left_out.setdefault(reason, []).append(self.name(file))
        self.files.pop(file, None)

    def name(self, file: Path) -> str:
        """The path relative to the folder; it determines the order of files."""
        return file.relative_to(self.path).as_posix()

    def __str__(self) -> str:
        parts = []
        for reason, names in self.left_out.items():
            shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")
            parts.append(f"{shown} ({reason})")
        return "; ".join(parts)


def find_files(path: Path, split: str | None, say: Callable[[str], None]) -> list[Path]:
    """A file itself, or the files of a folder that are its text, sorted by their paths. Raises SourceError."""
    if path.is_file():
        if kind_of(path) not in PLAIN + TABLES:
            raise SourceError(f"{path} is not a text file known here: {known_suffixes()}, also with .gz or .zst")
        if path.stat().st_size == 0:
            raise SourceError(f"{path} is an empty file: give a file with text")
    elif not path.is_dir():
        raise SourceError(
            f"{path} is neither a file nor a folder (a device or a pipe): "
            "give a file, a folder, or - for standard input"
        )
    folder = Folder(path)
    if path.is_file():
        folder.files[path] = None
    else:
        if _is_cache(path):
            raise SourceError(f"{path} is an activation cache, not a dataset: give the text it was harvested from")
        _collect(folder)
    _choose_split(folder, split)
    left_out = f"; left out: {folder}" if folder.left_out else ""
    if not folder.files:
        raise SourceError(f"the folder {path} holds no {known_suffixes()} files{left_out}")
    if left_out:
        say(f"reading {len(folder.files):,} of the files in {path}{left_out}")
    return sorted(folder.files, key=folder.name)


def _collect(folder: Folder) -> None:
    """All files below a folder that may be text, except cards and descriptions."""
    found = list(_walk(folder, folder.path, set()))
    for file in found:
        if kind_of(file) not in PLAIN + TABLES:
            folder.leave_out(file, f"unknown ending {file.suffix}" if file.suffix else "no ending")
        elif file.name in _ABOUT and (file.parent / "dataset_info.json" in found or file.name != "state.json"):
            folder.leave_out(file, "describes the dataset")
        else:
            folder.files[file] = None
    for about in [file for file in found if file.name in ("state.json", "dataset_info.json")]:
        _leave_out_leftovers(folder, about)
    for card in [file for file in folder.files if file.name.split(".")[0].lower() in _CARDS]:
        others = [kind_of(file) for file in folder.files if file != card]
        if others and kind_of(card) in PLAIN and (kind_of(card) not in others or set(others) & set(TABLES)):
            folder.leave_out(card, "about the data")


def _leave_out_leftovers(folder: Folder, about: Path) -> None:
    """Exclude leftovers of the datasets library: results of `map` and `filter`, and shards of earlier saves."""
    beside = [file for file in folder.files if file.parent == about.parent and file.suffix == ".arrow"]
    saved = json_object(about.read_text(encoding="utf-8", errors="replace")) or {}
    if about.name == "dataset_info.json" and not about.with_name("state.json").is_file():  # in the cache of datasets
        old = {file for file in beside if file.name.startswith("cache-")}
    elif isinstance(listed := saved.get("_data_files"), list):
        old = {file for file in beside if {"filename": file.name} not in listed}
        if missing := len(listed) - len(beside) + len(old):
            raise SourceError(f"{missing} of the {len(listed)} files that {about} lists are missing: save it again")
    else:
        return
    if saved.get("_indices_data_files"):
        raise SourceError(
            f"{about.parent} holds rows that its indices.arrow selects: load and save it again with a newer datasets"
        )
    for file in sorted(old):
        folder.leave_out(file, "left over beside the saved dataset")


def _walk(folder: Folder, path: Path, seen: set[Path]) -> Iterator[Path]:
    """Regular files below a path, following links; each folder once."""
    for entry in sorted(path.iterdir()):
        if entry.name.startswith("."):
            folder.leave_out(entry, "hidden")
        elif entry.is_dir():
            real = entry.resolve()
            inside = entry.is_symlink() and real.is_relative_to(folder.path.resolve())
            if inside or real in seen or folder.path.resolve().is_relative_to(real):
                folder.leave_out(entry, "a link to a folder that is read already")
            elif _is_cache(entry):
                folder.leave_out(entry, "an activation cache")
            else:
                seen.add(real)
                yield from _walk(folder, entry, seen)
        elif entry.is_file():
            yield entry
        else:
            folder.leave_out(entry, "no regular file")


def _choose_split(folder: Folder, wanted: str | None) -> None:
    """Of a folder whose every file names its split only one is read: the one wanted, else `train`."""
    try:
        saved = set(json.loads((folder.path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError):
        saved = set()
    parts = {file: file.relative_to(folder.path).parts for file in folder.files}
    splits = {file: split for file in folder.files if (split := _split_of(parts[file], saved)) is not None}
    names = sorted(set(splits.values()))
    if len(names) < 2 or len(splits) < len(folder.files):
        if wanted is not None:
            where = f"{folder.path} (local files without several splits)"
            raise ConfigError(f"--split {wanted} does not apply to --dataset {where}: leave it out")
        return
    chosen = wanted or DEFAULT_SPLIT
    if chosen not in (*names, ALL_SPLITS):
        raise SourceError(
            f"the folder {folder.path} holds the splits {', '.join(names)}: name one with --split, or {ALL_SPLITS}"
        )
    for file, split in splits.items():
        if chosen not in (split, ALL_SPLITS):
            folder.leave_out(file, f"split {split}")


def _split_of(parts: tuple[str, ...], saved: set[str]) -> str | None:
    """The split that a file or a folder above it is named after, as the library datasets names and saves them."""
    if len(parts) > 1 and parts[0] in saved:
        return parts[0]
    found = next((match[1] for part in parts if (match := _SPLIT.search(part.lower()))), None)
    return None if found is None else _SPLIT_NAMES.get(found, found)


def _is_cache(folder: Path) -> bool:
    """Whether a folder is an activation cache, whose .json and .parquet files are not text to harvest."""
    if not os.path.isfile(folder / MANIFEST):
        return False
    try:
        manifest = json_object((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return manifest is not None and manifest.get("format") == FORMAT
