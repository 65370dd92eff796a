"""`--stage`: what a training reads of a cache is copied to a disk of this machine once, checked, and read there."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_kit import invoke, refused, run_python
from fork_kit import LIMIT, Forks, command
from rank_kit import COMMON, ended, start
from stage_kit import check_copies, killed_copying, staged
from test_cache_travel_added import add, grow, harvest

from sae_granary import encode_cache, open_cache, train_sae
from sae_granary.analyze.cli import app as analyze_app
from sae_granary.analyze.source import open_source
from sae_granary.cache.errors import CorruptCacheError
from sae_granary.cache.read.verify import verify
from sae_granary.cache.remote.shards import WHOLE
from sae_granary.cache.remote.stage import IN_USE, staging
from sae_granary.common.signals import StopRequest
from sae_granary.train.callbacks import StepEvent
from sae_granary.train.cli import app
from sae_granary.train.errors import InterruptedRunError

RUN = {**COMMON, "type": "topk", "k": 3, "steps": 4}
STAGE_ALL = "import sys; from stage_kit import staged; staged(*sys.argv[1:])"


def copies(folder: Path) -> dict[str, int]:
    """Path -> inode of every copy: a file that is copied again has another inode."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name not in (IN_USE, WHOLE)]
    return {path.relative_to(folder).as_posix(): path.stat().st_ino for path in found}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("made") / "toy"
    harvest(path)
    return path


@pytest.fixture
def cache(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "toy"))


@pytest.fixture
def disk(tmp_path) -> Path:
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def test_a_run_reads_copies_of_its_hook_point_only_and_gives_the_same_bits(
    make_cache: Callable[..., Path], tmp_path: Path, disk: Path
) -> None:
    cache = make_cache(hooks=("layer_1", "layer_3"))
    settings = {**RUN, "cache": str(cache), "hook": ("layer_3",)}
    plain = train_sae(**settings, runs_dir=str(tmp_path / "plain"), name="r")
    read: set[Path] = set()
    with staging(disk):
        data = train_sae(
            **settings,
            runs_dir=str(tmp_path / "staged"),
            name="r",
            callbacks=[lambda event: read.update(_mapped(disk))],
        )
    for name in ("sae_weights.safetensors", "config.yaml", "summary.json"):
        a, b = ((result.folder / name).read_text("latin1") for result in (plain, data))
        if name == "summary.json":
            a, b = (json.dumps({**json.loads(text), "seconds": 0}.get("eval")) for text in (a, b))
        assert a.replace("/plain", "/staged") == b, name
    assert any("layer_3" in path.as_posix() for path in read)
    assert not [path for path in copies(disk) if "layer_1" in path]
    before = copies(disk)
    with staging(disk):
        train_sae(**settings, runs_dir=str(tmp_path / "again"), name="r")
    assert copies(disk) == before


def _mapped(folder: Path) -> set[Path]:
    lines = Path("/proc/self/maps").read_text().splitlines() if sys.platform == "linux" else []
    return {Path(line.split()[-1]) for line in lines if line.split()[-1].startswith(str(folder))}


def test_an_extended_cache_is_completed_and_a_changed_one_is_copied_anew(cache: Path, disk: Path) -> None:
    first = staged(cache, disk)
    assert first.hook("layer_1").path(0).is_relative_to(disk)
    before = copies(disk)
    grow(cache, range(6, 9))
    grown = staged(cache, disk)
    kept = copies(disk)
    assert len(kept) > len(before)
    assert kept.items() >= before.items()
    np.testing.assert_array_equal(grown.hook("layer_1")[:], open_cache(cache).hook("layer_1")[:])
    shutil.rmtree(cache)
    harvest(cache, n_buffers=3)  # another cache of the same name and settings: its last shard is another
    changed = staged(cache, disk)
    np.testing.assert_array_equal(changed.hook("layer_1")[:], open_cache(cache).hook("layer_1")[:])
    assert copies(disk).items() >= kept.items()


def test_added_hook_points_are_copied_too(cache: Path, disk: Path) -> None:
    opened = staged(add(cache), disk, "layer_2")
    assert opened.hook("layer_2").path(0).is_relative_to(disk)
    np.testing.assert_array_equal(opened.hook("layer_2")[:], open_cache(cache).hook("layer_2")[:])


