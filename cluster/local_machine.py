"""Addresses, free ports, folders, cores, processes and environment of this machine, for a local cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import psutil

LOCALHOST = "127.0.0.1"

# Variables of another cluster, or of the job that this process belongs to.
_FOREIGN = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_NODE_ID")


def node_address(name: str) -> str:
    """The address of a node: its own loopback address on Linux, otherwise that of all nodes."""
    if not sys.platform.startswith("linux"):
        return LOCALHOST
    return f"127.0.1.{1 if name == 'head' else 1 + int(name.partition('-')[2])}"


def own_environment() -> dict[str, str]:
    """This process's environment. `python` is this interpreter, also in submitted jobs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {key: value for key, value in os.environ.items() if key not in _FOREIGN} | {"PATH": path}


def ray_command(command: str) -> list[str]:
    """A command of Ray's command line, run by this interpreter."""
    return [sys.executable, "-m", "ray.scripts.scripts", command]


def free_ports(count: int) -> list[int]:
    """Different ports that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def is_free(port: int) -> bool:
    """Whether nothing listens on a port of this machine."""
    with socket.socket() as one:
        return one.connect_ex((LOCALHOST, port)) != 0


def is_own_folder(folder: Path) -> bool:
    """Whether a folder is this user's alone, or does not exist yet: in /tmp, other users could have created it."""
    if not os.path.lexists(folder) or not hasattr(os, "getuid"):
        return True
    found = folder.lstat()
    return found.st_uid == os.getuid() and (folder.is_symlink() or not found.st_mode & 0o022)


def runs(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def until(there: Callable[[], bool], seconds: float) -> bool:
    """Waits until a condition is true; returns whether it became true in time."""
    deadline = time.monotonic() + seconds
    while not there():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.25)
    return True


def terminate(leaders: Collection[int]) -> None:
    """Asks processes to end, by id, and waits up to 5 s until they have ended."""
    for leader in leaders:
        with contextlib.suppress(ProcessLookupError):
            os.kill(leader, signal.SIGTERM)
    until(lambda: not any(runs(leader) for leader in leaders), seconds=5)


def kill(processes: Callable[[], list[psutil.Process]]) -> list[psutil.Process]:
    """Kills repeatedly until no process is left, because a process may start others before it is killed.

    Args:
        processes: returns those that run now.

    Returns:
        Those that still run after 20 s.
    """

    def none_left() -> bool:
        left = processes()
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return not left

    return [] if until(none_left, seconds=20) else processes()


def give_cores(process: int, name: str, most_nodes: int) -> None:
    """Restricts a node to its share of the machine's cores. Nodes that all use all cores would slow each other down.

    Args:
        process: id of the process that will start the node's processes.
        name: name of the node; the head, which computes little, may use all cores.
        most_nodes: largest number of nodes besides the head.
    """
    if name == "head" or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // max(1, most_nodes))
    first = (int(name.rpartition("-")[2]) - 1) * share
    os.sched_setaffinity(process, {cores[(first + i) % len(cores)] for i in range(share)})
