"""What other people's files may do to us: FIFOs, control characters, depth, signals while files are read, mutations."""

import errno
import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
from cache_kit import harvest, interrupted, toy_spec
from command_kit import WIDE, invoke
from fork_kit import LIMIT
from mutations import mutate_bytes, mutate_value

from sae_granary import open_cache
from sae_granary.cache.cli import app as cache_app
from sae_granary.cache.errors import CacheError, CorruptCacheError
from sae_granary.cache.format.signed import dump_signed
from sae_granary.cache.read.verify import verify
from sae_granary.cache.write.session import Session
from sae_granary.common.app import expected_errors, make_console
from sae_granary.common.errors import GranaryError, printable
from sae_granary.common.files import NotRegularError, hash_files, read_regular
from sae_granary.common.lock import FolderLock
from sae_granary.common.signed import DamagedFileError, Fields, parse_object
from sae_granary.train.cli import app as train_app
from sae_granary.train.commands.train_command import show_training
from sae_granary.train.config.merge import make_config
from sae_granary.train.data.run_data import RunData

CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e]")
NASTY = "\x1b[2J\x07ber\rt\x9b1m\u202e"
HOSTILE = {"model": {"id": NASTY, "note\x1b": "a\nb"}, "command": "rm -rf ~", "more": NASTY}


@pytest.fixture(autouse=True)
def no_waiting():
    """What waits forever fails instead."""

    def late(signum, frame):
        raise AssertionError(f"still waiting after {LIMIT:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(int(LIMIT))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "whole"
    harvest(path, toy_spec("float32", provenance=HOSTILE, hooks=("layer_1",), vocabulary=None), n_buffers=4)
    return path


@pytest.fixture
def cache(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "caches" / "c"))


def run(app, *args, code: int) -> str:
    output = invoke(app, *args, code=code, env=WIDE).output
    assert not CONTROL.search(output), repr(output)
    return output


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "socket"])
def test_no_command_waits_for_what_is_no_file(cache, kind) -> None:
    file = cache / "manifest.json"
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "socket":
        os.mknod(file, 0o140600)
    elif os.geteuid() == 0:
        os.mknod(file, 0o020600, os.makedev(1, 5))  # /dev/zero
    else:
        pytest.skip("needs root: it makes a device")
    wanted = "a folder, expected a file" if kind == "folder" else "not a regular file but a FIFO, socket or device"
    assert wanted in run(cache_app, "info", cache, code=2)
    assert wanted in run(cache_app, "ls", cache.parent, code=0)
    assert wanted in run(cache_app, "verify", cache, code=2)
    flags = ["--cache", cache, "--type", "topk", "--k", 2, "--runs-dir", cache.parent / "runs"]
    assert wanted in run(train_app, "run", *flags, code=2)


def test_files_are_read_hashed_and_locked_only_if_regular(tmp_path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for read in (read_regular, lambda path: hash_files([path]), lambda path: FolderLock(path).acquire()):
        with pytest.raises(NotRegularError) as caught:
            read(fifo)
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, str(fifo))
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_run_is_opened_is_answered_at_once(signum, capsys) -> None:
    read, _ = os.pipe()

    def waits_for_ever(sinks, stop):
        os.kill(os.getpid(), signum)
        os.read(read, 1)

    with pytest.raises(BaseException) as caught, expected_errors(debug=False, interrupted="interrupted"):  # noqa: PT011
        show_training(waits_for_ever, quiet=True, device="cpu")
    assert getattr(caught.value, "exit_code", None) == 128 + signum
    assert "interrupted" in capsys.readouterr().err


def test_control_characters_of_a_manifest_do_not_reach_the_terminal(cache, tmp_path) -> None:
    shown = run(cache_app, "info", cache, code=0)
    assert r"\x1b[2J\x07ber\rt\x9b1m\u202e" in shown
    assert r"note\x1b" not in shown  # of the model only its name is shown
    assert r"\x1b[2J" in run(cache_app, "ls", cache.parent, code=0)
    assert not CONTROL.search(repr(open_cache(cache)).replace("\n", ""))
    for name in (f"bad{NASTY}", "bytes\udcff"):
        shutil.copytree(cache, cache.parent / name)
        (cache.parent / name / "manifest.json").write_text('{"format": "\\u001b[2J"}')
    shown = run(cache_app, "ls", cache.parent, code=0)
    assert r"format is '\x1b[2J'" in shown
    run(cache_app, "info", cache.parent / f"bad{NASTY}", code=2)
    run(train_app, "run", "--cache", cache.parent / f"bad{NASTY}", "--type", "topk", "--k", 2, code=2)
    (cache / f"foreign{NASTY}").touch()
    assert r"foreign\x1b[2J" in run(cache_app, "verify", cache, code=0)


