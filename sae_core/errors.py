"""What sae_core raises.

SAEError(Exception)
├── OptionError(SAEError, ValueError)       an option of a variant is out of range or unknown
├── UnknownTypeError(SAEError, KeyError)    no variant of that name is registered
├── NotAnSAEError(SAEError, ValueError)     a folder does not hold an SAE that can be read
└── NonFiniteError(SAEError, ValueError)    rows or weights hold NaN or Inf
"""

import difflib
from collections.abc import Iterable


class SAEError(Exception):
    """Base of every error that sae_core raises on purpose."""


class OptionError(SAEError, ValueError):
    """An option of a variant is out of range or unknown."""


class UnknownTypeError(SAEError, KeyError):
    """No variant of that name is registered."""

    def __str__(self) -> str:
        # KeyError would show the repr of the message.
        return str(self.args[0]) if self.args else ""


class NotAnSAEError(SAEError, ValueError):
    """A folder does not hold an SAE that can be read."""


class NonFiniteError(SAEError, ValueError):
    """Rows or weights hold NaN or Inf."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean 'x'?' for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
