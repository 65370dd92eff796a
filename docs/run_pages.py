"""Run the code of documentation pages and, with --write, put what it prints into their output blocks.

    python docs/run_pages.py docs/recipes/gpt2_sweep.md            # run, and show where the output differs
    python docs/run_pages.py --write docs/recipes/*.md             # and rewrite the output blocks

A page runs from top to bottom in a folder that is empty but for what it reads without making it: the cache and runs of
`sae-train demo`, and `gpt2`, the small GPT-2 of `docs/tiny_gpt2.py`. `sh` blocks run line by line; the `python` blocks
of a page share one namespace. The `text` block after a block of code is its output; one with a line `...` shows the
beginning and the end. A comment `<!-- not run: reason -->` above a block excludes it, `<!-- file: examples/x.py -->`
says which file a block repeats. `tests/test_docs_code.py` runs all pages this way.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher, unified_diff
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE, OUTPUT = ("python", "sh"), ("text", "console")
DATA = ("bibtex", "csv", "html", "json", "mermaid", "toml", "yaml")
WIDTH = 100  # columns of printed tables
COMMANDS = {f"sae-{room}": f"sae_granary.{room}.cli" for room in ("harvest", "cache", "train", "analyze")}
BLOCK = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>```+|~~~+)(?P<language>[^\n]*)\n(?P<body>.*?)^(?P=indent)(?P=fence)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
# Page -> what is made before it runs, in its folder.
BEFORE = {
    "analyze.md": "sae-analyze encode runs/demo_batchtopk --pool max --format npz --out documents.npz",
    "tickets.md": f"python {ROOT}/tests/tickets.py tickets.csv 5000 && python {ROOT}/tests/tickets.py new.csv 500 1",
}
COMMENT = re.compile(r"<!--\s*(not run|file|made by):\s*((?:(?!-->).)*?)\s*-->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text without indentation, where it is, and the comment above it."""

    language: str
    text: str
    line: int
    start: int  # the body's place in the page
    end: int
    not_run: str | None  # reason
    file: str | None  # what it repeats