def test_processes_divide_the_copying_and_one_that_was_killed_loses_nothing(cache: Path, disk: Path) -> None:
    whole = copies_of_one(cache, disk)
    place = next(disk.glob("toy-*"))
    names = sorted(path for path in place.rglob("*") if path.is_file() and path.name not in (IN_USE, WHOLE))
    names[0].rename(names[0].with_name(names[0].name + ".part"))
    half = names[1].read_bytes()[:100]
    names[1].unlink()
    names[1].with_name(names[1].name + ".part").write_bytes(half)
    for path in names[2:]:
        path.unlink()
    env = {"PYTHONPATH": ":".join(sys.path)}
    jobs = [subprocess.Popen([sys.executable, "-c", STAGE_ALL, str(cache), str(disk)], env=env) for _ in range(2)]
    assert [job.wait(LIMIT) for job in jobs] == [0, 0]
    assert copies(disk).keys() == whole.keys()
    assert copies(disk)[names[0].relative_to(disk).as_posix()] == whole[names[0].relative_to(disk).as_posix()]
    rows = staged(cache, disk).hook("layer_1")[:]
    np.testing.assert_array_equal(rows, open_cache(cache).hook("layer_1")[:])


def test_copies_of_a_killed_process_are_continued_and_no_half_one_is_read(
    cache: Path, disk: Path, forks: Forks
) -> None:
    for n in (9, 20):  # before a lock is removed, and amid the copies
        shutil.rmtree(disk)
        disk.mkdir()
        assert forks.start(killed_copying, cache, disk, n).code() == -signal.SIGKILL
        half = copies(disk)
        continued = forks.start(check_copies, cache, disk)
        assert continued.code() == 0, continued.output
        kept = [path for path in half if not path.endswith((".part", ".lock"))]
        assert {path: copies(disk)[path] for path in kept} == {path: half[path] for path in kept}
        assert not list(disk.rglob("*.part"))


def copies_of_one(cache: Path, disk: Path) -> dict[str, int]:
    """Copies that another process has made, which has ended."""
    run_python(STAGE_ALL, cache, disk)
    return copies(disk)


def test_room_is_made_from_copies_that_nobody_reads(
    cache: Path, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("old", "used"):
        shutil.copytree(cache, tmp_path / name)
    run_python(STAGE_ALL, tmp_path / "old", disk)
    staged(tmp_path / "used", disk)  # this process reads it until it ends
    size = sum((disk / path).stat().st_size for path in copies(disk))
    monkeypatch.setattr(  # a disk that has no room for a third
        "sae_granary.cache.remote.stage.free_bytes",
        lambda path: size - sum((disk / path).stat().st_size for path in copies(disk)),
    )
    unlink, scandir, removed = os.unlink, os.scandir, list[str]()

    class ByName(list[Any]):  # the order of a listing is that of the file system
        def __init__(self, *place: Any) -> None:
            super().__init__(sorted(scandir(*place), key=lambda entry: str(entry.name)))

        def __enter__(self) -> list[Any]:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def stopped(path: str, **more: Any) -> None:  # after the file by which copies are found
        if more and IN_USE in removed:  # of `shutil.rmtree`
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, **more)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "unlink", stopped)
        patch.setattr(os, "scandir", ByName)
        staged(cache, disk)
    staged(cache, disk)
    assert IN_USE in removed
    assert {path.name[:3] for path in disk.iterdir() if any(path.rglob("c.*"))} == {"use", "toy"}
    shutil.copytree(cache, tmp_path / "more")
    with pytest.raises(Exception, match=r"no space in .*disk for what is read of .*more: [\d.]+ KiB needed, 0 B free"):
        staged(tmp_path / "more", disk)


def test_the_analysis_reads_the_copies_of_a_training(
    make_cache: Callable[..., Path], tmp_path: Path, disk: Path
) -> None:
    cache = make_cache(hooks=("layer_1", "layer_3"))
    settings = {**RUN, "cache": str(cache), "hook": ("layer_3",), "runs_dir": str(tmp_path), "name": "r"}
    with staging(disk):
        run = train_sae(**settings).folder
    before, plain = copies(disk), encode_cache(run, tmp_path / "plain", device="cpu")
    with staging(disk):
        source = open_source(run, device="cpu")
        codes = encode_cache(source, tmp_path / "staged")
    assert disk in source.cache.shard_path("layer_3", 0).parents
    assert np.array_equal(codes.values, plain.values)
    asked = (analyze_app, "eval", run, "--device", "cpu", "--json", "--quiet")
    assert json.loads(invoke(*asked).stdout) == json.loads(invoke(*asked, "--stage", disk).stdout)
    assert copies(disk) == before
    shutil.rmtree(next(disk.iterdir()))
    invoke(*asked, "--stage", disk)
    assert copies(disk).keys() == before.keys()
    line = refused(analyze_app, "show", run, "--latent", 1, "--stage", tmp_path / "a/b")
    assert "a/b: expected a folder on a disk of this machine" in line


