"""Which Ray a command uses: what ``RAY_ADDRESS`` means, whether it answers, where a Ray of our own keeps its files."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from pathlib import Path

from detr_ray.config import ConfigError
from detr_ray.credentials import without_credentials

logger = logging.getLogger(__name__)

JOIN_S = 5.0
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client of a gRPC server begins; the server answers at once."""

_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]@]+):(\d{1,5})")
_FIX = "name a running cluster in RAY_ADDRESS (HOST:PORT), or unset it to train on this machine"

_LONGEST_SOCKET = 107 if sys.platform.startswith("linux") else 103
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_SHORT_PLACE = "/tmp"


def cluster_address() -> str | None:
    """The cluster that ``RAY_ADDRESS`` names: ``HOST:PORT`` or ``auto``; None where a Ray of our own is to be started.

    Raises:
        ConfigError: it names something that training cannot join.
    """
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if address in ("", "local"):
        return None
    found = _HOST_AND_PORT.fullmatch(address)
    if address == "auto" or (found is not None and 0 < int(found[2]) < 65536):
        return address
    shown = without_credentials(address)
    if "://" not in address:
        raise ConfigError(f"RAY_ADDRESS: {shown!r} is no address of a Ray cluster; {_FIX}")
    kind = "a Ray client server" if address.startswith("ray://") else "a job server"
    raise ConfigError(
        f"RAY_ADDRESS: {shown!r} would be {kind}, through which training cannot run; submit it with `ray job submit` "
        "(its server goes into RAY_API_SERVER_ADDRESS), or name the cluster itself, on one of its machines: HOST:PORT, "
        "where the port is 6379 by default"
    )


def unreachable_address() -> str | None:
    """Why the cluster that the environment names cannot be joined, found out in seconds; None where it may be.

    Raises:
        ConfigError: see `cluster_address`.
    """
    address = cluster_address()
    if address in (None, "auto"):
        return None
    host, _, port = str(address).rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=JOIN_S) as connection:
            connection.sendall(_HELLO)
            # Ray's own client would wait for minutes.
            answer = b"encrypted" if os.environ.get("RAY_USE_TLS", "0") != "0" else connection.recv(9)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that can be no host's
        return f"no cluster answers at {address} (RAY_ADDRESS): {getattr(error, 'strerror', None) or error}"
    return None if answer else f"what answers at {address} (RAY_ADDRESS) is no Ray cluster"


def unreachable_error(fault: str) -> ConfigError:
    """The error of a cluster that cannot be joined."""
    return ConfigError(f"{fault}; {_FIX}")


def own_temporary_folder() -> str | None:
    """Where a Ray of our own keeps its files, so that its sockets have short enough paths; None for Ray's own choice.

    Raises:
        ConfigError: no place is short enough.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    given = os.environ.get(name) or _SHORT_PLACE
    longest = _LONGEST_SOCKET - len(os.fsencode(_SOCKET))
    if len(os.fsencode(given)) <= longest:
        return None
    if name == "RAY_TMPDIR" or not os.access(_SHORT_PLACE, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{name}: {given} is too long a path for Ray's sockets; set RAY_TMPDIR to a folder of at most {longest} "
            "characters"
        )
    place = str(Path(_SHORT_PLACE, "ray"))
    logger.warning("TMPDIR is too long a path for Ray's sockets: Ray keeps its files in %s", place)
    return place
