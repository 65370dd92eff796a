"""Commands of Granary carried out in this process, and code in a fresh one."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from typer import Typer
from typer.testing import CliRunner, Result

WIDE = {"COLUMNS": "200", "NO_COLOR": "1"}  # no table is cut, no line broken


def invoke(
    app: Typer, *words: object, code: int = 0, stdin: str | None = None, env: Mapping[str, str] | None = None
) -> Result:
    """What a command answers; it must end with this exit code."""
    result = CliRunner().invoke(app, list(map(str, words)), input=stdin, env=env)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def refused(app: Typer, *words: object, stdin: str | None = None) -> str:
    """The one line with which a command refuses."""
    result = invoke(app, *words, code=2, stdin=stdin)
    assert (result.stdout, result.stderr[:7], result.stderr.count("\n")) == ("", "error: ", 1), result.output
    return result.stderr


def run_python(
    source: str, *words: object, code: int = 0, cwd: Path | None = None, env: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds Granary and the kits of its tests; it must end with this exit code."""
    tests = Path(__file__).parent
    env = {**env, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    line = [sys.executable, "-c", source, *map(str, words)]
    done = subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done
