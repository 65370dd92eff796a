"""Which kernels are taken, and that nothing changes where Triton is not wanted."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sae_granary.common.threads import shown
from sae_granary.sae_core.kernels import choice, choose


@pytest.fixture(autouse=True)
def _asks_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    choose(None)
    yield
    choose(None)


def installed(monkeypatch: pytest.MonkeyPatch, triton: bool) -> None:
    monkeypatch.setattr(choice, "triton_installed", lambda: triton)
    monkeypatch.setattr(choice, "_try_kernel", lambda: None)


class OnCuda:
    is_cuda = True


@pytest.mark.parametrize(("variable", "triton", "on_cpu", "on_cuda"), [
    (None, True, False, True),
    (None, False, False, False),
    ("", True, False, True),
    ("auto", True, False, True),
    ("eager", True, False, False),
    ("triton", True, True, True),
])  # fmt: skip
def test_the_environment_chooses(monkeypatch, variable, triton, on_cpu, on_cuda) -> None:
    installed(monkeypatch, triton)
    if variable is not None:
        monkeypatch.setenv(choice.VARIABLE, variable)
    assert choice.takes_triton(torch.zeros(1)) is on_cpu
    assert choice.takes_triton(OnCuda()) is on_cuda


def test_the_choice_is_made_once_until_it_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, True)
    assert choice.takes_triton(OnCuda())
    monkeypatch.setenv(choice.VARIABLE, "eager")
    assert choice.takes_triton(OnCuda())
    choose("eager")
    assert not choice.takes_triton(OnCuda())


def test_a_triton_that_fails_is_one_line_and_torch_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("PTX was compiled for\n another driver")

    installed(monkeypatch, True)
    monkeypatch.setattr(choice, "_try_kernel", fails)
    said: list[str] = []
    with shown(said.append):
        assert [choice.takes_triton(OnCuda()) for _ in range(3)] == [False] * 3
    assert said == [
        "Triton fails on this GPU (PTX was compiled for another driver): torch's own operations are used, "
        "which are slower"
    ]
    choose("triton")
    assert choice.takes_triton(OnCuda())  # asked for by name it is not replaced


def test_a_gpu_without_triton_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said: list[str] = []
    with shown(said.append):
        assert not choice.takes_triton(OnCuda())
        assert not choice.takes_triton(OnCuda())
    assert len(said) == 1
    assert said[0].startswith("Triton is not installed: torch's own operations are used")


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="GRANARY_KERNELS='fast': expected one of auto, eager, triton"):
        choose("fast")
    monkeypatch.setenv(choice.VARIABLE, "fast")
    with pytest.raises(ValueError, match="GRANARY_KERNELS='fast'"):
        choice.takes_triton(torch.zeros(1))


def test_a_folder_called_triton_is_not_triton(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    code = "from sae_granary.sae_core.kernels import choice; print(choice.triton_installed())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == str(importlib.util.find_spec("triton") is not None)


def test_importing_the_models_does_not_import_triton() -> None:
    code = "import sys, sae_granary.sae_core.kernels; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
