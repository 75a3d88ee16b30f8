"""Settings of a service: address, replicas, batches and limits."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

from detr_ray.config import ConfigError
from detr_ray.prediction.requests import Limits


@dataclass(frozen=True)
class Batching:
    """How images of several requests become one batch.

    Attributes:
        most: largest number of images of a batch; 1 for no batching.
        wait_s: how long the first image waits for others, in seconds.
    """

    most: int = 8
    wait_s: float = 0.01


@dataclass(frozen=True)
class ServiceSettings:
    """Settings of a service.

    Attributes:
        host: address to listen on.
        port: its port.
        replicas: processes with the model.
        max_replicas: largest number of replicas, if many requests wait; the same as ``replicas`` for a fixed number.
        cpus: cores of each replica, and so its torch threads.
        batching: how images become batches.
        limits: limits of a request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    max_replicas: int = 1
    cpus: int = 1
    batching: Batching = field(default_factory=Batching)
    limits: Limits = field(default_factory=Limits)

    @property
    def address(self) -> str:
        """The service's own address."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/"


def refuse_more_cores(settings: ServiceSettings, cores: int) -> None:
    """Checks that a machine has the cores of all replicas. Ray would start them all the same, to share what there is.

    Args:
        settings: how the service runs.
        cores: of the machine.

    Raises:
        ConfigError: it has fewer.
    """
    needed = settings.max_replicas * settings.cpus
    if needed > cores:
        raise ConfigError(
            f"--replicas, --max-replicas, --cpus-per-replica: {settings.max_replicas} x {settings.cpus} cores are more "
            f"than the {cores} of this machine; ask for fewer, or name a cluster in RAY_ADDRESS"
        )


def refuse_taken_port(host: str, port: int) -> None:
    """Checks that a port is free.

    Raises:
        ConfigError: it cannot.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise ConfigError(f"--host, --port: cannot listen on {host}:{port}: {error.strerror or error}") from error
