"""Which rank this process is, by the environment that torchrun gives its processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from sae_granary.common.errors import ConfigError
from sae_granary.common.settings.environment import not_set, number, rank_of_process, seconds

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
    rank = rank_of_process(env)
    if rank is None or rank.n < 2:
        return None
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]:
        raise not_set(rank.n, missing[0])
    port = number(env, "MASTER_PORT")
    if not 1 <= port <= 65535:
        raise ConfigError(f"MASTER_PORT={port}: expected a port, 1 to 65535; start the ranks with torchrun")
    timeout = seconds(env, TIMEOUT, DEFAULT_TIMEOUT, least=1)
    return Place(rank.index, rank.n, rank.local, env["MASTER_ADDR"], port, timeout)


def quiet_torch() -> None:
    """Of a rank that is gone torch prints every frame, unless this is called before torch is imported."""
    if "RANK" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
