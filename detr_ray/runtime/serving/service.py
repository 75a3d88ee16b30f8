"""Starts a service on the cluster, or on this machine, and ends it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError

from detr_ray.callbacks import Say
from detr_ray.config import ConfigError
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.preflight.writing import within
from detr_ray.prediction import LoadedModel
from detr_ray.retries import reason_of
from detr_ray.runtime.host_process import host_process_as_before
from detr_ray.runtime.serving.replica import Replica
from detr_ray.runtime.serving.settings import ServiceSettings, refuse_taken_port
from detr_ray.runtime.session import ray_session

APPLICATION = "detr_ray"
REQUEST_TIMEOUT_S = 120.0
"""Time limit of an answer in seconds; then the client gets an error."""
START_TIMEOUT_S = 300.0
"""Time limit in seconds for the start of replicas: to get resources of the cluster, and to read the model."""
PROXY_WITHIN_S = 60.0
"""Time limit in seconds for the start of the process that takes HTTP requests. By default, Ray Serve ends it after
three looks of 5 s, and with it the start of the service: too early on a machine whose cores are busy."""
_PROXY_PATIENCE = "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"
_QUEUED_BATCHES = 32
"""Number of batches that may wait for each replica; further requests are refused with status 503."""


@contextmanager
def service(load: Callable[[], LoadedModel], settings: ServiceSettings, say: Say = lambda line: None) -> Iterator[None]:
    """Runs a service as a context; requests are answered from its beginning on.

    Args:
        load: returns the model; called in each replica, on its node.
        settings: how it runs.
        say: shows the user a line.

    Raises:
        ConfigError: the port is taken, or the cluster cannot be joined.
        RunFailed: the replicas cannot be started.
    """
    refuse_taken_port(settings.host, settings.port)
    with host_process_as_before(), ray_session(settings.max_replicas * settings.cpus, 0, None):
        _refuse_other_services()
        gpus = ray.cluster_resources().get("GPU", 0)
        use_gpu = gpus >= settings.max_replicas
        if gpus and not use_gpu:
            say(f"WARNING: {gpus:g} GPUs are fewer than {settings.max_replicas} replicas, which work on CPUs instead")
        http = {"host": settings.host, "port": settings.port, "request_timeout_s": REQUEST_TIMEOUT_S}
        try:
            _start(application(load, settings, use_gpu), http)
            yield
        finally:
            serve.shutdown()


def _refuse_other_services() -> None:
    """Refuses a cluster where Ray Serve runs already, because it would keep its own address and port.

    Raises:
        ConfigError: it runs already.
    """
    found = serve.status()
    if found.proxies or found.applications:
        names = ", ".join(found.applications) or "none"
        raise ConfigError(
            f"Ray Serve runs on this cluster already (applications: {names}): stop it (`serve shutdown`), or start the "
            "model as an application of it: detr_ray.runtime.serving.service.application"
        )


def _start(target: serve.Application, http: dict[str, Any]) -> None:
    """Starts the HTTP proxy and the replicas.

    Raises:
        RunFailed: they cannot be started, or not within `START_TIMEOUT_S`.
    """
    patience = os.environ.get(_PROXY_PATIENCE, f"{PROXY_WITHIN_S:g}")
    try:
        serve.start(http_options=http, controller_options={"runtime_env": {"env_vars": {_PROXY_PATIENCE: patience}}})
    except (TimeoutError, RayActorError) as error:
        raise RunFailed(
            f"Ray Serve's process for HTTP requests did not start within {PROXY_WITHIN_S:g} s: {reason_of(error)}; if "
            "other programs take all cores, give the same command again when they have ended"
        ) from error
    except (RuntimeError, RayError) as error:
        raise RunFailed(f"the service cannot start: {reason_of(error)}") from error
    try:
        within(START_TIMEOUT_S, lambda: serve.run(target, name=APPLICATION, route_prefix="/"))
    except TimeoutError as error:
        found = serve.status().applications.get(APPLICATION)
        reasons = [] if found is None else [one.message for one in found.deployments.values()]
        raise RunFailed(f"the service did not start within {START_TIMEOUT_S:.0f} s: {' '.join(reasons)}") from error
    except (RuntimeError, RayError) as error:
        raise RunFailed(f"the service cannot start: {reason_of(error)}") from error


def application(load: Callable[[], LoadedModel], settings: ServiceSettings, use_gpu: bool) -> serve.Application:
    """The service as an application of Ray Serve, to be run beside others.

    Args:
        load: returns the model; called in each replica.
        settings: how it runs; address and port are those of Ray Serve.
        use_gpu: whether each replica takes a GPU; otherwise they work on CPUs.
    """
    most = settings.batching.most
    is_fixed = settings.replicas == settings.max_replicas
    scaling = {
        "min_replicas": settings.replicas,
        "max_replicas": settings.max_replicas,
        "target_ongoing_requests": most,
    }
    deployment = serve.deployment(
        Replica,
        name="detector",
        num_replicas=settings.replicas if is_fixed else None,
        autoscaling_config=None if is_fixed else scaling,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": 1 if use_gpu else 0},
        # One batch in work, and the next one being collected.
        max_ongoing_requests=2 * most,
        max_queued_requests=_QUEUED_BATCHES * most,
    )
    return deployment.bind(load, settings.limits, settings.batching, "cuda" if use_gpu else "cpu")


def run_service(load: Callable[[], LoadedModel], settings: ServiceSettings, say: Say) -> None:
    """Runs a service until this process is told to stop, by Ctrl-C or SIGTERM; see `service`."""
    stopped = threading.Event()

    def stop(*_: object) -> None:
        stopped.set()

    with service(load, settings, say):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)  # `service` restores the handlers
        say(f"serving at {settings.address}; Ctrl-C stops it")
        stopped.wait()
        say("stopping")
