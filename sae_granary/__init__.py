"""Harvest a transformer's activations once, train every sparse autoencoder from them, look at what was learned."""

from __future__ import annotations

from typing import Any

__all__ = ["open_cache"]


def __getattr__(name: str) -> Any:
    if name == "open_cache":
        from sae_granary.cache.read.reader import open_cache

        return open_cache
    raise AttributeError(f"module 'sae_granary' has no attribute {name!r}")
