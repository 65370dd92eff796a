"""Two hosts on one machine: a network, host name and process namespace for each, and a cable between them."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from fork_kit import LIMIT, Forked, Forks, wait_until

_NEW_MOUNTS, _NEW_NAME, _NEW_PIDS, _NEW_NET = 0x20000, 0x4000000, 0x20000000, 0x40000000  # linux/sched.h
_PRIVATE, _RECURSIVE, _END_WITH_PARENT = 1 << 18, 1 << 14, 1  # linux/mount.h, linux/prctl.h
_NEEDS_ROOT, _CANNOT = "needs root", "needs namespaces and ip (iproute2)"


class Host:
    """A host with the address 10.77.0.<number>."""

    def __init__(self, forks: Forks, number: int) -> None:
        self._forks, self.name, self.address = forks, f"host-{number}", f"10.77.0.{number}"
        self.cable = f"cable{number}"
        self._net = forks.start(_hold_network)

    @property
    def pid(self) -> int:
        """The process that holds its network."""
        return self._net.pid

    def network_is_up(self) -> bool:
        """Whether the host has a network of its own."""
        return os.readlink(f"/proc/{self.pid}/ns/net") != os.readlink("/proc/self/ns/net")

    def ip(self, *args: str) -> None:
        """Run `ip` on this host."""
        _call("nsenter", "-t", str(self.pid), "-n", "ip", *args)

    def start(self, function: Callable[..., Any], *args: Any, **env: str) -> Forked:
        """Call a function in a process of this host, which ends with all that it has started."""
        return self._forks.start(_on_host, self.pid, self.name, function, args, **env)

    def torchrun(self, restarts: int, function: Callable[..., Any], *args: Any, **env: str) -> Forked:
        """Start this host's agent of torchrun, which calls a function in a worker.

        Where the agents share the store of the rendezvous (torch 2.13), one that stays does not publish its address to
        one that starts again.
        """
        env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **env}
        return self.start(torchrun, self.address, restarts, function, *args, **env)

    def kill(self, process: Forked) -> None:
        """Kill what `start` has started and all below it, at once: a worker whose agent dies first has time to stop."""
        try:
            space = os.readlink(f"/proc/{process.pid}/ns/pid_for_children")
        except OSError:  # it has ended
            return
        for pid in sorted((int(name) for name in os.listdir("/proc") if name.isdigit()), reverse=True):
            with suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/pid") == space:
                    os.kill(pid, signal.SIGKILL)
        process.end()

    def unplug(self) -> None:
        """Take its end of the cable down."""
        self.ip("link", "set", self.cable, "down")

    def plug(self) -> None:
        """Put its end of the cable up."""
        self.ip("link", "set", self.cable, "up")


@pytest.fixture
def two_hosts(forks: Forks) -> tuple[Host, Host]:
    """Two hosts that reach each other."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip(_NEEDS_ROOT)
    try:
        _call("unshare", "--net", "--uts", "--pid", "--mount", "--fork", "true")
        _call("ip", "link", "show")
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"{_CANNOT}: {error}")
    a, b = Host(forks, 1), Host(forks, 2)
    wait_until(lambda: a.network_is_up() and b.network_is_up())
    _call(
        "ip", "link", "add", a.cable, "netns", str(a.pid), "type", "veth", "peer", "name", b.cable, "netns", str(b.pid)
    )
    for host in (a, b):
        host.ip("address", "add", f"{host.address}/24", "dev", host.cable)
        host.ip("link", "set", "lo", "up")
        host.plug()
    return a, b


def torchrun(address: str, restarts: int, function: Callable[..., Any], *args: Any) -> None:
    """Call a function in a worker of this host's agent, as `torchrun --nnodes 2 --max-restarts N` does.

    The agents meet at the first host. The worker is a fork of the agent: torchrun's own would import torch again.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=2,
        max_nodes=2,
        nproc_per_node=1,
        run_id="two-hosts",
        rdzv_backend="c10d",
        rdzv_endpoint="10.77.0.1:29400",
        rdzv_configs={"join_timeout": int(LIMIT), "keep_alive_interval": 4, "is_host": address == "10.77.0.1"},
        max_restarts=restarts,
        start_method="fork",
        local_addr=address,
    )
    elastic_launch(config, function)(*args)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


def _hold_network() -> None:
    _libc("unshare", _NEW_NET)
    while True:
        time.sleep(3600)


def _on_host(net: int, name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """In a fork: be the first process of a host, which the kernel ends with all others of it."""
    with open(f"/proc/{net}/ns/net") as file:
        _libc("setns", file.fileno(), _NEW_NET)
    _libc("unshare", _NEW_MOUNTS | _NEW_NAME | _NEW_PIDS)
    socket.sethostname(name)
    if pid := os.fork():
        signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
        os._exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), -1) % 256)
    code = 1
    try:
        _libc("prctl", _END_WITH_PARENT, signal.SIGKILL)
        _libc("mount", None, b"/", None, _PRIVATE | _RECURSIVE, None)
        _libc("mount", b"proc", b"/proc", b"proc", 0, None)
        function(*args)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _libc(name: str, *args: Any) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
