"""Starting Ray, or joining the cluster that is there."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator

import ray
from ray.data._internal.stats import get_or_create_stats_actor

from detr_ray.config import ConfigError

_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
}


JOIN_S = 5.0
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client of a gRPC server begins; the server answers at once."""


@contextlib.contextmanager
def ray_session(
    num_workers: int, data_tasks: int, use_gpu: bool | None, worker_resource: str | None = None
) -> Iterator[None]:
    """Uses the Ray that is running, or starts one on this machine and ends it afterwards.

    A cluster is joined where ``RAY_ADDRESS`` names one (``ray job submit`` sets it) or this process already uses one.
    A Ray started here gets enough logical CPUs for the workers and at least one data task each, also where the machine
    has fewer cores: they share them, as threads of one program would.

    Args:
        num_workers: training workers that will be asked for.
        data_tasks: data tasks of one worker that should be able to run at the same time.
        use_gpu: whether workers use GPUs; None when it is not decided yet.
        worker_resource: custom resource that each worker takes one of.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # Ray makes a token by itself where none is given; that it does so is no news for the user.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        # A cluster's dashboard shows runs whose state is kept. It costs an actor, of no use to a Ray of our own.
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
        fault = unreachable_address()
        if fault:
            raise ConfigError(f"{fault}; name a running cluster in RAY_ADDRESS, or unset it to train on this machine")
        ray.init(log_to_driver=_workers_are_heard(), logging_level=logging.WARNING)
        # Ray Data keeps its statistics in an actor that outlives the job, on the node of who asks for it first. On a
        # training node it would keep the autoscaler from ever taking that node away.
        get_or_create_stats_actor()
    else:
        num_cpus = max(os.cpu_count() or 1, num_workers + max(1, min(data_tasks * num_workers, os.cpu_count() or 1)))
        ray.init(
            num_cpus=num_cpus,
            resources={worker_resource: num_workers} if worker_resource else None,
            include_dashboard=False,
            log_to_driver=_workers_are_heard(),
            logging_level=logging.WARNING,
            configure_logging=True,
        )
    try:
        yield
    finally:
        ray.shutdown()


def unreachable_address() -> str | None:
    """Why the cluster that the environment names cannot be joined, found out in seconds; None where it may be."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if ray.is_initialized() or not host or not port.isdigit():
        return None
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=JOIN_S) as connection:
            connection.sendall(_HELLO)
            # Ray's own client would wait for minutes.
            answer = b"encrypted" if os.environ.get("RAY_USE_TLS", "0") != "0" else connection.recv(9)
    except OSError as error:
        return f"no cluster answers at {address} (RAY_ADDRESS): {error.strerror or error}"
    return None if answer else f"what answers at {address} (RAY_ADDRESS) is no Ray cluster"


def _workers_are_heard() -> bool:
    """Whether the output of workers is shown as it comes; progress reaches the user by another way."""
    return os.environ.get("DETR_RAY_WORKER_OUTPUT", "0") == "1"


@ray.remote(num_cpus=1)  # type: ignore[untyped-decorator]
def _warm() -> int:
    import detr_ray.data.loader  # noqa: F401 - the import is the work

    return os.getpid()


def warm_data_workers(count: int) -> list[ray.ObjectRef]:
    """Has worker processes import what data tasks need while the training workers start.

    A fresh process pays seconds of imports before its first batch; tasks of the same job run in the processes that
    these leave behind.
    """
    return [_warm.remote() for _ in range(count)]
