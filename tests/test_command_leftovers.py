"""What several commands say about one thing is the same, and nothing that was typed is silently ignored."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_kit import invoke
from test_cache_travel_added import add, harvest

from sae_granary import train_sae
from sae_granary.cache.cli import app as cache_app
from sae_granary.cache.read.reader import open_local
from sae_granary.common.quantities import byte_size
from sae_granary.harvest.cli import app as harvest_app
from sae_granary.harvest.replay.damage import Damage, report_lines
from sae_granary.train.cli import app as train_app
from sae_granary.train.sweeps.results import markdown_table


def run(app, *words: object, code: int = 0) -> str:
    return " ".join(invoke(app, *words, code=code).output.split())


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Path:
    """A cache with a hook point that was added, whose columns are linked to the cache's."""
    path = tmp_path_factory.mktemp("made") / "toy"
    harvest(path)
    return add(path)


def test_info_ls_and_rm_count_the_same_bytes_and_info_marks_what_was_added(grown: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(grown, tmp_path / "toy"))
    size = byte_size(open_local(cache).n_bytes)
    assert f"size {size}" in run(cache_app, "info", cache)
    assert "layer_3 (d_in 8), layer_2 (d_in 8, added)" in run(cache_app, "info", cache)
    told = json.loads(run(cache_app, "info", cache, "--json"))
    assert [hook["name"] for hook in told["added_hook_points"]] == ["layer_2"]
    (listed,) = json.loads(run(cache_app, "ls", tmp_path, "--json"))
    assert (told["n_bytes"], listed["n_bytes"]) == (open_local(cache).n_bytes,) * 2
    assert f" rows, {size})" in run(cache_app, "rm", cache, "--yes")


def test_a_plan_of_a_push_says_that_no_checksum_was_read(grown: Path, tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    told = run(cache_app, "push", grown, f"file://{tmp_path}/there", "--dry-run")
    assert told.endswith("nothing was copied, checksums are read when it is")


def test_rows_of_several_hook_points_are_harvested_again_once(grown: Path) -> None:
    cache = open_local(grown)
    part = cache.additions[0]
    damages = [
        Damage(place, manifest, {0: ("activations/c",), **more}, (), ())
        for place, manifest, more in ((grown, cache.manifest, {}), (part.path, part.manifest, {1: ("activations/c",)}))
    ]
    n_rows = sum(record.n_rows for record in cache.records[:2])
    assert report_lines(damages, restored=False)[-1].startswith(f"without --dry-run {n_rows} rows")


@pytest.mark.parametrize(
    ("app", "words"),
    [
        (train_app, ("config", "--type", "topk", "--k", 1, "--set", "k=2")),
        (train_app, ("run", "--cache", "c", "--type", "topk", "--k", 1, "--set", "k=2")),
        (harvest_app, ("config", "--model", "demo", "--dtype", "float16", "--set", "dtype=float32")),
    ],
)
def test_a_flag_and_set_that_disagree_are_refused(app, words: tuple[object, ...]) -> None:
    told = run(app, *words, code=2)
    assert re.search(r"(k|dtype) is given twice, '?(1|float16)'? by its flag and '(2|float32)' by --set: give", told)


def test_a_flag_and_set_that_agree_are_taken() -> None:
    assert "k: 2" in run(train_app, "config", "--type", "topk", "--k", 2, "--set", "k=2")


def test_metrics_of_training_rows_say_so_in_every_table(make_cache, tmp_path: Path) -> None:
    settings = {"type": "topk", "k": 3, "d_sae": 32, "steps": 2, "batch_size": 64, "device": "cpu"}
    result = train_sae(**settings, cache=str(make_cache()), holdout=0.0, runs_dir=str(tmp_path), name="r")
    words = "FVU and the other metrics are of training rows"
    assert words in result.summary["notes"][0]
    assert words in run(train_app, "compare", tmp_path)
    rows = [{"name": name, "status": "finished", "type": "topk", "notes": result.summary["notes"][0]} for name in "ab"]
    assert f"all: L0, {words}" in markdown_table(rows)
    assert f"a: L0, {words}" in markdown_table([rows[0], {**rows[1], "notes": ""}])


@pytest.mark.parametrize("stage", ["analyze", "cache", "harvest", "train"])
def test_every_stage_is_a_module_that_runs(stage: str) -> None:
    command = [sys.executable, "-m", f"sae_granary.{stage}", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("sae-granary "), done.stderr
