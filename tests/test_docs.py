"""The pages of the documentation: every command on them exists, with its flags; what is generated is current."""

import re
import runpy
import shlex
import subprocess
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import sae_granary
from sae_granary import train_sae

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
SHELL = re.compile(r"^ *```sh\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:sae-(?:harvest|cache|train|analyze)|make) [^`\n]*)`")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


@cache
def generator() -> Any:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "generate_commands.py")))


def lines_of(text: str) -> list[str]:
    """The lines of the shell blocks, joined where they continue, then the commands in running text."""
    blocks = "".join(SHELL.findall(text)).replace("\\\n", " ").splitlines()
    return [*blocks, *INLINE.findall(FENCED.sub("", text))]


def problem(line: str, own: frozenset[str] = frozenset()) -> str | None:
    """What is wrong with the commands of ours in a shell line, or None."""
    words = shlex.split(line, comments=True)
    starts = [0, *(i + 1 for i, word in enumerate(words) if word in ("|", "&&", ";"))]
    for start, stop in zip(starts, [*starts[1:], len(words) + 1], strict=True):
        part = words[start : stop - 1]
        while part and re.fullmatch(r"\w+=.*", part[0]):  # variables of the environment
            part = part[1:]
        name = Path(part[0]).name if part else ""
        found = wrong_target(part[1:]) if name == "make" else wrong_flag(name, part[1:], own)
        if found:
            return f"{line}: {found}"
    return None


def wrong_target(words: list[str]) -> str | None:
    """A target that the Makefile lacks, or a variable that nothing in it uses."""
    for word in words:
        name, is_variable, _ = word.partition("=")
        known = f"$({name})" if is_variable else f"\n{name}:"
        if known not in MAKEFILE and name not in ("...", "|"):
            return f"make knows no {name}"
    return None


def wrong_flag(program: str, words: list[str], own: frozenset[str]) -> str | None:
    """A command or a flag that a program of ours lacks, or a setting that neither docs/parameters.md nor `own` has."""
    if program not in generator().apps():
        return f"no program {program}" if program.startswith("sae-") else None
    group = generator().apps()[program]
    if "--" in words:  # `script`, and the command that it takes
        parts = words[: words.index("--")], words[words.index("--") + 1 :]
        return next((text for part in parts if (text := wrong_flag(program, part, own))), None)
    if words[:1] and words[0].startswith("-"):
        return None if words[0] in ("--version", "--help") else f"{program} has no {words[0]}"
    if words and words[0] not in group.commands:
        return f"{program} has no command {words[0]}"
    if not words:
        return None
    command = group.commands[words[0]]
    flags = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
    given = [word.partition("=")[0] for word in words[1:] if re.match(r"--?[A-Za-z]", word)]
    if unknown := [flag for flag in given if flag not in flags]:
        return f"{program} {words[0]} has no {unknown[0]}"
    settings = [word for flag, word in pairwise(words) if flag in ("--set", "--grid")]
    names = {word.partition("=")[0] for word in settings if re.match(r"\w+=", word)} - known_settings() - own
    return f"no setting {min(names)}" if names else None


@cache
def known_settings() -> set[str]:
    return set(
        re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8"), re.MULTILINE)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    own = frozenset(re.findall(r"(\w+): [\w |]+ = option\(", text))  # of a variant that the page declares
    found = [problem(line, own) for line in lines_of(text)]
    assert [text for text in found if text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_cache_of_a_page_is_named_as_our_code(page: Path) -> None:
    """In a checkout, cache/ holds both: an example that writes cache/vectors would be refused there."""
    code = {path.parent.name for path in (ROOT / "cache").glob("*/*.py")}
    text = "".join(FENCED.findall(page.read_text(encoding="utf-8")))
    assert code & set(re.findall(r"(?<![\w/])cache/(\w+)", text)) == set()


@pytest.mark.parametrize(("target", "flag"), [("harvest", "--max-tokens 20k"), ("train", "--tokens 20k")])
def test_make_hands_its_variables_on(target: str, flag: str) -> None:
    made = subprocess.run(["make", "-n", target, "TOKENS=20k"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert flag in made.stdout


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sae-train walk runs/x", "sae-train has no command walk"),
        ("sae-train run --cash cache/x", "sae-train run has no --cash"),
        ("cat a | sae-analyze encode runs/x --texts=- --poll max", "sae-analyze encode has no --poll"),
        ("CUDA_VISIBLE_DEVICES=0 sae-train run --set no_such_option=1", "no setting no_such_option"),
        ("sae-bake run", "no program sae-bake"),
        ("make demos", "make knows no demos"),
        ("make train CASH=cache/x", "make knows no CASH"),
    ],
)
def test_a_command_that_is_gone_is_found(line: str, said: str) -> None:
    assert problem(line) == f"{line}: {said}"


def test_the_programs_are_those_that_are_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert set(re.findall(r"^(sae-\w+) = ", text, re.MULTILINE)) == set(generator().apps())


def test_the_objects_of_the_api_pages_exist() -> None:
    """The strict build finds the same, but later and elsewhere."""
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    names = set(re.findall(r"(?:^::: |\]\[)(sae_granary[\w.]+)", text, re.MULTILINE))
    assert len(names) > 40
    index = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    assert [name for name in sae_granary.__all__ if f"`{name}`" not in index] == ["__version__"]
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), name


def test_the_python_of_the_readme_reads_any_dtype(make_cache, tmp_path: Path, monkeypatch) -> None:
    """Eight lines that used to fail on bfloat16."""
    cache = make_cache("cache/demo_l3", dtype="bfloat16", d_in=16, n_docs=60, vocabulary=[f"w{i}" for i in range(999)])
    train_sae(
        cache=str(cache), type="batchtopk", k=4, d_sae=64, steps=3, batch_size=64, device="cpu",
        runs_dir=str(tmp_path / "runs"), name="demo_batchtopk",
    )  # fmt: skip
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 8
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["rows"].tensor([0]).dtype == torch.bfloat16
    assert names["out"].x_hat.shape == (1000, 16)


def test_the_page_of_commands_is_current() -> None:
    assert generator().page() == generator().PAGE.read_text(encoding="utf-8"), "write it again with `make regenerate`"


def test_the_citation_file_follows_its_schema() -> None:
    """The required keys of Citation File Format 1.2.0, and the version of the package."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert cited["title"]
    assert cited["message"]
    assert cited["authors"] == [{"name": "The Granary authors"}]
    assert cited["version"] == sae_granary.__version__
    assert cited["license"] == "MIT"
