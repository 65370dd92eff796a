"""Errors about models.

GranaryError
└── ModelError             a model that is not found, or cannot be used
    ├── HookError          a layer or module that the model does not have (also a LookupError)
    ├── MemoryLimitError   a single context or text does not fit the device's memory
    └── SpliceError        the model of a cache is missing, different, or has no head (also a ValueError)

Invalid settings raise `ConfigError` of `sae_granary.common.errors`.
"""

from sae_granary.common.errors import GranaryError

# What transformers, tokenizers, safetensors and torch raise for files that are missing, damaged or of another kind: all
# sorts, of which some have no other base. Caught around their calls only.
LOAD_ERRORS = (Exception,)


class ModelError(GranaryError):
    """A model that is not found or cannot be used."""


class HookError(ModelError, LookupError):
    """A layer or module that the model does not have."""


class MemoryLimitError(ModelError):
    """A single context or text does not fit the device's memory."""


class SpliceError(ModelError, ValueError):
    """The language model of a cache is missing, is not the harvested one, or no SAE can be spliced into it."""
