"""The commands of the other stages, as processes: nothing of them is imported."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import typer

from sae_granary.common.signals import handled_by


def cache_folder(model: str, dataset: str, layers: str, max_tokens: str, others: Sequence[str]) -> Path:
    """cache/<model>_<dataset>_l<layers>_<tokens>; further flags add a hash, so that each harvest has a folder."""
    last = [re.split(r"[\\/]", text.rstrip("/"))[-1] for text in (model, dataset)]
    parts = [*last, "l" + layers.replace(",", "-"), max_tokens.lower()]
    if others:
        parts.append(hashlib.sha256("\0".join(others).encode()).hexdigest()[:6])
    return Path("cache") / re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(parts))


def run_stage(stage: str, *arguments: str) -> None:
    """Run a stage's command, which answers signals itself; raise typer.Exit with its exit code if it failed."""
    with subprocess.Popen([sys.executable, "-m", f"sae_granary.{stage}.cli", *arguments]) as process:

        def forward(signum: int, frame: FrameType | None) -> None:
            if signum != signal.SIGINT:  # a terminal sends that one to both
                process.send_signal(signum)

        with handled_by(forward):
            code = process.wait()
    if code:
        raise typer.Exit(code if code > 0 else 128 - code)
