"""Durable files, locks, and numbers for people."""

import errno
import os
from pathlib import Path

import pytest
from command_kit import run_python
from meanwhile_kit import meanwhile

from sae_granary.common import files, lock
from sae_granary.common.errors import ConfigError
from sae_granary.common.files import new_folder, remove_temporary, sync_folder, user_path, write_json, write_text
from sae_granary.common.lock import FolderLock, LockedError
from sae_granary.common.quantities import byte_size, duration, parse_count, quantity

REPO = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        *[("20k", 20_000), ("5M", 5 * 10**6), ("1.5B", 15 * 10**8), ("1g", 10**9), ("2T", 2 * 10**12), ("1_000", 1000)],
        *[("1e6", 10**6), ("7", 7), (" 7 ", 7), ("-1", -1), (".5k", 500), ("0", 0)],
    ],
)
def test_counts_have_suffixes(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "k", "lots", "1.5", "1.0005k", "5kk", "nan", "inf", "1e9999", "5 M x", "0x10", "16,32", "20,000"]
)
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a whole number such as 20000, 20k, 5M or"):
        parse_count(text)


def test_numbers_for_people() -> None:
    assert [quantity(v) for v in (12, 1234, 5e6, 2.5e9)] == ["12", "1.2k", "5.0M", "2.5B"]
    assert [duration(s) for s in (0.25, 42, 61, 3723, 9000)] == ["0.2 s", "42 s", "61 s", "62 min", "2.5 h"]
    assert [byte_size(n) for n in (0, 1023, 1536, 5 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    write_text(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "")
    assert os.listdir(tmp_path) == ["a.json"]
    assert not list(tmp_path.parent.glob(".tmp-*"))


def test_several_processes_write_one_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    written = list(meanwhile(lambda: write_text(path, "a" * 9), lambda: write_text(path, "b"), lambda: None))
    assert len(written) > 5
    assert path.read_text() == "a" * 9
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a") as temp:
        (temp / "x").write_text(str(1 / 0))
    assert os.listdir(tmp_path) == []
    with new_folder(tmp_path / "a") as temp:
        (temp / "x").write_text("x")
    (tmp_path / ".tmp-b").mkdir()
    remove_temporary(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["a", "a/x"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES, errno.ENOTSUP])
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_folder_that_cannot_be_synced_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    def refuse(*args: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refuse)
    sync_folder(tmp_path)


def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "nowhere")


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert files.free_bytes(Path("a/b/c")) > 0


@pytest.mark.parametrize("soft", [False, True])
def test_a_folder_has_one_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soft: bool) -> None:
    if soft:
        monkeypatch.setattr(lock, "fcntl", None)
    elif lock.fcntl is None:
        pytest.skip("no flock here")
    first, second = FolderLock(tmp_path / ".lock"), FolderLock(tmp_path / ".lock")
    first.acquire()
    with pytest.raises(LockedError, match=rf"in use by process {os.getpid()}, for \d") as caught:
        second.acquire()
    assert caught.value.pid == os.getpid()
    assert caught.value.age is not None
    first.release()
    first.release()
    second.acquire()
    second.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("soft", [False, True])
def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soft: bool) -> None:
    code = (
        "import os, sys, pathlib\nfrom sae_granary.common import lock\n"
        f"if {soft}: lock.fcntl = None\n"
        "held = lock.FolderLock(pathlib.Path(sys.argv[1]))\nheld.acquire()\nos._exit(0)"
    )
    path = tmp_path / ".lock"
    run_python(code, path)
    assert path.exists()
    if soft:
        monkeypatch.setattr(lock, "fcntl", None)
    held = FolderLock(path)
    held.acquire()
    held.release()
    assert not path.exists()


@pytest.mark.parametrize("text", ["", " ", "a\nb", "a\x1b[31m"])
def test_a_folder_has_a_name_that_can_be_shown(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--out is (empty|'a.*': it holds a newline or control character)"):
        user_path("--out", text)


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert user_path("--out", "~/caches/x") == Path("/home/ann/caches/x")
    assert user_path("--out", "a~b") == Path("a~b")