def test_wrong_bytes_are_never_read_and_nothing_is_written(
    make_cache: Callable[..., Path], tmp_path: Path, disk: Path
) -> None:
    cache = make_cache()
    file = next(cache.glob("activations/layer_3/c*"))
    file.write_bytes(bytes(file.stat().st_size))
    with staging(disk), pytest.raises(CorruptCacheError, match="is damaged: its checksum is not the recorded"):
        train_sae(**RUN, cache=str(cache), runs_dir=str(tmp_path / "runs"), name="r")
    assert not list((tmp_path / "runs").rglob("run.json"))


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("{tmp}/nowhere/disk", "expected a folder on a disk of this machine; no such folder"),
        ("$NO_SUCH_VARIABLE", "--stage $NO_SUCH_VARIABLE: expected a folder"),
        (" ", "--stage is empty"),
        ("{tmp}/toy/manifest.json", "no such folder"),
        ("{tmp}/toy/new", "expected a folder outside of it"),
    ],
)
@pytest.mark.parametrize("command", ["run", "sweep"])
def test_a_folder_that_is_not_there_is_refused(
    folder: str, message: str, command: str, make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    flags = ["--cache", make_cache(), "--type", "topk", "--d-sae", 32, "--steps", 2, "--runs-dir", tmp_path / "runs"]
    flags += ["--stage", folder.format(tmp=tmp_path), *(["--grid", "k=2,4"] if command == "sweep" else [])]
    assert message in refused(app, command, *flags)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "toy" / "new").exists()


def test_a_url_is_copied_to_the_same_folder(
    make_cache: Callable[..., Path], tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRANARY_STAGE", str(disk))
    cache = make_cache()
    result = train_sae(**RUN, cache=f"file://{cache}", runs_dir=str(tmp_path / "runs"), name="r")
    assert result.folder.is_dir()
    (copy,) = disk.iterdir()
    assert open_cache(copy).n_rows == open_cache(cache).n_rows


def test_ranks_that_resume_copy_a_url_each_to_a_disk_of_their_machine(
    make_cache: Callable[..., Path], tmp_path: Path, forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, stop = make_cache(), StopRequest()
    hosts = [tmp_path / f"host_{rank}" for rank in (0, 1)]
    for host in hosts:
        host.mkdir()

    def stop_at_2(event: StepEvent) -> None:
        stop.signum = signal.SIGTERM if event.step == 2 else None

    monkeypatch.setenv("GRANARY_STAGE", str(hosts[0]))
    with pytest.raises(InterruptedRunError):
        train_sae(**RUN, cache=f"file://{cache}", runs_dir=str(tmp_path), name="r", stop=stop, callbacks=[stop_at_2])
    jobs = [(command, "sae_granary.train", "resume", str(tmp_path / "r"))] * 2
    for code, output in ended(start(forks, jobs, GRANARY_STAGE=f"{tmp_path}/host_$RANK", GRANARY_RANK_TIMEOUT="60")):
        assert code == 0, output
    ours, theirs = (list(host.iterdir()) for host in hosts)
    assert [copy.name for copy in ours] == [copy.name for copy in theirs]
    assert verify(theirs[0]).ok


@pytest.mark.slow
@pytest.mark.parametrize(("name", "own"), [("run", ["--hook", "layer_3"]), ("sweep", ["--layers", "1,3"])])
def test_the_ranks_of_a_machine_share_the_copies(
    name: str, own: list[str], make_cache: Callable[..., Path], tmp_path: Path, disk: Path, forks: Forks
) -> None:
    cache = make_cache(hooks=("layer_1", "layer_3"))
    values = {**RUN, "cache": f"file://{cache}" if name == "run" else cache, "runs_dir": tmp_path, "stage": disk}
    flags = [part for key, value in values.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    job = (command, "sae_granary.train", name, *flags, *own, "--name", "r")
    for code, output in ended(start(forks, [job, job], GRANARY_RANK_TIMEOUT="60")):
        assert code == 0, output
    assert len(list((tmp_path / "r").rglob("sae_weights.safetensors"))) == (1 if name == "run" else 2)
    kept = copies(disk)
    assert {hook for hook in ("layer_1", "layer_3") for path in kept if f"activations/{hook}/" in path} == {
        "layer_1",
        "layer_3",
    }
