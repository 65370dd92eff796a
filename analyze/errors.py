"""What analyze raises.

AnalyzeError(GranaryError)
├── MismatchError(AnalyzeError, ValueError)      SAE, cache and codes do not belong together
├── DamagedCodesError(AnalyzeError, ValueError)  a folder holds no codes that can be read
├── CacheGoneError(AnalyzeError, ConfigError)    the cache of a run is not where it was
└── DownstreamError(AnalyzeError)                an SAE cannot be measured through the model of its cache
"""

from __future__ import annotations

from sae_granary.common.errors import ConfigError, GranaryError


class AnalyzeError(GranaryError):
    """Base of every error that analyze raises on purpose."""


class MismatchError(AnalyzeError, ValueError):
    """An SAE, a cache and codes that do not belong together."""


class DamagedCodesError(AnalyzeError, ValueError):
    """A folder holds no codes, or codes that are unfinished, truncated or altered."""


class CacheGoneError(AnalyzeError, ConfigError):
    """The cache of a run is not where it was."""


class DownstreamError(AnalyzeError):
    """The model of a cache cannot be loaded, or an SAE cannot replace its activations."""
