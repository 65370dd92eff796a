"""Settings of a process: made by the commands and by who asks, never by a call of the library."""

import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_kit import invoke, run_python

import sae_granary.train.run
from sae_granary import train_sae
from sae_granary.common.process import DENORMAL, flushed_denormals, flushes_denormals
from sae_granary.train.callbacks import Callback
from sae_granary.train.cli import app

REPO = Path(__file__).parents[1]

# Prints whether large blocks are reused: pages that one of 64 MiB touches for the first time after many were freed.
MEASURE = """
import resource
import torch
def measure():
    counts = []
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(sum(counts[10:]) / 10)
torch.set_num_threads(1)
"""
HARVEST_CALL = """
from pathlib import Path
from sae_granary.harvest.config import HarvestConfig, TextConfig
from sae_granary.models.config import ModelConfig, WhereConfig
from sae_granary.harvest.run import harvest_activations
harvest_activations(HarvestConfig(ModelConfig("demo", device="cpu"), WhereConfig(layers=(0,)), TextConfig("demo"),
                      max_tokens=500, out=Path("a")), quiet=True)
"""
TRAIN_CALL = """
from sae_granary import train_sae
train_sae(cache="toy", type="topk", d_sae=32, steps=3, batch_size=64, device="cpu", name="a")
"""
COMMAND = """
from typer.testing import CliRunner
from sae_granary.{stage}.cli import app
assert CliRunner().invoke(app, {flags!r}.split()).exit_code == 0
"""
HARVEST_FLAGS = "run -m demo -d demo --layer 0 --max-tokens 500 --out b --device cpu -q"
TRAIN_FLAGS = "run --cache toy --type topk --d-sae 32 --steps 3 --batch-size 64 --device cpu -q --name b"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")
@pytest.mark.parametrize(
    ("call", "stage", "flags"), [(HARVEST_CALL, "harvest", HARVEST_FLAGS), (TRAIN_CALL, "train", TRAIN_FLAGS)]
)
def test_freed_memory_is_kept_by_commands_and_not_by_calls(
    call: str, stage: str, flags: str, make_cache: Callable[[], Path], tmp_path: Path
) -> None:
    make_cache()
    code = "measure()\n".join([MEASURE, call, COMMAND.format(stage=stage, flags=flags), ""])
    told = run_python(code, cwd=tmp_path).stdout.splitlines()
    fresh, after_call, after_command = (float(line) for line in told if re.fullmatch(r"[\d.]+", line))
    assert after_call > 0.9 * fresh
    assert after_command * 10 < fresh


def test_denormals_are_flushed_by_commands_and_not_by_calls(
    make_cache: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor does not flush denormals")
    make_cache()
    monkeypatch.chdir(tmp_path)
    seen: list[bool] = []

    class Look(Callback):
        def on_step(self, context: object) -> None:
            seen.append(flushes_denormals())

    def watched(*args: object, **options: object) -> object:
        return train_sae(*args, callbacks=[Look()], **options)

    settings = {"cache": "toy", "type": "topk", "d_sae": 32, "steps": 2, "batch_size": 64, "device": "cpu"}
    watched(**settings, name="call")
    monkeypatch.setattr(sae_granary.train.run, "train_sae", watched)
    invoke(app, *TRAIN_FLAGS.split())
    assert seen == [False, False, True, True, True]
    assert not flushes_denormals()


def test_a_mean_gradient_that_fades_becomes_zero_within_and_not_outside() -> None:
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor does not flush denormals")
    faded = torch.full((100,), DENORMAL)
    with flushed_denormals():
        assert float((0.9 * faded).sum()) == 0.0
        with pytest.raises(RuntimeError, match="stop"), flushed_denormals():
            raise RuntimeError("stop")
        assert flushes_denormals()
    assert float((0.9 * faded).sum()) > 0.0


@pytest.mark.parametrize(("given", "expected"), [
    ({}, "1000"),
    ({"GOMP_SPINCOUNT": "7"}, "7"),
    ({"OMP_WAIT_POLICY": "active"}, "None"),
])  # fmt: skip
def test_commands_share_the_cores_before_torch_is_loaded(given: dict[str, str], expected: str) -> None:
    code = """
import os, sys
from typer.testing import CliRunner
from sae_granary.{0}.cli import app
early = "torch" not in sys.modules
assert CliRunner().invoke(app, ["{1}"]).exit_code == 0
print(early, os.environ.get("GOMP_SPINCOUNT"))
"""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    clean = {name: value for name, value in os.environ.items() if name not in names} | given
    for stage, command in (("train", "types"), ("cache", "ls")):
        assert run_python(code.format(stage, command), env=clean, cwd=REPO).stdout.split() == ["True", expected]
