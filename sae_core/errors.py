"""What sae_core raises.

SAEError(GranaryError)
├── OptionError(SAEError, ValueError)       an option of a variant is out of range or unknown
├── UnknownTypeError(SAEError, KeyError)    no variant of that name is registered
├── NotAnSAEError(SAEError, ValueError)     a folder does not hold an SAE that can be read
└── NonFiniteError(SAEError, ValueError)    rows or weights hold NaN, Inf, or numbers that nothing can be fitted to
"""

from sae_granary.common.errors import GranaryError


class SAEError(GranaryError):
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
    """Rows or weights hold NaN, Inf, or numbers that nothing can be fitted to."""
