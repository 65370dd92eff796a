"""What all commands share: the version, errors in one red line, signals, devices."""

import errno
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_kit import run_python
from typer.testing import CliRunner, Result

from sae_granary.common.app import Debug, expected_errors, make_app
from sae_granary.common.device import choose_device
from sae_granary.common.errors import ConfigError, GranaryError, nearest, one_line
from sae_granary.common.signals import Interrupted, StopRequest, stop_on_signals

REPO = Path(__file__).parents[1]


def call(raising: Callable[[], object], *flags: str) -> Result:
    app = make_app("x", "About x.")

    @app.command()
    def work(debug: Debug = False) -> None:
        with expected_errors(debug, interrupted="interrupted: again", remedy="fix this"):
            raising()

    return CliRunner().invoke(app, ["work", *flags])


def raiser(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize("value", ["a" * 5000, "a b" * 5000])
def test_a_message_leaves_out_the_middle_of_a_long_value(value: str) -> None:
    line = call(raiser(GranaryError(f"no layer {value!r}: give another"))).stderr
    assert len(line) < 1200
    assert re.fullmatch(r"error: no layer 'a.* \.\.\.\([\d,]+ characters\)\.\.\. .*: give another\n", line)
    for argument in (value, f"--{value}"):
        usage = call(raiser(GranaryError("none")), argument)
        assert usage.exit_code == 2
        assert "characters)..." in usage.stderr
        assert usage.stderr.count("a") < 1200
    path = "/".join(["folder"] * 50)
    assert path in call(raiser(GranaryError(f"no cache {path}"))).stderr


class Stopped(GranaryError):
    exit_code = 143


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (GranaryError("no such layer"), "error: no such layer", 2),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), "error: a.txt: No such file; fix this", 2),
        (OSError("odd"), "error: odd; fix this", 2),
        (Stopped("stopped, continue with x"), "stopped, continue with x", 143),
        (Interrupted(signal.SIGTERM), "interrupted: again", 143),
        (KeyboardInterrupt(), "interrupted: again", 130),
    ],
)
def test_an_expected_failure_is_one_line(error: BaseException, line: str, code: int) -> None:
    result = call(raiser(error))
    assert (result.exit_code, result.stderr.strip(), result.stdout) == (code, line, "")


@pytest.mark.parametrize("error", [GranaryError("x"), OSError("x")])
def test_debug_shows_the_traceback(error: Exception) -> None:
    assert call(raiser(error), "--debug").exception is error


def test_an_error_that_nobody_expects_keeps_its_traceback() -> None:
    assert isinstance(call(lambda: 1 / 0).exception, ZeroDivisionError)


def test_names_are_suggested_in_one_wording() -> None:
    assert nearest("topq", ["topk", "vanilla"]) == ", did you mean 'topk'?"
    assert nearest("layer_1", ["layer_10", "layer_11", "x"], n=2) == ", did you mean 'layer_11' or 'layer_10'?"
    assert nearest("zzz", ["topk"]) == ""


def test_long_messages_become_one_line() -> None:
    assert one_line(ValueError("first\nsecond")) == "first"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 999))) == 304


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "", "meta"])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected auto, cpu, cuda, cuda:N or mps"):
        choose_device(name)


def test_devices_that_are_not_here_are_refused() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") in ("cpu", "cuda")
    with pytest.raises(ConfigError, match=r"device 'cuda:99': PyTorch finds \d+ CUDA devices"):
        choose_device("cuda:99")
    if torch.backends.mps.is_available():
        assert choose_device("mps") == "mps"
    else:
        with pytest.raises(ConfigError, match="PyTorch finds no Apple GPU on this machine; give cpu or auto"):
            choose_device("mps")


def test_the_first_signal_is_read_and_the_second_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        with pytest.raises(Interrupted) as caught:
            signal.raise_signal(signal.SIGINT)
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_at_once_ends_with_defer() -> None:
    with stop_on_signals(at_once=True) as stop, pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGTERM)
    with stop_on_signals(at_once=True) as stop:
        stop.defer()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted) as caught:
            stop.check()
    assert caught.value.exit_code == 130
    StopRequest().check()


@pytest.mark.skipif(os.name == "nt", reason="signals of Windows")
def test_the_second_signal_may_end_the_process() -> None:
    code = (
        "import signal; from sae_granary.common.signals import stop_on_signals\n"
        "with stop_on_signals(second='exit') as stop:\n"
        "    signal.raise_signal(signal.SIGINT)\n    signal.raise_signal(signal.SIGTERM)\n    print('still here')"
    )
    assert run_python(code, code=143).stdout == ""
