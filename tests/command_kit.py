"""Commands of Granary carried out in this process."""

from typer import Typer
from typer.testing import CliRunner, Result


def invoke(app: Typer, *words: object, code: int = 0, stdin: str | None = None) -> Result:
    """What a command answers; it must end with this exit code."""
    result = CliRunner().invoke(app, list(map(str, words)), input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def refused(app: Typer, *words: object, stdin: str | None = None) -> str:
    """The one line with which a command refuses."""
    result = invoke(app, *words, code=2, stdin=stdin)
    assert (result.stdout, result.stderr.count("\n")) == ("", 1), result.output
    return result.stderr
