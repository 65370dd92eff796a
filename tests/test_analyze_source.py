"""A run finds the cache that it was trained on; where it cannot, the message names the stored path and `--cache`."""

import json
import shutil
from pathlib import Path

import pytest
from command_kit import invoke, refused
from conftest import write_cache

from sae_granary import load_sae, train_sae
from sae_granary.analyze.cli import app
from sae_granary.analyze.encoding.encode import encode_cache
from sae_granary.analyze.errors import MismatchError
from sae_granary.analyze.latents.stats import compute_stats
from sae_granary.analyze.source import open_source
from sae_granary.common.errors import ConfigError
from sae_granary.common.signed import CHECKSUM, write_signed
from sae_granary.sae_core import registry


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """cache/toy, cache/other and runs/a, which was trained on the first."""
    for seed, name in enumerate(("toy", "other")):
        write_cache(tmp_path / "p" / "cache" / name, n_docs=10, seed=seed)
    settings = {"type": "topk", "k": 4, "d_sae": 32, "batch_size": 64, "steps": 2, "eval_rows": 50, "device": "cpu"}
    train_sae(cache=str(tmp_path / "p/cache/toy"), runs_dir=str(tmp_path / "p/runs"), name="a", **settings)
    return tmp_path / "p"


def test_a_run_finds_its_cache_also_where_the_two_moved_together(project: Path) -> None:
    assert open_source(project / "runs/a", device="cpu").cache.path.samefile(project / "cache/toy")
    moved = project.rename(project.with_name("moved"))
    assert open_source(moved / "runs/a", device="cpu").cache.path.samefile(moved / "cache/toy")
    shutil.copytree(moved / "cache/other", project / "cache/toy")  # another one at the stored path is not taken
    assert open_source(moved / "runs/a", device="cpu").cache.path.samefile(moved / "cache/toy")


@pytest.mark.parametrize("type_name", registry.names())
def test_a_run_of_every_type_is_described(type_name: str, make_cache, tmp_path: Path) -> None:
    hooks = ("layer_1", "layer_2") if registry.get(type_name).reads.several else ("layer_1",)
    cache = make_cache(n_docs=10, hooks=hooks)
    settings = {"type": type_name, "d_sae": 32, "batch_size": 64, "steps": 2, "eval_rows": 50, "device": "cpu"}
    settings |= {"l0_target": 4} if type_name == "jumprelu" else {}
    run = train_sae(cache=str(cache), hook=list(hooks), runs_dir=str(tmp_path / "runs"), **settings).folder
    source = open_source(run, device="cpu")
    codes = encode_cache(source, source.place / "codes")
    rows = {name: source.cache.hook(name)[:] for name in hooks}
    assert (codes.dense() == load_sae(run).encode(rows).dense().detach().numpy()).all()
    assert compute_stats(source, codes).fired.sum() > 0


def test_a_cache_that_is_gone_or_another_is_named_with_its_stored_path(project: Path) -> None:
    run, stored = project / "runs/a", project / "cache/toy"
    elsewhere = stored.rename(project / "elsewhere")
    with pytest.raises(ConfigError, match=rf"the cache of {run} is not at {stored} any more: .*--cache FOLDER"):
        open_source(run, device="cpu")
    (project / "cache/other").rename(stored)
    with pytest.raises(MismatchError, match=rf"{stored} is another cache than the one that {run} was trained on"):
        open_source(run, device="cpu")
    assert open_source(run, elsewhere, device="cpu").cache.path == elsewhere


def test_an_sae_without_a_record_of_its_cache_asks_for_one(project: Path) -> None:
    run, foreign = project / "runs/a", project / "foreign"
    foreign.mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        shutil.copy(run / name, foreign)
    with pytest.raises(ConfigError, match=rf"{foreign} does not record its cache, .*: --cache FOLDER"):
        open_source(foreign, device="cpu")
    record = json.loads((run / "run.json").read_text())
    write_signed(run / "run.json", {k: v for k, v in record.items() if k not in ("cache_paths", CHECKSUM)})
    with pytest.raises(ConfigError, match=r"run.json does not record where its cache is: .*: --cache FOLDER"):
        open_source(run, device="cpu")


def test_the_commands_need_no_cache_for_a_run_and_refuse_in_one_line(project: Path) -> None:
    run = str(project / "runs/a")
    for command in (["encode", run], ["stats", run], ["show", run, "--latent", "3"]):
        invoke(app, *command, "--device", "cpu")
    (project / "cache/toy").rename(project / "elsewhere")
    for command in (["encode", run], ["stats", run], ["show", run, "--latent", "3"], ["show", run, "--text", "a"]):
        done = refused(app, *command, "--device", "cpu")
        assert str(project / "cache/toy") in done
