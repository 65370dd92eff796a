"""The code of README.md and docs/ runs, and prints what the pages show.

Every fenced block is one of: code that runs (`python`, and `sh` on the pages of SHELL), output (`text`, `console`),
data that parses (`yaml`, `json` ...), or marked `<!-- not run: reason -->`. The `sh` blocks of the other pages are
checked against the commands that exist, not run. `python docs/run_pages.py --write PAGE` rewrites the output of a page.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from filelock import FileLock

from sae_granary.sae_core import registry

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = [page for page in PAGES if page.parent == ROOT / "docs" / "recipes"]  # whole pages: commands and code, slow
QUICK = [page for page in PAGES if page not in SHELL and page.parent.name != "notebooks"]  # that one runs below
ALIKE = 0.6  # share of equal words; latents, examples and times differ between machines


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run_pages = load(ROOT / "docs" / "run_pages.py")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> list:
    return run_pages.blocks_of(page.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.discover()
    monkeypatch.setattr(registry, "_VARIANTS", dict(registry._VARIANTS))  # what a page registers is its own


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is(page: Path) -> None:
    for block in blocks_of(page):
        where = f"{name_of(page)}:{block.line}"
        assert block.language in (*run_pages.CODE, *run_pages.OUTPUT, *run_pages.DATA), (
            f"{where}: a block of {block.language or 'no language'!r}: expected python or sh (code), text (output) or "
            f"one of {', '.join(run_pages.DATA)}"
        )
        assert block.not_run is None or len(block.not_run) > 5, f"{where}: say why it does not run"
        if block.file is not None:
            code = (ROOT / block.file).read_text(encoding="utf-8")
            assert block.text.strip() in code, f"{where} differs from {block.file}"
        if block.language == "yaml":
            yaml.safe_load(block.text)
        if block.language == "json":
            json.loads(block.text)
        if block.language == "toml":
            tomllib.loads(block.text)


def test_blocks_that_do_not_run_are_few_and_known() -> None:
    """Read this list before adding to it."""
    found = {f"{name_of(page)}: {block.not_run}" for page in PAGES for block in blocks_of(page) if block.not_run}
    assert found <= NOT_RUN, f"not listed: {sorted(found - NOT_RUN)}"


NOT_RUN = {
    "docs/recipes/finetune.md: needs SAEs from the hub",
    "docs/recipes/share.md: needs an S3 server",  # tests/remote_s3.py starts one
    "docs/recipes/share.md: the folder is that of one machine",
}


def shared(made: pytest.TempPathFactory, name: str) -> Path:
    """A folder that the processes of one run of pytest-xdist have in common."""
    own = made.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cache/demo_l3 with MiniLM's rows of the beginnings of all demo texts, and two runs of four steps."""
    from pydoc_data.topics import topics

    from sae_granary import harvest_activations, train_sae

    folder = shared(tmp_path_factory, "small_demo")
    with FileLock(f"{folder}.lock"):
        if (folder / "complete").exists():
            return folder
        folder.mkdir()
        texts = folder / "texts.jsonl"
        texts.write_text("".join(json.dumps({"text": text[:100]}) + "\n" for _, text in sorted(topics.items())))
        cache = str(folder / "cache" / "demo_l3")
        harvest_activations(model="demo", dataset=str(texts), layers=[3], out=cache, device="cpu", quiet=True)
        common = {"cache": cache, "k": 32, "d_sae": 768, "steps": 4, "batch_size": 256, "device": "cpu"}
        for type_name in ("topk", "batchtopk"):
            train_sae(**common, type=type_name, name=f"demo_{type_name}", runs_dir=str(folder / "runs"))
        (folder / "complete").touch()
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What recipes start from, in full; made when the first needs it."""
    return shared(tmp_path_factory, "store")


def python_pages() -> list[Any]:
    """Pages with python blocks; the model with an SAE inside it takes a minute."""
    pages = [page for page in QUICK if any(block.language == "python" for block in blocks_of(page))]
    return [pytest.param(p, marks=[pytest.mark.slow] if p.stem == "language_model" else []) for p in pages]


@pytest.mark.parametrize("page", python_pages(), ids=name_of)
def test_the_python_of_a_page_runs(page: Path, small_demo: Path, tmp_path: Path) -> None:
    run_pages.prepare(page, tmp_path, small_demo, commands=False)
    with run_pages.Runner(tmp_path) as runner:
        for block in blocks_of(page):
            if block.language == "python" and block.not_run is None:
                runner.run(block)


@pytest.mark.slow
@pytest.mark.parametrize("page", SHELL, ids=name_of)
def test_a_recipe_runs_and_prints_what_it_shows(page: Path, store: Path, tmp_path: Path) -> None:
    with FileLock(f"{store}.lock"):
        store.mkdir(exist_ok=True)
        run_pages.prepare(page, tmp_path, store)
    for _, printed, shown in run_pages.run_page(page.read_text(encoding="utf-8"), tmp_path):
        if accuracy := re.search(r"held-out accuracy ([0-9.]+)", printed):
            assert float(accuracy[1]) > 0.97
        if shown is not None:
            likeness = run_pages.likeness(printed, shown.text)
            assert likeness >= ALIKE, f"{name_of(page)}:{shown.line} shows another output ({likeness:.2f}):\n{printed}"


def test_likeness_tells_outputs_apart() -> None:
    shown = "step 300/300  loss 0.10  FVU 0.1080\n...\nruns/demo_topk\n"
    printed = "step 300/300  loss 0.11  FVU 0.1091\nmore\nand more\nruns/demo_topk\n"
    assert run_pages.likeness(printed, shown) == 1.0
    assert run_pages.likeness("latent 17: active on 3 rows\n", shown) < 0.3
    assert run_pages.elided(printed, shown).splitlines()[1] == "..."


def test_a_failing_block_names_its_line(tmp_path: Path) -> None:
    page = "# A page\n\n```python\nx = 1\n```\n\n```python\nprint(x)\nraise ValueError('wrong')\n```\n"
    with pytest.raises(run_pages.PageError, match=r"(?s)block at line 7: 1\n.*wrong"):
        list(run_pages.run_page(page, tmp_path))
    with pytest.raises(run_pages.PageError, match="block at line 1: sae-cache info nowhere"):
        list(run_pages.run_page("```sh\nsae-cache info nowhere\n```\n", tmp_path))


def test_every_type_has_a_paragraph_and_every_picture_is_there() -> None:
    page = (ROOT / "docs" / "types" / "index.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### (\w+)$", page, re.MULTILINE)
    assert sorted(headings) == sorted(registry.names())
    pictures = re.findall(r"\]\((\w+\.svg)\)", page)
    assert sorted(pictures) == sorted(path.name for path in (ROOT / "docs" / "types").glob("*.svg"))


NOTEBOOK = ROOT / "docs" / "notebooks" / "first_sae.ipynb"


def test_the_notebook_is_that_of_its_source() -> None:
    source = NOTEBOOK.with_suffix(".py").read_text(encoding="utf-8")
    wanted = load(NOTEBOOK.with_name("make.py")).cells_of(source)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == wanted, "run docs/notebooks/make.py"
    page = NOTEBOOK.with_suffix(".md").read_text(encoding="utf-8")
    assert all(text in page for _, text in wanted)
    assert sum(path.stat().st_size for path in NOTEBOOK.parent.rglob("*") if path.is_file()) < 500_000


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    subprocess.run([sys.executable, NOTEBOOK.with_name("make.py"), tmp_path], check=True, timeout=1200)
    shown, now = (
        "".join(run_pages.blocks_of((folder / "first_sae.md").read_text(encoding="utf-8"))[i].text for i in (1, 3))
        for folder in (NOTEBOOK.parent, tmp_path)
    )
    assert run_pages.likeness(now, shown) >= ALIKE
    assert len(list(tmp_path.rglob("*.png"))) == 3
