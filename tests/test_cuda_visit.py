"""The script for a machine with a GPU: all but the GPU, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import visit_parts

from benchmarks.apart import Player, apart
from benchmarks.cuda_visit import agreement, products, roofline, speed
from benchmarks.cuda_visit.parts import FIRST, PARTS, SECOND, chosen
from benchmarks.cuda_visit.place import Place
from benchmarks.cuda_visit.roofline import Limits, Size
from benchmarks.cuda_visit.visit import Part, Visit
from sae_granary.sae_core import Pattern

ROOT = Path(__file__).parent.parent
TINY = products.Case("tiny", Pattern.fixed_k(torch.tensor([[0, 3], [3, 3], [1, 0]]), 4), 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_it_says_so_and_needs_no_zarr() -> None:
    absent = ("zarr", "yaml", "typer", "pyarrow", "xxhash", "transformers", "datasets")
    code = (
        f"import sys, runpy\nsys.modules.update(dict.fromkeys({absent!r}))\nsys.argv = ['cuda_visit']\n"
        "runpy.run_module('benchmarks.cuda_visit', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout.splitlines() == ["no CUDA device: nothing was checked or timed"]


def test_products_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    assert products.check("cpu", ["eager"], [TINY], lines.append), lines
    assert "NO" not in "".join(lines)
    assert sum("| dots |" in line for line in lines) == 1  # shown row by row
    monkeypatch.setattr(products, "sampled_dot", lambda *inputs: torch.ones(6))
    assert not products.check("cpu", ["eager"], [TINY], lines.append)


def test_steps_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    assert agreement.check("cpu", ["eager"], ["topk", "vanilla", "crosscoder", "temporal"], lines.append), lines
    monkeypatch.setattr(agreement, "BOUND", -1.0)
    assert not agreement.check("cpu", ["eager"], ["topk"], lines.append)
    assert "NO" in lines[-1]


def test_the_roofline_adds_the_product_and_the_bytes() -> None:
    # d_in 2, d_sae 3, k 1, batch 5: matrices of 24 bytes, 16 of them moved; 4 gathers of 40 bytes
    assert Limits(product_ms=1.0, bytes_per_ms=100.0).step_ms(Size(2, 3, 1, 5)) == pytest.approx(1.0 + 5.44)


def test_parts_and_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    size = Size(16, 256, 4, 64)
    measure = roofline.measure
    monkeypatch.setattr(roofline, "measure", lambda size, device: measure(size, device, 2**12))
    monkeypatch.setattr(speed, "SIZES", [size])
    monkeypatch.setattr(speed, "one_hook_types", lambda: ["topk", "vanilla"])
    lines: list[str] = []
    speed.measure(size, "cpu", ["eager"], lines.append)
    text = "\n".join(lines)
    assert "projection, Adam, unit rows" in text
    assert "row_topk" in text
    assert "gradient of the codes" in text
    assert "| topk " in text
    assert "| vanilla " in text


def test_the_minutes_in_the_documentation_are_the_limits_of_the_parts() -> None:
    names = [each.name for each in PARTS]
    assert len(set(names)) == len(names)
    assert chosen(None) == PARTS
    assert chosen(["second", "products"]) == [PARTS[0], *SECOND]
    total, *each = (round(sum(part.limit for part in parts) / 60) for parts in (PARTS, FIRST, SECOND))
    assert each == [7, 7]
    for page in ("benchmarks/cuda_visit/__main__.py", "docs/performance.md"):
        text = " ".join((ROOT / page).read_text().split())
        assert f"add up to {total} minutes" in text, page
        assert "those of `--parts first` and of `--parts second` to 7 each" in text, page


def visit(folder: Path, monkeypatch: pytest.MonkeyPatch, *parts: Part, seconds: float = 500) -> tuple[Visit, bool, str]:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    said: list[str] = []
    made = Visit(Place("cpu", folder), folder / "results.md", seconds, said.append)
    return made, made.carry_out(parts), (folder / "results.md").read_text()


def part(name: str, limit: float = 300, *, ahead: bool = False) -> Part:
    return Part(name, f"visit_parts:{name}", limit, "a test", ahead)


def test_a_part_that_raises_or_fails_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch) -> None:
    parts = [part(name) for name in ("raises", "fails_a_check", "passes")]
    made, passed, results = visit(tmp_path, monkeypatch, *parts)
    assert not passed
    outcomes = [outcome.split(" (")[0] for outcome in made.outcomes.values()]
    assert outcomes == ["FAILED with exit code 1", "CHECKS FAILED", "passed"]
    for text in ("| first table | 1 |", "ValueError: no such kernel", "| bitwise equal | NO |", "| device | cpu |"):
        assert text in results
    assert "- raises: FAILED with exit code 1" in results.split("## Summary")[1]


def test_a_part_that_hangs_is_stopped_and_what_it_printed_is_kept(tmp_path, monkeypatch) -> None:
    parts = [part("takes_its_turn"), part("hangs", 1, ahead=True), part("passes")]  # it hangs when its turn comes
    made, passed, results = visit(tmp_path, monkeypatch, *parts)
    assert not passed
    assert made.outcomes["hangs"].startswith("STOPPED after its limit of 1 s")
    assert made.outcomes["passes"].startswith("passed")
    assert "| before it hangs | 1 |" in results


def test_parts_for_which_no_time_is_left_are_named(tmp_path, monkeypatch) -> None:
    made, passed, _ = visit(tmp_path, monkeypatch, part("passes"), seconds=5)
    assert not passed
    assert made.outcomes["passes"].startswith("not started")


def test_a_part_that_starts_ahead_waits_for_its_turn(tmp_path, monkeypatch) -> None:
    parts = [part("takes_its_turn"), part("prepares", ahead=True)]
    _, passed, results = visit(tmp_path, monkeypatch, *parts)
    assert passed, results
    assert "| its turn came after others | True |" in results


def test_a_contestant_that_fails_says_why() -> None:
    assert apart({"peer": visit_parts.contestant}, repeats=1)["peer"] >= 0
    with Player("peer", visit_parts.contestant_that_fails) as player:
        player.ready()
        with pytest.raises(RuntimeError, match="peer: ValueError: no such option"):
            player.step()
    with (
        Player("peer", visit_parts.contestant_that_never_starts) as player,
        pytest.raises(RuntimeError, match="peer: no answer within 0 s"),
    ):
        player.ready(0.1)


# The others are above, or in test_benchmarks.py.
APART = ["profile", "block-sizes", "harvest-bert", "resume", "peers", "run", "start-up", "sweep", "harvest-pooled"]


@pytest.mark.slow
def test_parts_run_in_a_tiny_size(tmp_path) -> None:
    out = tmp_path / "results.md"
    command = [sys.executable, "-m", "benchmarks.cuda_visit", "--device", "cpu", "--minutes", "25", "--out", str(out)]
    done = subprocess.run(
        [*command, "--parts", *APART], capture_output=True, text=True, cwd=ROOT, check=False, timeout=380
    )
    assert done.returncode == 0, done.stdout
    results, summary = out.read_text().split("## Summary")
    assert "| 16,384 | without | " in results  # the forward pass of harvest-bert, explained
    assert [line.split(" (")[0] for line in summary.split("\n") if line] == [f"- {name}: passed" for name in APART]