def test_control_characters_of_a_summary_do_not_reach_the_terminal(tmp_path) -> None:
    run_folder = tmp_path / "r"
    run_folder.mkdir()
    summary = {"name": NASTY, "type": NASTY, "d_sae": 8, "k": NASTY, "notes": [NASTY], "eval": {"l0": 1.0, "fvu": 0.5}}
    numbers = dict.fromkeys(("dead", "seconds", "tokens_per_second", "l0_train"), 0.5)
    (run_folder / "summary.json").write_text(json.dumps({**summary, **numbers, "tokens": 5, "device": "cpu"}))
    assert r"\x1b[2J" in run(train_app, "compare", run_folder, code=0)


def test_a_console_escapes_whatever_it_prints(capsys) -> None:
    make_console().print(f"[bold]{NASTY}[/bold] ünïcode \u200d 日本", soft_wrap=True)
    shown = r"\x1b[2Jbert\x9b1m\u202e ünïcode" + " \u200d 日本\n"  # BEL and CR are taken out by rich
    assert capsys.readouterr().out == shown
    assert printable("a\nb\tc\x1b\ud800", keep="\n") == "a\nb\\tc\\x1b\\ud800"


def test_a_command_in_a_manifest_is_not_printed_as_one_to_run(tmp_path) -> None:
    path = interrupted(tmp_path / "c", toy_spec(provenance=HOSTILE), after=100)
    with pytest.raises(
        CacheError, match=rf"run the same `sae-harvest run ... --out {re.escape(str(path))}` again"
    ) as e:
        open_cache(path)
    assert "rm -rf" not in str(e.value)


def _signed(cache: Path, **changes: object) -> None:
    file = cache / "manifest.json"
    file.write_bytes(dump_signed({**_body(file), **changes}))


def _body(file: Path) -> dict:
    return {k: v for k, v in json.loads(file.read_bytes()).items() if k not in ("format", "version", "xxh3")}


def _nested(depth: int) -> dict:
    value: dict = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def test_deep_and_long_provenance_is_bounded(cache) -> None:
    _signed(cache, provenance=_nested(90))
    run(cache_app, "info", cache, code=0)
    run(cache_app, "info", cache, "--json", code=0)
    many = {f"key{i}": "long " * 10_000 for i in range(1000)}
    _signed(cache, provenance=many)
    shown = run(cache_app, "info", cache, code=0)
    assert "801 more: --json prints all" in shown
    assert len(shown) < 2_000_000
    _signed(cache, provenance=_nested(400))
    assert "nested deeper than 100 levels" in run(cache_app, "info", cache, code=2)
    assert "nested deeper" in run(cache_app, "ls", cache.parent, code=0)


@pytest.mark.parametrize("model", ["bert", None, 3, ["bert"], {"id": 3, "n_layers": "many"}])
def test_a_model_of_another_type_in_the_provenance_is_no_traceback(cache, model) -> None:
    _signed(cache, provenance={"model": model})
    run(cache_app, "info", cache, code=0)
    RunData.open(make_config([{"cache": str(cache), "type": "topk", "k": 2, "batch_size": 8}]))


