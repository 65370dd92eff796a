"""The JSON and YAML of a run: a changed byte is refused in one line; those of before, without checksums, resume."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import command_kit
import pytest
import yaml
from command_kit import invoke
from conftest import write_cache
from mutations import mutate_bytes, mutate_value
from test_train_resume import interrupted

from sae_granary import resume_sweep, resume_training, train_sae, train_sweep
from sae_granary.common.errors import GranaryError
from sae_granary.common.finished_run import NotARunError, read_summary
from sae_granary.common.signals import StopRequest
from sae_granary.common.signed import digest, sign
from sae_granary.train.cli import app
from sae_granary.train.errors import CheckpointError

SETTINGS = {"type": "topk", "k": 2, "d_sae": 24, "batch_size": 64, "steps": 5, "log_every": 1, "eval_rows": 200}
STEP = "checkpoints/step_00000003"
STATE = f"{STEP}/state.json"


@pytest.fixture(scope="module")
def whole_and_stopped(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    settings = {**SETTINGS, "cache": str(write_cache(folder / "toy", n_docs=20, d_in=8))}
    whole = train_sae(**settings, runs_dir=str(folder / "whole"), name="r").folder
    return whole, interrupted(3, **settings, runs_dir=str(folder / "stopped"), name="r")


@pytest.fixture
def stopped(whole_and_stopped, tmp_path) -> Path:
    return Path(shutil.copytree(whole_and_stopped[1], tmp_path / "r"))


def weights(folder: Path) -> bytes:
    return (folder / "sae_weights.safetensors").read_bytes()


def body_of(path: Path) -> dict:
    return {k: v for k, v in json.loads(path.read_text()).items() if k != "xxh3"}


def without_checksums(folder: Path) -> Path:
    """The run files as they were before version 2."""
    record, state = folder / "run.json", folder / STATE
    body = {k: v for k, v in body_of(record).items() if k != "config_xxh3"}
    record.write_text(json.dumps({**body, "version": 1}, indent=2))
    state.write_text(json.dumps({**body_of(state), "format_version": 1}, indent=2))
    return folder


def refused(folder: Path, *words: str) -> str:
    said = command_kit.refused(app, "resume", folder, "--quiet")
    assert all(word in said for word in words), said
    return said


@pytest.mark.parametrize("name", ["run.json", STATE])
def test_a_changed_value_is_refused(stopped, name) -> None:
    path = stopped / name
    text = path.read_text()
    for before, after in ((": 3,", ": 4,"), ("loss", "mass"), ('"seed": 0', '"seed": 1'), ('"xxh3"', '"xxh4"')):
        if before in text:
            path.write_text(text.replace(before, after))
            refused(stopped, f"{name}: the checksum in its last line does not fit: truncated or altered")
    path.write_text("\n".join(text.splitlines()[:-2]).rstrip(",") + "\n}\n")  # the checksum is cut off
    refused(stopped, f"{name}: the checksum in its last line does not fit")
    path.write_text(text)
    resume_training(stopped)


def test_an_edited_config_is_refused_and_starts_another_run(stopped, whole_and_stopped, tmp_path) -> None:
    path = stopped / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("k: 2\n", "k: 3\n"))
    said = refused(stopped, "config.yaml was changed since the run started", "restore the file, or start a new run")
    command = said.partition("sae-train ")[2].split()
    command[-1] = "other"
    invoke(app, *command, "--runs-dir", tmp_path / "new", "--quiet")
    assert read_summary(tmp_path / "new" / "other")["k"] == 3
    path.write_text(text)
    assert weights(resume_training(stopped).folder) == weights(whole_and_stopped[0])


def test_runs_of_before_there_were_checksums_resume(stopped, whole_and_stopped) -> None:
    assert weights(resume_training(without_checksums(stopped)).folder) == weights(whole_and_stopped[0])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("run.json", {"order": {"shards": [[0]]}}, "shards is [0], expected pairs of shard and rows"),
        ("run.json", {"order": []}, "expected an object, got []"),
        ("run.json", {"counts": {"train": "many"}}, "train is 'many', expected int"),
        ("run.json", {"counts": {"lost": 3}}, "row accounting does not fit"),
        ("run.json", {"cache": None}, "expected an object, got None"),
        ("run.json", {"wandb_id": 3}, "wandb_id is 3, expected str"),
        ("run.json", {"version": 0}, "not a run of a version"),
        (STATE, {"step": 4}, "state.json is of step 4; remove"),
        (STATE, {"tokens": 1.5}, "tokens is 1.5, expected int"),
        (STATE, {"loader": {"epoch": -1}}, "epoch is -1, expected an integer from 0"),
        (STATE, {"identity": {"cache": {}}}, "order is None, expected dict"),
        (STATE, {"files": {}}, "does not list sae/sae.json"),
        (STATE, {"score": "low"}, "score is 'low', expected int"),
        (STATE, {"extra": [[[[]]]]}, "extra is [[[[]]]], expected dict"),
    ],
)
def test_fields_of_another_type_are_one_line(stopped, name, change, message) -> None:
    path = without_checksums(stopped) / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(stopped, message)


def test_another_option_than_the_checkpoint_has_is_refused(stopped) -> None:
    path = without_checksums(stopped) / "config.yaml"
    path.write_text(path.read_text().replace("k: 2\n", "k: 3\n"))
    refused(stopped, "holds an SAE with other options than the run's config says")


def test_a_damaged_summary_is_refused_and_written_again(whole_and_stopped, tmp_path) -> None:
    folder = Path(shutil.copytree(whole_and_stopped[0], tmp_path / "r"))
    path = folder / "summary.json"
    text = path.read_text()
    path.write_text(text.replace('"steps": 5', '"steps": 7'))
    with pytest.raises(NotARunError, match=r"summary.json: the checksum in its last line does not fit"):
        read_summary(folder)
    resume_training(folder)
    assert read_summary(folder)["eval"] == json.loads(text)["eval"]


def test_a_note_of_a_failure_that_is_damaged_is_no_note(whole_and_stopped, tmp_path) -> None:
    settings = {**SETTINGS, "cache": str(whole_and_stopped[0].parent.parent / "toy"), "runs_dir": str(tmp_path)}
    folder = train_sweep({"k": [2]}, {**settings, "k": None}).folder
    member = next(p.parent for p in folder.glob("*/summary.json"))
    (member / "summary.json").unlink()
    failure = {"error": "diverged", "type": "DivergedError", "step": 3, "final": True}
    (member / "failure.json").write_bytes(sign(failure))
    assert resume_sweep(folder).failures == {member.name: "diverged"}
    (member / "failure.json").write_bytes(sign(failure).replace(b"diverged", b"perished"))
    assert resume_sweep(folder).failures == {}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize("name", ["run.json", "config.yaml", f"{STEP}/optimizer.safetensors", f"{STEP}/sae/sae.json"])
def test_a_fifo_is_not_waited_for(stopped, name) -> None:
    (stopped / name).unlink()
    os.mkfifo(stopped / name)
    refused(stopped, name)


# -- 2,000 mutations ---------------------------------------------------------------------------------------------------


def outcome(folder: Path) -> str | None:
    """The one line in which a resume is refused, or None if it went through; one of very many steps is stopped."""
    said, stop = None, StopRequest()
    before = signal.signal(signal.SIGALRM, lambda *_: setattr(stop, "signum", signal.SIGTERM))
    signal.alarm(2)
    try:
        resume_training(folder, stop=stop)
    except (GranaryError, OSError) as error:
        said = str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert said is None or len(said.splitlines()) == 1, said
    return said


@pytest.mark.slow
def test_of_500_mutations_of_signed_run_files_none_gives_another_result(stopped, whole_and_stopped, tmp_path) -> None:
    chance, wanted = random.Random(0), weights(whole_and_stopped[0])
    names = ["run.json", "config.yaml", STATE, f"{STEP}/sae/sae.json", f"{STEP}/rng.safetensors"]
    n_refused = 0
    for i in range(500):
        folder = Path(shutil.copytree(stopped, tmp_path / "mutated"))
        path = folder / chance.choice(names[: 3 if i % 10 else 5])
        before = path.read_bytes()
        path.write_bytes(mutate_bytes(before, chance))
        said = outcome(folder)
        n_refused += said is not None
        if path.read_bytes() != before and said is None:
            assert weights(folder) == wanted, (i, path.name)  # only what no program reads had changed
            raise AssertionError((i, path.name, "was not noticed"))
        shutil.rmtree(folder)
    assert n_refused > 460


@pytest.mark.slow
def test_of_200_mutations_of_values_in_run_files_of_before_none_is_a_traceback(stopped, tmp_path) -> None:
    """Nothing can tell a changed value of these, but each has a type."""
    n_refused = 0
    without_checksums(stopped)
    for i in range(200):
        chance = random.Random(i)  # seeds and paths in the files have other lengths elsewhere
        folder = Path(shutil.copytree(stopped, tmp_path / "mutated"))
        path = folder / ["run.json", STATE, "config.yaml"][i % 3]
        if path.suffix == ".yaml":
            content = mutate_value(yaml.safe_load(path.read_text()), chance)
            path.write_text(yaml.safe_dump(content))
        elif i % 2:
            path.write_bytes(mutate_bytes(path.read_bytes(), chance))
        else:
            path.write_text(json.dumps(mutate_value(json.loads(path.read_text()), chance)))
        n_refused += outcome(folder) is not None
        shutil.rmtree(folder)
    assert n_refused > 65


def test_checksums_are_what_the_format_says(stopped) -> None:
    data = (stopped / "run.json").read_bytes()
    head, _, tail = data.rpartition(b',\n "xxh3": ')
    assert tail == f'"{digest(head)}"\n}}\n'.encode()
    assert json.loads(data)["config_xxh3"] == digest((stopped / "config.yaml").read_bytes())
    (stopped / STATE).write_bytes((stopped / STATE).read_bytes() + b"\n")
    with pytest.raises(CheckpointError, match="does not fit"):
        resume_training(stopped)