def blocks_of(page: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found = []
    for match in BLOCK.finditer(page):
        comment = COMMENT.search(page[: match.start()])
        kind, said = (comment[1], comment[2]) if comment else (None, None)
        language = match["language"].strip().split(" ")[0]
        line = page.count("\n", 0, match.start()) + 1
        start, end = match.span("body")
        not_run, file = (said if kind == "not run" else None), (said if kind == "file" else None)
        found.append(Block(language, textwrap.dedent(match["body"]), line, start, end, not_run, file))
    return found


def lines_of(shell: str) -> list[str]:
    """The commands of a sh block: lines joined at a backslash, without comments and empty lines."""
    joined = re.sub(r"\\\n\s*", "", shell)
    return [line for line in joined.splitlines() if shlex.split(line, comments=True)]


class PageError(Exception):
    """A block failed; says which and what it printed."""


class Runner:
    """Runs blocks in one folder, python in one namespace. Use as a context: it restores the current folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._module = types.ModuleType("__page__")  # dataclasses look up the module of a class
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Runner:
        sys.modules["__page__"] = self._module
        self._stack.callback(sys.modules.pop, "__page__")
        self._stack.enter_context(contextlib.chdir(self.folder))
        self._stack.enter_context(_environment({"COLUMNS": str(WIDTH), "MPLBACKEND": "Agg", "NO_COLOR": "1"}))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(self, block: Block) -> str:
        """What the block printed to standard output. Raises PageError if it fails."""
        try:
            if block.language == "python":
                return self._python(block)
            return "".join(self._command(line) for line in lines_of(block.text))
        except PageError as error:
            raise PageError(f"block at line {block.line}: {error}") from error

    def _python(self, block: Block) -> str:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * block.line + block.text, "<page>", "exec"), self._module.__dict__)
        except Exception as error:
            raise PageError(f"{printed.getvalue()}\n{error!r}") from error
        return printed.getvalue()

    def _command(self, line: str) -> str:
        words = shlex.split(line, comments=True)
        if words[0] not in COMMANDS or {"|", ">", "&&", ";"} & set(words):
            return self._shell(line)
        from typer.testing import CliRunner

        result = CliRunner().invoke(importlib.import_module(COMMANDS[words[0]]).app, words[1:])
        if result.exit_code:
            raise PageError(f"{line}\n{result.output}\n{result.exception!r}") from result.exception
        return str(result.stdout)

    def _shell(self, line: str) -> str:
        """Through a shell, in which the commands of this checkout are found."""
        with tempfile.TemporaryDirectory() as bin_folder:
            for name, module in COMMANDS.items():
                script = Path(bin_folder, name)
                script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n', encoding="utf-8")
                script.chmod(0o755)
            path = os.pathsep.join([bin_folder, str(Path(sys.executable).parent), os.environ["PATH"]])
            env = os.environ | {"PATH": path, "PYTHONPATH": os.pathsep.join([str(ROOT), *_pythonpath()])}
            done = subprocess.run(["sh", "-c", line], env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PageError(f"{line}\n{done.stdout}\n{done.stderr}")
        return done.stdout


def run_page(text: str, folder: Path) -> Iterator[tuple[Block, str, Block | None]]:
    """Each block that runs, what it printed, and the output block that follows it (if one does)."""
    blocks = blocks_of(text)
    with Runner(folder) as runner:
        for block, after in zip(blocks, [*blocks[1:], None], strict=True):
            if block.language in CODE and block.not_run is None:
                shown = after if after is not None and after.language in OUTPUT and after.not_run is None else None
                yield block, runner.run(block), shown


def likeness(printed: str, shown: str) -> float:
    """How well the lines of `shown` are found in `printed`, 0 to 1, by their words: numbers differ between machines.

    Each line counts with its most similar one, so a page may show an excerpt.
    """
    wanted, there = ([re.findall(r"[A-Za-z_]{2,}", line) for line in text.splitlines()] for text in (shown, printed))
    best = [max((_ratio(words, line) for line in there), default=0.0) for words in wanted if words]
    return sum(best) / len(best) if best else 1.0


def _ratio(first: list[str], second: list[str]) -> float:
    return SequenceMatcher(None, first, second, autojunk=False).ratio()


def elided(printed: str, shown: str) -> str:
    """`printed`, shortened as `shown` is: as many lines before and after a line `...`."""
    new, old = [line.rstrip() for line in printed.rstrip().splitlines()], shown.rstrip().splitlines()
    at = next((i for i, line in enumerate(old) if line.strip() == "..."), None)
    if at is None or at + len(old) - at - 1 >= len(new):
        return "\n".join(new) + "\n"
    return "\n".join([*new[:at], old[at], *new[len(new) - (len(old) - at - 1) :]]) + "\n"


def prepare(page: Path, folder: Path, store: Path, *, commands: bool = True) -> None:
    """Put into a page's folder what it starts from; `store` keeps what several pages start from, made when needed.

    Without `commands`, those of the page will not run: what they would make of the demo is there too.
    """
    text = page.read_text(encoding="utf-8")
    if reads_the_demo(text) or not commands:
        if not (store / "runs").exists():
            make_demo(store)
        for name in ("cache", "runs"):
            shutil.copytree(store / name, folder / name, dirs_exist_ok=True)
    if "--model gpt2" in text and commands:
        if not (store / "gpt2").exists():
            subprocess.run([sys.executable, str(ROOT / "docs" / "tiny_gpt2.py"), str(store / "gpt2")], check=True)
        shutil.copytree(store / "gpt2", folder / "gpt2")
    if page.name in BEFORE:
        with Runner(folder) as runner:
            runner.run(Block("sh", BEFORE[page.name], 0, 0, 0, None, None))


def make_demo(folder: Path) -> None:
    """What `sae-train demo` makes, in full: cache/demo_l3, runs/demo_topk and runs/demo_batchtopk."""
    with Runner(folder) as runner:
        runner.run(Block("sh", "sae-train demo --quiet", 0, 0, 0, None, None))


def reads_the_demo(text: str) -> bool:
    """Whether a page reads the demo's cache or runs without making them."""
    made = re.search(r"^sae-train demo|--out cache/demo_l3|^make demo", text, re.MULTILINE)
    return made is None and re.search(r"cache/demo_l3|runs/demo_", text) is not None


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _pythonpath() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def rewritten(page: Path, folder: Path) -> str:
    """The page with the output of its blocks as they print it now. Runs it."""
    text = page.read_text(encoding="utf-8")
    parts, at = [], 0
    for block, printed, shown in run_page(text, folder):
        print(f"{page}:{block.line}: {block.language}, {len(printed.splitlines())} lines", flush=True)
        if shown is not None:
            parts += [text[at : shown.start], elided(printed, shown.text)]
            at = shown.end
    return "".join([*parts, text[at:]])


def main() -> None:
    """Run pages; see the docstring of the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path, help="Markdown files")
    parser.add_argument("--write", action="store_true", help="rewrite the output blocks")
    parser.add_argument("--store", type=Path, help="folder that keeps the demo and the small GPT-2 for the next time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        for page in options.pages:
            with tempfile.TemporaryDirectory() as folder:
                before = page.read_text(encoding="utf-8")
                prepare(page, Path(folder), options.store or Path(made))
                after = rewritten(page, Path(folder))
            if options.write:
                page.write_text(after, encoding="utf-8")
            else:
                print("".join(unified_diff(*(text.splitlines(keepends=True) for text in (before, after)), str(page))))


if __name__ == "__main__":
    try:
        main()
    except PageError as failed:
        sys.exit(f"error: {failed}")
