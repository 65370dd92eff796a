"""Finding caches: ls at any depth, names in GRANARY_CACHE_DIR, rm, and what about.json holds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cache_kit import harvest, interrupted, toy_spec
from cache_kit import run_cache as run

import sae_granary
from sae_granary.cache.errors import NotACacheError
from sae_granary.cache.read.verify import verify
from sae_granary.cache.write.about import HIDDEN, command_line, read_about, record_about
from sae_granary.cache.write.session import locked

ROOT = Path(__file__).parents[1]


def test_ls_finds_caches_at_any_depth_and_sorts_them(tmp_path):
    harvest(tmp_path / "a/b/deep", toy_spec(provenance={"model": {"id": "z"}, "dataset": {"name": "wiki"}}))
    harvest(tmp_path / "small", toy_spec(provenance={"model": {"id": "a"}}, dtype="float32"))
    harvest(tmp_path / "small/activations/nested")  # inside a cache: not another one
    (tmp_path / "link").symlink_to(tmp_path / "a")
    os.utime(tmp_path / "small/manifest.json", (0, 0))
    names = lambda *flags: [Path(e["path"]).name for e in json.loads(run("ls", tmp_path, "--json", *flags).stdout)]  # noqa: E731
    assert names() == ["deep", "small"]
    assert names("--sort", "model") == ["small", "deep"]
    assert names("--sort", "age") == ["deep", "small"]
    assert names("--sort", "size") == ["small", "deep"]
    assert "wiki" in run("ls", tmp_path).stdout
    assert "expected path" in run("ls", tmp_path, "--sort", "color", code=2).stderr


def test_ls_tells_growing_from_interrupted(tmp_path):
    interrupted(tmp_path / "toy")
    state = lambda: json.loads(run("ls", tmp_path, "--json").stdout)[0]["state"]  # noqa: E731
    assert state() == "incomplete"
    lock = locked(tmp_path / "toy")
    assert state() == "growing"
    lock.release()


def test_a_name_is_found_in_the_folders_of_the_variable(tmp_path, monkeypatch):
    harvest(tmp_path / "one/bert_l6")
    harvest(tmp_path / "two/gpt2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRANARY_CACHE_DIR", os.pathsep.join([str(tmp_path / "one"), str(tmp_path / "two")]))
    assert sae_granary.open_cache("gpt2").path == tmp_path / "two/gpt2"
    assert "ok" in run("verify", "bert_l6", "gpt2").stdout
    assert "toy" in run("info", "bert_l6").stdout
    assert len(json.loads(run("ls", "--json").stdout)) == 2
    with pytest.raises(NotACacheError, match=r"looked at gpt3, .*one/gpt3, .*two/gpt3"):
        sae_granary.open_cache("gpt3")
    error = run("info", "gpt3", code=2).stderr
    assert "two/gpt3" in error
    assert error.count("\n") == 1
    (tmp_path / "gpt2").mkdir()  # what is here comes first
    with pytest.raises(NotACacheError, match=r"no manifest\.json"):
        sae_granary.open_cache("gpt2")


def test_names_that_cannot_be_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRANARY_CACHE_DIR", str(tmp_path))
    for name, why in [("~nobody-of-that-name/x", "there is no such user"), ("x" * 5000, "no cache xxx")]:
        error = run("info", name, code=2).stderr
        assert why in error
        assert error.count("\n") == 1
    monkeypatch.setenv("GRANARY_CACHE_DIR", "~nobody-of-that-name")
    assert "there is no such user" in run("ls", code=2).stderr


def test_ls_names_the_variable_whose_folder_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRANARY_CACHE_DIR", f"/nonexistent{os.pathsep}{tmp_path}/none")
    told = f"GRANARY_CACHE_DIR names /nonexistent, {tmp_path}/none: no such folder"
    assert run("ls", code=2).stderr == f"error: {told}, and there is no folder cache here\n"
    harvest(tmp_path / "cache/c")
    listed = run("ls", "--json")
    assert len(json.loads(listed.stdout)) == 1
    assert listed.stderr == f"{told}\n"
    assert run("ls", "cache").stderr == ""


def test_rm_refuses_a_url_and_copies_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("GRANARY_REMOTE_DIR", str(tmp_path / "copies"))
    harvest(tmp_path / "c")
    error = run("rm", f"file://{tmp_path}/c", "--yes", code=2).stderr
    assert "is remote, and rm removes local caches" in error
    assert not (tmp_path / "copies").exists()
    assert (tmp_path / "c/manifest.json").exists()


def test_rm_removes_a_cache_and_nothing_else(tmp_path):
    harvest(tmp_path / "c")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").touch()
    shutil.rmtree(tmp_path / "c/documents")
    (tmp_path / "c/documents").symlink_to(tmp_path / "outside")
    assert "kept " in run("rm", tmp_path / "c", stdin="n\n").stdout
    assert "no terminal to confirm on; give --yes" in run("rm", tmp_path / "c", code=2).stderr
    assert (tmp_path / "c/manifest.json").exists()
    run("rm", tmp_path / "c", "--yes")
    assert not (tmp_path / "c").exists()
    assert (tmp_path / "outside/file").exists()


def test_rm_refuses_what_is_no_cache_or_in_use(tmp_path):
    harvest(tmp_path / "c")
    (tmp_path / "link").symlink_to(tmp_path / "c")
    (tmp_path / "notes").mkdir()
    for path, why in [
        ("link", "is a link"),
        ("notes", "manifest.json"),
        ("none", "does not exist"),
        (ROOT / "cache", "code"),
    ]:
        assert why in run("rm", tmp_path / path, "--yes", code=2).stderr
    (tmp_path / "c/my_notes.txt").touch()
    assert "my_notes.txt" in run("rm", tmp_path / "c", "--yes", code=2).stderr
    (tmp_path / "c/my_notes.txt").unlink()
    lock = locked(tmp_path / "c")
    assert "is being written" in run("rm", tmp_path / "c", "--yes", code=2).stderr
    lock.release()
    assert verify(tmp_path / "c").ok


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc tells who reads a file")
def test_rm_refuses_a_cache_that_another_process_reads(tmp_path):
    harvest(tmp_path / "c")
    code = (
        "import sys, sae_granary; rows = sae_granary.open_cache(sys.argv[1]).hook('layer_1').shard(0)\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "c"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with reader:
        assert reader.stdout.readline() == b"ready\n"
        error = run("rm", tmp_path / "c", "--yes", code=2).stderr
        assert f"read by process {reader.pid}" in error
        reader.stdin.close()
    assert verify(tmp_path / "c").ok
    run("rm", tmp_path / "c", "--yes")


def test_about_tells_when_how_and_where_without_secrets(tmp_path, monkeypatch):
    harvest(tmp_path / "c")
    monkeypatch.setattr(sys, "argv", ["/home/ann/bin/sae-harvest", "run", "--token", "hf_CANARYcanary"])
    record_about(tmp_path / "c")
    record_about(tmp_path / "c", user=True)
    first, second = read_about(tmp_path / "c")
    assert first["command"] == ["sae-harvest", "run", "--token", HIDDEN]
    assert set(first["machine"]) == {"system", "cpu", "cores", "gpu"}
    assert ("user" in first, "user" in second) == (False, True)
    report = verify(tmp_path / "c")
    assert report.ok
    assert not report.foreign
    (tmp_path / "c/about.json").write_text("{")
    assert read_about(tmp_path / "c") == []


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--hf-token=abc"], [f"--hf-token={HIDDEN}"]),
        (["--max-tokens", "5M", "--batch-tokens", "4096"], ["--max-tokens", "5M", "--batch-tokens", "4096"]),
        (["s3://user:pass@host/x?sig=abc"], [f"s3://{HIDDEN}host/x?{HIDDEN}"]),
        (["--set", "x=hf_abcdefgh"], ["--set", f"x={HIDDEN}"]),
        (["--api-key", "k", "--yes"], ["--api-key", HIDDEN, "--yes"]),
        ([os.path.expanduser("~/data.txt")], ["~/data.txt"]),
    ],
)
def test_command_lines_are_stored_without_secrets(given, kept):
    assert command_line(["sae-harvest", *given]) == ["sae-harvest", *kept]
