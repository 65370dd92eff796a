"""Settings from environment variables: what torchrun tells each process that it starts, and seconds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from sae_granary.common.errors import ConfigError


@dataclass(frozen=True)
class Rank:
    """This process among the `n` of a job; `local` is its number on this machine."""

    index: int
    n: int
    local: int


def rank_of_process(env: Mapping[str, str] | None = None) -> Rank | None:
    """The rank of this process; None where torchrun did not start it. Raises ConfigError for half an environment."""
    env = os.environ if env is None else env
    if "WORLD_SIZE" not in env:
        return None
    n = number(env, "WORLD_SIZE")
    if not env.get("RANK"):
        if n > 1:
            raise not_set(n, "RANK")
        return None
    index = number(env, "RANK")
    if index >= n > 1:
        raise ConfigError(f"RANK={index}: expected 0 to {n - 1} with WORLD_SIZE={n}; start the ranks with torchrun")
    return Rank(index, n, number(env, "LOCAL_RANK", index))


def not_set(n: int, name: str) -> ConfigError:
    """Of n processes, this one lacks a variable of torchrun."""
    return ConfigError(f"WORLD_SIZE={n}, but {name} is not set: start the ranks with torchrun, or unset WORLD_SIZE")


def number(env: Mapping[str, str], name: str, default: int = 0) -> int:
    """A variable that holds a count. Raises ConfigError."""
    text = env.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{name}={text!r}: expected a number; start the ranks with torchrun")
    return int(text)


def seconds(env: Mapping[str, str], name: str, default: float, least: float) -> float:
    """A variable that holds `least` to 86400 seconds. Raises ConfigError."""
    text = env.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not least <= value <= 86400:
        raise ConfigError(f"{name}={text!r}: expected seconds from {least:g} to 86400")
    return value
