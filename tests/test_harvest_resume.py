"""Interrupted and run again: the finished cache is byte-equal to an uninterrupted one."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cache_kit import contents
from harvest_kit import CutOff, build_model, config_of, cut_off_after, packed, texts

from sae_granary import open_cache
from sae_granary.cache.errors import CacheError
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.run import harvest_activations
from sae_granary.models.config import WhereConfig

REPO = Path(__file__).parents[1]
FLAGS = ("--layer", "1", "--ctx-len", "16", "--batch-tokens", "128", "--rows-per-shard", "2048", "--device", "cpu")


def write_corpus(path: Path, n_docs: int = 150) -> Path:
    lines = [text if i % 7 else "" for i, text in enumerate(texts(n_docs, longest=50))]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def config(tmp_path: Path) -> HarvestConfig:
    model, sizes = build_model(tmp_path / "model", "bert"), {"ctx_len": 16, "batch_tokens": 128, "rows_per_shard": 512}
    return config_of(model, write_corpus(tmp_path / "corpus.txt"), tmp_path / "whole", **sizes)


def assert_same_cache(found: Path, want: Path) -> None:
    left, right = contents(found), contents(want)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == []


@pytest.mark.parametrize("pack", [False, True])
def test_a_crash_at_any_batch_leaves_no_trace(config: HarvestConfig, pack: bool) -> None:
    config = packed(config) if pack else config
    config = replace(config, tokens=replace(config.tokens, batch_tokens=32))  # sort buffers of 512 rows
    whole = harvest_activations(config, quiet=True)
    assert whole.n_shards > 5
    out = config.out_path.with_name("cut")
    resumed, n_cuts = [], 0
    for n_batches in range(3, 400, 11):
        try:
            with cut_off_after(n_batches):
                resumed.append(harvest_activations(replace(config, out=out), quiet=True).resumed_rows)
            break
        except CutOff:
            n_cuts += 1
    assert resumed[-1:] > [0]
    assert n_cuts > 3
    assert_same_cache(out, config.out_path)


def test_running_a_complete_harvest_again_does_nothing(config: HarvestConfig) -> None:
    config = replace(config, max_tokens=600)
    first = harvest_activations(config, quiet=True)
    before = contents(config.out_path)
    again = harvest_activations(config, quiet=True)
    assert (again.already_complete, again.n_rows, again.ended) == (True, first.n_rows, "max_tokens")
    assert contents(config.out_path) == before
    assert harvest_activations(replace(config, max_tokens=100), quiet=True).already_complete


def test_another_model_on_the_same_name_is_refused_with_the_difference(config: HarvestConfig) -> None:
    harvest_activations(replace(config, max_tokens=200), quiet=True)
    folder = Path(config.model.model)
    build_model(folder, "bert", seed=1)
    with pytest.raises(CacheError, match=r"weights_xxh3.*\n.*--out"):
        harvest_activations(replace(config, max_tokens=200), quiet=True)
    with pytest.raises(CacheError, match=r"hook_points.*layer_1.*layer_2"):
        harvest_activations(replace(config, where=WhereConfig(layers=(2,))), quiet=True)


def test_a_data_set_that_ends_early_is_complete_and_warned_about(config: HarvestConfig) -> None:
    result = harvest_activations(replace(config, max_tokens=10**6), quiet=True)
    assert result.ended == "source"
    assert result.warnings == (
        f"the dataset ended before --max-tokens 1,000,000: {result.n_rows:,} rows of {result.n_docs} documents; "
        "complete, but shorter",
    )
    assert open_cache(config.out_path).complete
    assert dict(result.skipped)["empty"] == 22
    assert harvest_activations(replace(config, max_tokens=10**6), quiet=True).already_complete


# The command, which gets a signal before the first batch after a shard was committed.
SIGNALED = """
import os, sys
from pathlib import Path
from sae_granary.harvest.cli import main
from sae_granary.harvest.pipeline import Pipeline
tick, left = Pipeline._tick, [int(sys.argv.pop(1))]
def signaled(*args):
    if left and any(Path(sys.argv[-1], "commits").glob("*.json")):
        os.kill(os.getpid(), left.pop())
    tick(*args)
Pipeline._tick = signaled
main()
"""


def command(config: HarvestConfig, out: Path, *program: str) -> list[str]:
    return [
        sys.executable, *(program or ("-m", "sae_granary.harvest.cli")), "run",
        "--model", config.model.model, "--dataset", config.text.dataset,
        "--documents", "line", *FLAGS, "--out", str(out),
    ]  # fmt: skip


def interrupted(config: HarvestConfig, out: Path, number: int) -> subprocess.CompletedProcess[str]:
    """Start the command, which gets a signal when the first shard is committed."""
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    line = command(config, out, "-c", SIGNALED, str(int(number)))
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -9), (signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_killed_command_continues_byte_equal(config: HarvestConfig, number: int, code: int, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "long.txt", 1200)
    config = replace(config, text=replace(config.text, dataset=str(corpus)), rows_per_shard=2048)
    out = tmp_path / "cut"
    stopped = interrupted(config, out, number)
    assert stopped.returncode == code, stopped.stderr
    if number != signal.SIGKILL:
        assert "run the same command again to continue" in stopped.stderr
        assert "Traceback" not in stopped.stderr
    result = harvest_activations(replace(config, out=out), quiet=True)
    assert result.resumed_rows > 0
    harvest_activations(config, quiet=True)
    assert_same_cache(out, config.out_path)
