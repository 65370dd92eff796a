"""What a test needs of the machine is there where CI=true says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.skipif(True, reason="needs Chromium: it draws a page")
def test_marked():
    pass

def test_called():
    pytest.skip("needs root: it makes a device")

def test_other():
    pytest.skip("there is no GPU")
"""


@pytest.mark.parametrize(("ci", "counts"), [("", "3 skipped"), ("true", "1 failed, 1 skipped, 1 error")])
def test_skips_that_need_a_machine_fail_under_ci(tmp_path: Path, ci: str, counts: str) -> None:
    (tmp_path / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").touch()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    env = {**os.environ, "CI": ci, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert counts in done.stdout.splitlines()[-1], done.stdout
    assert ("under CI=true it must run" in done.stdout) == bool(ci)
