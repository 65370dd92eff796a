"""`about.json`: when, by what command and on what kind of machine a cache was written; no compared data."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

from sae_granary.cache.format.layout import ABOUT
from sae_granary.common import files

_SECRET_FLAG = re.compile(r"--?(?:[\w-]*[-_])?(?:token|secret|password|passwd|credential|key)s?", re.IGNORECASE)
_NOT_SECRET = re.compile(r"--(?:max|batch|exclude|buffer|dead-after|calibration)[\w-]*tokens?", re.IGNORECASE)
_SECRET = re.compile(r"hf_\w{6,}|sk-[\w-]{8,}|AKIA\w{8,}|(?<=://)[^/@\s]+@|(?<=[?&])[^\s]*", re.ASCII)
HIDDEN = "***"


def record_about(path: Path, *, user: bool = False) -> None:
    """Add a run to the file of the cache at `path`, where that can be written."""
    entry = {"when": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": command_line(sys.argv), "machine": machine()}
    if user:
        entry["user"] = _user()
    with contextlib.suppress(OSError):
        files.write_json(path / ABOUT, {"runs": [*read_about(path), entry]})


def add_user(path: Path) -> None:
    """Add the user's name to the last run of the file, where that can be written."""
    runs = read_about(path)
    if runs:
        runs[-1]["user"] = _user()
        with contextlib.suppress(OSError):
            files.write_json(path / ABOUT, {"runs": runs})


def read_about(path: Path) -> list[dict[str, Any]]:
    """The runs recorded for a cache, oldest first; none where the file is missing or damaged."""
    try:
        runs = json.loads(files.read_regular(path / ABOUT))["runs"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
    return [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []


def command_line(arguments: list[str]) -> list[str]:
    """A command line without secrets: values of flags that name one, tokens, logins and queries of URLs, the home."""
    home, kept, hide = os.path.expanduser("~"), [Path(arguments[0]).name if arguments else ""], False
    for argument in arguments[1:]:
        flag, equals, _ = argument.partition("=")
        secret = bool(_SECRET_FLAG.fullmatch(flag)) and not _NOT_SECRET.fullmatch(flag)
        if hide and not argument.startswith("--"):
            kept.append(HIDDEN)
        elif secret and equals:
            kept.append(f"{flag}={HIDDEN}")
        else:
            kept.append(_SECRET.sub(HIDDEN, argument.replace(home, "~") if home != "/" else argument))
        hide = secret and not equals
    return kept


def machine() -> dict[str, Any]:
    """The kind of machine: processor, cores, and the GPU where torch is loaded and sees one. No host name."""
    gpu = None
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    return {"system": platform.system(), "cpu": _processor(), "cores": os.cpu_count(), "gpu": gpu}


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container without names
        return "unknown"


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
