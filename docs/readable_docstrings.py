"""An extension of griffe, which reads docstrings for the pages of the Python API.

Examples (`>>>`) become code blocks. A field without a docstring is described by `help=` or its comment.
"""

from __future__ import annotations

import ast
import re
import textwrap
from typing import Any

from griffe import Docstring, Extension, Object

EXAMPLE = re.compile(r"^>>> .*?(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"  # (?!type: |noqa)(.+)$")


class Readable(Extension):
    """See the module's docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite or add the docstring of an object that was read."""
        if obj.docstring is None and obj.is_attribute and obj.parent is not None and obj.parent.is_class:
            if words := help_of(obj.source) or comment_of(obj.source):
                obj.docstring = Docstring(words[0].upper() + words[1:], parent=obj)
        elif obj.docstring is not None and ">>> " in obj.docstring.value and "```" not in obj.docstring.value:
            obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)


def help_of(source: str) -> str:
    """The constant `help=` of a declared field: `k: int = option(32, help="...")`."""
    try:
        [statement] = ast.parse(textwrap.dedent(source)).body
    except (SyntaxError, ValueError):
        return ""
    value = getattr(statement, "value", None)
    keywords = value.keywords if isinstance(value, ast.Call) else []
    found = [word.value.value for word in keywords if word.arg == "help" and isinstance(word.value, ast.Constant)]
    return str(found[0]) if found else ""


def comment_of(source: str) -> str:
    """The comment behind a field: `x_hat: Tensor  # (N, D_out) reconstruction`."""
    found = COMMENT.search(source)
    return found[1] if found else ""
