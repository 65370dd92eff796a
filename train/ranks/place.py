"""Which rank this process is, by the environment that torchrun gives its processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from sae_granary.common.errors import ConfigError

TIMEOUT = "GRANARY_RANK_TIMEOUT"  # seconds
DEFAULT_TIMEOUT = 300.0


@dataclass(frozen=True)
class Place:
    """The rank of this process among n, its number on this host, and where the ranks meet."""

    index: int
    n: int
    local: int
    address: str
    port: int
    timeout: float = DEFAULT_TIMEOUT  # seconds without a sign of life after which a rank counts as gone

    @property
    def leads(self) -> bool:
        """Whether this rank writes the files and the log."""
        return self.index == 0


def place_of_process(env: Mapping[str, str] | None = None) -> Place | None:
    """The place of this process; None where it trains alone. Raises ConfigError for an incomplete environment."""
    env = os.environ if env is None else env
    if "WORLD_SIZE" not in env:
        return None
    n = _number(env, "WORLD_SIZE")
    if n < 2:
        return None
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not env.get(name)]:
        raise ConfigError(
            f"WORLD_SIZE={n}, but {missing[0]} is not set: start the ranks with torchrun, or unset WORLD_SIZE"
        )
    index = _number(env, "RANK")
    if not 0 <= index < n:
        raise ConfigError(f"RANK={index}: expected 0 to {n - 1} with WORLD_SIZE={n}; start the ranks with torchrun")
    local, port = _number(env, "LOCAL_RANK", index), _number(env, "MASTER_PORT")
    if not 1 <= port <= 65535:
        raise ConfigError(f"MASTER_PORT={port}: expected a port, 1 to 65535; start the ranks with torchrun")
    return Place(index, n, local, env["MASTER_ADDR"], port, _timeout(env))


def quiet_torch() -> None:
    """Of a rank that is gone torch prints every frame, unless this is called before torch is imported."""
    if "RANK" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _number(env: Mapping[str, str], name: str, default: int = 0) -> int:
    text = env.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{name}={text!r}: expected a number; start the ranks with torchrun")
    return int(text)


def _timeout(env: Mapping[str, str]) -> float:
    text = env.get(TIMEOUT, str(DEFAULT_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 1 <= seconds <= 86400:
        raise ConfigError(f"{TIMEOUT}={text!r}: expected seconds from 1 to 86400")
    return seconds