def test_what_is_signed_is_parsed_strictly() -> None:
    for data, message in (
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"[" * 120 + b"]" * 120 + b"}", "deeper than 100"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_object(data)
    assert parse_object(b'{"a": NaN}', allow_nan=True).keys() == {"a"}
    with pytest.raises(DamagedFileError, match=r"file, a: b is True, expected int"):
        Fields({"a": {"b": True}}, "file").nested("a").integer("b")
    with pytest.raises(DamagedFileError, match=r"b is 'x{90,96}\.\.\., expected int"):
        Fields({"b": "x" * 500}, "file").number("b")


def _lines(action):
    """What an action gives, or the one line of its error."""
    said = None
    try:
        return action()
    except GranaryError as error:
        said = str(error)
    assert len(said.splitlines()) == 1, said
    return said


# -- 2,000 mutations ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_1000_mutations_of_the_bytes_of_a_manifest_none_is_silent(whole, cache) -> None:
    chance, file = random.Random(0), cache / "manifest.json"
    before = file.read_bytes()
    for i in range(1000):
        data = mutate_bytes(before, chance)
        if data != before:
            file.write_bytes(data)
            with pytest.raises(CacheError) as caught:
                open_cache(cache, allow_incomplete=True)
            assert len(str(caught.value).splitlines()) == 1, i
        signal.alarm(int(LIMIT))


@pytest.mark.slow
def test_of_300_mutations_of_signed_values_of_a_manifest_none_is_a_traceback(whole, cache) -> None:
    """What opens is described, verified and trained from, or refused in one line; its rows are the same or refused."""
    chance, file, outcomes = random.Random(1), cache / "manifest.json", {"refused": 0, "opened": 0}
    body = _body(file)
    rows = open_cache(whole).hook("layer_1")[:].copy()
    settings = {"cache": str(cache), "type": "topk", "k": 2, "batch_size": 8, "steps": 2}
    for i in range(300):
        signal.alarm(int(LIMIT))
        value = mutate_value(body, chance)
        try:
            file.write_bytes(dump_signed(value if isinstance(value, dict) else {}))
        except ValueError:  # NaN
            continue
        run(cache_app, "ls", cache.parent, code=0)
        opened = _lines(lambda: open_cache(cache, allow_incomplete=True))
        if isinstance(opened, str):
            outcomes["refused"] += 1
            run(cache_app, "info", cache, code=2)
            continue
        outcomes["opened"] += 1
        good = verify(cache).ok
        found = opened.hook(next(iter(opened.hook_points)))[:]
        assert not good or (found == rows).all(), i
        run(cache_app, "info", cache, code=0)
        _lines(lambda: RunData.open(make_config([settings])))
    assert min(outcomes.values()) > 30


def test_a_cache_whose_harvest_has_just_begun_says_so_at_every_moment(tmp_path, monkeypatch) -> None:
    path, said = tmp_path / "c", set()

    def look(*_: object) -> None:
        with pytest.raises(CacheError) as caught:
            open_cache(path)
        said.add(str(caught.value).removeprefix(f"{path} ").split(";")[0])
        report = verify(path)
        assert report.ok or "has just begun" in report.problems[0].problem
        if (path / "manifest.json").exists():
            assert "layer_1" in run(cache_app, "info", path, code=0)
            assert "growing" in run(cache_app, "ls", tmp_path, code=0)
            settings = {"cache": str(path), "type": "topk", "k": 2, "hook": "layer_1", "allow_incomplete": True}
            with pytest.raises(GranaryError, match="0 rows to train on"):
                RunData.open(make_config([settings]))

    def watched(original):
        def step(session, *args):
            look()
            original(session, *args)
            look()

        return step

    for name in ("put", "replace"):
        monkeypatch.setattr(Session, name, watched(getattr(Session, name)))

    def begun(n_rows: int) -> None:
        look()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harvest(path, toy_spec(), before_append=begun)
    assert said == {
        "holds nothing yet: a harvest has just begun, or was stopped as it began",
        "is incomplete: its harvest has just begun",
    }


def test_what_is_missing_of_a_cache_with_shards_is_damage(tmp_path) -> None:
    path = interrupted(tmp_path / "c", after=100)
    (path / "vocabulary.json").unlink()
    with pytest.raises(CacheError, match=r"vocabulary.json is missing"):
        open_cache(path, allow_incomplete=True)


def test_links_are_still_refused(cache, whole) -> None:
    (cache / "manifest.json").unlink()
    (cache / "manifest.json").symlink_to(whole / "manifest.json")
    with pytest.raises(CorruptCacheError, match="symbolic link"):
        open_cache(cache)
