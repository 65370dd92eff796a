"""Parts in processes of their own: each has a limit, and its tables are in the results' file before the next starts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cuda_visit.part import CHECKS_FAILED
from benchmarks.cuda_visit.place import Place

ROOT = Path(__file__).parents[2]
LEAST_SECONDS = 10.0  # left in the visit, without which no further part starts
POLL_SECONDS = 0.1
TAIL_LINES = 12  # of a failed part's messages in the results


@dataclass(frozen=True)
class Part:
    """Something to check or to time: `target` is "module:function", called with a Place; False: a check failed."""

    name: str
    target: str
    limit: float  # seconds; for a part that starts ahead, from its turn on
    about: str
    ahead: bool = False  # starts with the visit, prepares, and waits for a line on its standard input


@dataclass
class Visit:
    """Carries out parts one after the other until the time is over."""

    place: Place
    results: Path
    seconds: float
    say: Callable[[str], None] = print
    outcomes: dict[str, str] = field(default_factory=dict)  # by part: passed, or what happened

    def carry_out(self, parts: Sequence[Part]) -> bool:
        """Whether all were done and passed. The results' file is appended to and synced after each."""
        end = time.monotonic() + self.seconds
        running: dict[str, _Running] = {}
        try:
            for part in parts:
                if part.ahead:
                    running[part.name] = _Running(part, self.place)
            for part in parts:
                left = end - time.monotonic()
                if left < LEAST_SECONDS:
                    self._record(part, f"not started: {max(left, 0):.0f} s were left", "", 0.0)
                    continue
                self.say(f"[{part.name}] {part.about}; at most {min(part.limit, left):.0f} of {left:.0f} s left")
                process = running.get(part.name) or running.setdefault(part.name, _Running(part, self.place))
                began = time.monotonic()
                outcome = process.finish(min(part.limit, left), self.say)
                self._record(part, outcome, process.printed(outcome), time.monotonic() - began)
        finally:
            for process in running.values():
                process.kill()
        summary = "\n".join(f"- {name}: {outcome}" for name, outcome in self.outcomes.items())
        self._write(f"## Summary\n\n{summary}\n")
        return all(outcome.startswith("passed") for outcome in self.outcomes.values())

    def _record(self, part: Part, outcome: str, printed: str, seconds: float) -> None:
        self.outcomes[part.name] = f"{outcome} ({seconds:.0f} s)"
        self._write(f"## {part.name}: {self.outcomes[part.name]}\n\n{printed}".rstrip() + "\n")

    def _write(self, text: str) -> None:
        self.say(f"\n{text}")
        with self.results.open("a", encoding="utf-8") as file:
            file.write(f"\n{text}")
            file.flush()
            os.fsync(file.fileno())


class _Running:
    """The process of a part, with its children in a group that ends together."""

    def __init__(self, part: Part, place: Place) -> None:
        self._part = part
        self._out, self._err = (place.folder / f"{part.name}.{kind}" for kind in ("out", "err"))
        command = [sys.executable, "-u", "-m", "benchmarks.cuda_visit.part", part.target]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [*command, place.device, str(place.folder)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                cwd=ROOT,
                start_new_session=True,
            )

    def finish(self, limit: float, say: Callable[[str], None]) -> str:
        """Tell the part that it is its turn, show its messages, wait for it; return what became of it."""
        with contextlib.suppress(OSError):  # it has ended already
            assert self._process.stdin is not None
            self._process.stdin.write(b"\n")
            self._process.stdin.close()
        end = time.monotonic() + limit
        with self._err.open(encoding="utf-8", errors="replace") as messages:
            while (code := self._process.poll()) is None and time.monotonic() < end:
                self._show(messages.read(), say)
                time.sleep(POLL_SECONDS)
            self.kill()
            self._show(messages.read(), say)
        if code is None:
            return f"STOPPED after its limit of {limit:.0f} s"
        return {0: "passed", CHECKS_FAILED: "CHECKS FAILED"}.get(code, f"FAILED with exit code {code}")

    def _show(self, text: str, say: Callable[[str], None]) -> None:
        for line in filter(str.strip, text.splitlines()):
            say(f"[{self._part.name}] {line}")

    def printed(self, outcome: str) -> str:
        """The tables, and the last messages unless all is well."""
        tables = self._out.read_text(encoding="utf-8", errors="replace")
        if outcome == "passed":
            return tables
        messages = self._err.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join([tables, "```", *messages, "```"])

    def kill(self) -> None:
        """End the process and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
