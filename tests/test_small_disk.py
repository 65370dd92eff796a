# ruff: noqa: F811
"""A file system that is really full, and few file descriptors: what is said, what is kept, how it goes on."""

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cache_kit import contents
from command_kit import run_python
from conftest import write_cache
from sae_kit import saved
from test_harvest_extend import config, harvest, models  # noqa: F401
from test_harvest_resume import assert_same_cache

from sae_granary import open_cache, resume_training, train_sae
from sae_granary.analyze.encoding.codes import CodesRecord
from sae_granary.analyze.encoding.encode import encode_cache
from sae_granary.analyze.encoding.outputs import Output, write_cache_codes
from sae_granary.analyze.errors import AnalyzeError
from sae_granary.analyze.source import open_source
from sae_granary.cache.errors import CacheError
from sae_granary.cache.read.verify import verify
from sae_granary.cache.remote import stage
from sae_granary.cache.remote.stage import staging
from sae_granary.common.errors import ConfigError, GranaryError
from sae_granary.common.files import free_bytes
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.replay.add import add_hooks
from sae_granary.harvest.run import harvest_activations
from sae_granary.models.config import WhereConfig
from sae_granary.train.callbacks import StepEvent
from sae_granary.train.errors import ShortageError

SETTINGS = {"type": "topk", "k": 2, "d_sae": 1024, "batch_size": 64, "steps": 6, "save_every": 2, "eval_rows": 200}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """(a folder that is a file system of its own, how to set its size)."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> bool:
        command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if os.geteuid() or not mount("-o", "size=1M"):
        pytest.skip("needs root: it mounts a small file system")
    try:
        yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_training_on_a_full_disk_names_it_and_continues(small_disk, tmp_path) -> None:
    folder, resize = small_disk
    settings = {**SETTINGS, "cache": str(write_cache(tmp_path / "toy", n_docs=20, d_in=64))}
    whole = train_sae(**settings, runs_dir=str(tmp_path / "whole"), name="r").folder
    with pytest.raises(ConfigError, match=r"disk has 1.0 MiB free, the run's checkpoints need about [\d.]+ MiB"):
        train_sae(**settings, runs_dir=str(folder), name="r")
    resize("6M")

    def fill(event: StepEvent) -> None:  # another program's file, after the run has begun
        if event.step == 3:
            (folder / "other").write_bytes(bytes(free_bytes(folder) - (200 << 10)))

    needed = r"no space left for .*/disk/r: up to [\d.]+ MiB needed, [\d.]+ (MiB|KiB|B) free; fix this, then run: "
    with pytest.raises(ShortageError, match=needed + "sae-train resume"):
        train_sae(**settings, runs_dir=str(folder), name="r", callbacks=[fill])
    (folder / "other").unlink()
    found = resume_training(folder / "r").folder / "sae_weights.safetensors"
    assert found.read_bytes() == (whole / "sae_weights.safetensors").read_bytes()


@pytest.mark.slow
def test_a_harvest_on_a_full_disk_names_it_and_continues(small_disk, tmp_path) -> None:
    folder, resize = small_disk
    settings = {"model": "demo", "dataset": "demo", "layers": 3, "device": "cpu", "quiet": True, "rows_per_shard": 512}
    with pytest.raises(GranaryError, match=r"not enough space for .*/disk/c: [\d,]+ bytes are planned and [\d,]+ are"):
        harvest_activations(**settings, max_tokens=4000, out=folder / "c")
    resize("7M")
    (folder / "other").write_bytes(bytes(3 << 20))  # comes between the plan and the writing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae_granary.harvest.run.check_space", lambda prepared: None)
        with pytest.raises(GranaryError, match=r"free some space and run the same command again"):
            harvest_activations(**settings, max_tokens=4000, out=folder / "c")
    committed = open_cache(folder / "c", allow_incomplete=True).n_rows
    (folder / "other").unlink()
    resize("64M")
    result = harvest_activations(**settings, max_tokens=4000, out=folder / "c")
    assert (result.resumed_rows, committed > 0) == (committed, True)
    harvest_activations(**settings, max_tokens=4000, out=tmp_path / "whole")
    assert (open_cache(folder / "c").hook()[:] == open_cache(tmp_path / "whole").hook()[:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["extend", "add"])
def test_a_cache_that_grows_on_a_full_disk_names_it_and_continues(small_disk, config, tmp_path, what) -> None:
    folder, resize = small_disk
    resize("64M")
    here, there = (replace(config, out=out, max_tokens=2000) for out in (folder / "c", tmp_path / "whole"))

    def grow(one: HarvestConfig) -> None:
        if what == "extend":
            harvest(one, extend=True, max_tokens=4000)
        else:
            add_hooks(one.out_path, WhereConfig(layers=(2,)), quiet=True)

    for one in (here, there):
        harvest(one)
    before = contents(here.out_path)
    grow(there)
    taken = sum(map(len, contents(there.out_path).values())) - sum(map(len, before.values()))
    (folder / "other").write_bytes(bytes(free_bytes(folder) - taken // 2))
    words = r"not enough space for .*/disk/c.*: [\d,]+ bytes are planned and [\d,]+ are free"
    with pytest.raises(GranaryError, match=words):
        grow(here)
    with pytest.MonkeyPatch.context() as patch:  # as if the other file came after the plan
        patch.setattr("sae_granary.harvest.run.check_space", lambda prepared: None)
        patch.setattr("sae_granary.harvest.replay.add.check_addition_space", lambda base, prepared: None)
        with pytest.raises(GranaryError, match=r"free some space and run the same command again"):
            grow(here)
    assert contents(here.out_path).items() >= before.items()
    assert verify(here.out_path).ok
    assert open_cache(here.out_path).n_rows == len(open_cache(here.out_path).hook()[:])
    committed = list(here.out_path.rglob("commits/*.json"))
    assert len(committed) > len([name for name in before if name.startswith("commits")])
    (folder / "other").unlink()
    grow(here)
    assert_same_cache(here.out_path, there.out_path)


@pytest.mark.slow
def test_encoding_on_a_full_disk_names_it_and_continues_or_leaves_nothing(small_disk, tmp_path) -> None:
    folder, _ = small_disk
    cache = write_cache(tmp_path / "toy", n_docs=40, d_in=32)
    saved(tmp_path / "sae", d_in=32, d_sae=256, k=32)
    source = open_source(tmp_path / "sae", cache, device="cpu")
    whole = encode_cache(source, tmp_path / "whole", block_rows=128, commit_blocks=2)
    size = sum(path.stat().st_size for path in whole.folder.iterdir())
    (folder / "other").write_bytes(bytes(free_bytes(folder) - size // 2))
    words = r"no space left for .*/disk/c.*: .* free; free some space and run the same command again"
    with pytest.raises(AnalyzeError, match=words + ": it continues"):
        encode_cache(source, folder / "c", block_rows=128, commit_blocks=2)
    assert 0 < CodesRecord.read(folder / "c").n_rows < len(whole)
    for name, form, pool in (("c.npz", "npz", None), ("c.parquet", "parquet", None), ("c_max", "granary", "max")):
        (folder / "more").write_bytes(bytes(max(0, free_bytes(folder) - (8 << 10))))
        with pytest.raises(AnalyzeError, match=words):
            write_cache_codes(source, whole, Output(folder / name, form, pool))
        assert sorted(path.name for path in folder.iterdir()) == ["c", "more", "other"]
        (folder / "more").unlink()
    (folder / "other").unlink()
    again = encode_cache(source, folder / "c", block_rows=128, commit_blocks=2)
    for path in whole.folder.iterdir():
        assert (again.folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_copies_on_a_full_disk_are_refused_or_continued(small_disk, tmp_path, monkeypatch) -> None:
    folder, resize = small_disk
    settings = {**SETTINGS, "cache": str(write_cache(tmp_path / "toy", n_docs=40, d_in=64)), "runs_dir": str(tmp_path)}
    resize("200k")
    with staging(folder):
        with pytest.raises(
            CacheError, match=r"no space in .*/disk for what is read of .*toy: [\d.]+ KiB needed, 200.0"
        ):
            train_sae(**settings, name="r")
        assert not (tmp_path / "r").exists()
        resize("2M")
        copy_all = stage._copy_all

        def fill(*args: Any) -> None:  # another program's file comes between the check and the copies
            (folder / "other").write_bytes(bytes(free_bytes(folder) - (300 << 10)))
            copy_all(*args)

        with monkeypatch.context() as patch:
            patch.setattr(stage, "_copy_all", fill)
            with pytest.raises(CacheError, match=r"no space left for .*/disk/toy-\w+: .*: it continues"):
                train_sae(**settings, name="r")
        assert list(folder.rglob("*.part"))
        (folder / "other").unlink()
        found = train_sae(**settings, name="r", resume="auto").folder / "sae_weights.safetensors"
    assert not list(folder.rglob("*.part"))
    assert found.read_bytes() == (train_sae(**settings, name="plain").folder / "sae_weights.safetensors").read_bytes()
    subprocess.run(["mount", "-o", f"remount,nr_inodes={len(list(folder.rglob('*'))) + 4}", folder], check=True)
    shutil.copytree(settings["cache"], tmp_path / "other" / "toy2")
    with staging(folder), pytest.raises(CacheError, match="MiB free, and no file can be added: the file"):
        train_sae(**settings | {"cache": str(tmp_path / "other" / "toy2")}, name="r2")


@pytest.mark.slow
def test_24_saes_finish_with_64_descriptors(tmp_path) -> None:
    cache = write_cache(tmp_path / "toy", n_docs=20, d_in=8)
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from sae_granary import train_sweep
settings = {SETTINGS | {"d_sae": 24, "k": None, "cache": str(cache)}!r}
result = train_sweep({{"k": [1, 2, 3], "init_seed": list(range(8))}}, settings, runs_dir={str(tmp_path / "runs")!r})
print(len(result.rows), len(result.failures))
"""
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 64
    assert run_python(code).stdout.split() == ["24", "0"]
