"""The recipe pages of the documentation run as they stand, each block in order in one folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tickets import PROBLEMS, write_tickets

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "docs" / "recipes"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODULES = {f"sae-{room}": f"sae_granary.{room}.cli" for room in ("harvest", "cache", "train", "analyze")}


def run_page(page: Path, folder: Path) -> list[tuple[str, str]]:
    """(command or code, what it printed) of each line of a sh block and each python block."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = []
    for kind, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        for part in code.splitlines() if kind == "sh" else [code]:
            words = shlex.split(part) if kind == "sh" else []
            command = ["-m", MODULES[words[0]], *words[1:]] if words else ["-c", code]
            ran = subprocess.run(
                [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, check=False
            )
            assert ran.returncode == 0, f"{part}\n{ran.stdout}\n{ran.stderr}"
            done.append((part, ran.stdout))
    return done


def test_every_page_is_known() -> None:
    assert [page.name for page in sorted(RECIPES.glob("*.md"))] == ["tickets.md"]


@pytest.mark.slow
def test_tickets(tmp_path: Path) -> None:
    """5,000 tickets as the page has them; which latent is which may differ between processors."""
    write_tickets(tmp_path / "tickets.csv", 5000)
    write_tickets(tmp_path / "new.csv", 500, seed=1)
    done = run_page(RECIPES / "tickets.md", tmp_path)
    printed = {part.split(" runs/")[0] + (" --text" if "--text " in part else ""): out for part, out in done}
    assert "I was charged twice, please refund me  " in printed["sae-analyze show --text"]
    assert "latent 63: active on " in printed["sae-analyze show"]
    table = printed["sae-analyze search"].splitlines()
    at = next(i for i, line in enumerate(table) if line.startswith("latent 35: active in "))
    assert table[at + 2].split() == ["category", "documents", "active", "mean", "lift"]
    assert {line.split()[0] for line in table[at + 3 : at + 6]} < {*PROBLEMS}
    assert table[at + 6] == "and 1 more value"
    last = done[-1][1]
    accuracy = re.search(r"held-out accuracy ([0-9.]+)", last)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.97
    assert len(re.findall("latents", last)) == len(PROBLEMS)
