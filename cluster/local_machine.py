"""What a local cluster needs to know of this machine: addresses, free ports, cores, processes, the environment."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

LOCALHOST = "127.0.0.1"

# Of another cluster, or of a job in which this runs.
_FOREIGN = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_NODE_ID")


def node_address(name: str) -> str:
    """A node's own address, as on a real cluster, where this machine has more than one for itself."""
    if not sys.platform.startswith("linux"):
        return LOCALHOST
    return f"127.0.1.{1 if name == 'head' else 1 + int(name.partition('-')[2])}"


def own_environment() -> dict[str, str]:
    """This process's environment, in which `python` is this one, so that it is also that of submitted jobs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {key: value for key, value in os.environ.items() if key not in _FOREIGN} | {"PATH": path}


def ray_command(command: str) -> list[str]:
    """Ray's command line of this Python, whatever the PATH holds."""
    return [sys.executable, "-m", "ray.scripts.scripts", command]


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def is_free(port: int) -> bool:
    """Whether nothing listens on a port of this machine."""
    with socket.socket() as one:
        return one.connect_ex((LOCALHOST, port)) != 0


def runs(pid: int) -> bool:
    """Whether a process is there and at work."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def until(there: Callable[[], bool], seconds: float) -> bool:
    """Waits until something is there; whether it came in time."""
    deadline = time.monotonic() + seconds
    while not there():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.25)
    return True


def give_cores(process: int, name: str, most_nodes: int) -> None:
    """Gives a node, whose processes are yet to be started by this one, its share of the machine's cores.

    As machines of their own would have: two nodes that both think they have all cores take turns in vain.

    Args:
        process: what starts the node.
        name: of the node; the head, where little is computed, may use all.
        most_nodes: nodes beside the head that there may be.
    """
    if name == "head" or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // max(1, most_nodes))
    first = (int(name.rpartition("-")[2]) - 1) * share
    os.sched_setaffinity(process, {cores[(first + i) % len(cores)] for i in range(share)})
