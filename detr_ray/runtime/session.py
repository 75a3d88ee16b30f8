"""The Ray that a command uses: the cluster named by ``RAY_ADDRESS``, a running Ray, or a new one on this machine."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import ray

from detr_ray.addresses import local_path
from detr_ray.config import Config, ConfigError
from detr_ray.engine.hooks import Budget
from detr_ray.runtime.cluster_address import HOW_TO_NAME_IT, cluster_address
from detr_ray.runtime.host_process import host_process_as_before
from detr_ray.runtime.ray_internals import runs_inside_ray

logger = logging.getLogger(__name__)


class RayNotStarted(RuntimeError):  # noqa: N818 - it names what happened
    """Ray's processes did not start on this machine; the same command may start them when the machine is less busy."""


TRAIN_ENVIRONMENT = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2"}
"""How often Ray Train's controller checks its workers, and whether nodes end. Set for the controller and the workers,
unless the user's environment has other values; this process's environment does not change."""

# For all processes of a Ray that is started here. Ray reuses a process for a task only if its environment is the same.
# So the variables that Ray Train sets for controller and workers are set for all processes, and data tasks can use the
# warmed ones. The watcher for drained nodes is of no use on one machine.
_OWN_MARK = "DETR_RAY_OWN_RAY"
_OWN_ENVIRONMENT = {
    _OWN_MARK: "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}
_OWN_DEFAULTS = TRAIN_ENVIRONMENT | {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}

# By default, Ray ends a process after an idle second, and starts a new one, with seconds of imports, for the next data
# task. Processes that Ray starts in advance do not have the environment above.
_OWN_SETTINGS = {"idle_worker_killing_time_threshold_ms": 24 * 3600 * 1000, "prestart_worker_first_driver": False}


def is_own_ray() -> bool:
    """Whether the present Ray was started by this process, only for its own work.

    A Ray that was running before, for example in an actor or a notebook, is shared with others and stays after this
    job.
    """
    environment = ray.get_runtime_context().runtime_env.get("env_vars") or {}
    return _OWN_MARK in environment and not runs_inside_ray()


def session_of(config: Config, budget: Budget = Budget()) -> contextlib.AbstractContextManager[None]:  # noqa: B008
    """The Ray session for a job with this configuration and budget; see `ray_session`."""
    _, most = budget.worker_range or config.train.worker_range or (1, 1)
    return ray_session(most, config.data.tasks_per_worker, config.train.use_gpu, config.train.worker_resource)


@contextlib.contextmanager
def session_while_importing(config: Config, module: str) -> Iterator[None]:
    """Starts a Ray on this machine while a thread imports what is needed next.

    Both take seconds: starting Ray mostly waits, importing computes. A cluster is not joined here: it might request
    nodes, and the data may turn out to be bad.

    Args:
        config: of the job.
        module: what to import; must not import Ray, which this thread imports at the same time.
    """
    elsewhere = config.train.launcher == "local" or ray.is_initialized() or cluster_address() is not None
    if elsewhere or _lacks_data(config):  # a wrong path is then reported without waiting for Ray
        yield
        return
    # Ray is not started in the other thread, because its processes would end with that thread.
    threading.Thread(target=importlib.import_module, args=(module,), name="imports", daemon=True).start()
    with session_of(config):
        yield


def _lacks_data(config: Config) -> bool:
    """Whether some of the configured data obviously does not exist."""
    data = config.data
    places = [
        place
        for split in (data.train, data.val, *data.sources)
        if split
        for place in (split.annotations, split.images, split.shards)
    ]
    places += [source.root for source in data.sources]
    if data.generate is None:
        places.append(data.root)
    paths = [local_path(place) for place in places if place]
    return any(path is not None and not path.exists() for path in paths)


@contextlib.contextmanager
def ray_session(
    num_workers: int, data_tasks: int, use_gpu: bool | None, worker_resource: str | None = None, cpus: int = 0
) -> Iterator[None]:
    """Uses a running Ray, or starts one on this machine and ends it afterwards.

    A cluster is joined where ``RAY_ADDRESS`` names one (``ray job submit`` sets it) or this process already uses one.
    A Ray started here gets enough logical CPUs for the workers and their data tasks, at least one, also if the machine
    has fewer cores; processes then share cores, like threads of one program.

    Args:
        num_workers: number of training workers that will be requested.
        data_tasks: number of concurrent data tasks of one worker; 0 for none.
        use_gpu: whether workers use GPUs; None when it is not decided yet.
        worker_resource: custom resource that each worker takes one of.
        cpus: the least number of logical CPUs of a Ray that is started here.
    """
    if ray.is_initialized():
        yield
        return
    token_logger = logging.getLogger("ray._private.authentication.authentication_token_setup")
    with host_process_as_before():
        # Ray generates a token if none is given, and logs that; the user need not see it.
        token_logger.setLevel(logging.ERROR)
        address = cluster_address()
        if address is None:
            _start_ray(num_workers, data_tasks, worker_resource, cpus)
        else:
            _join_ray(address)
        try:
            yield
        finally:
            ray.shutdown()


def _join_ray(address: str) -> None:
    """Joins the cluster that the environment names.

    Raises:
        ConfigError: it can't be joined.
    """
    fault = unreachable_address()
    if fault:
        raise unreachable_error(fault)
    try:
        ray.init(address, log_to_driver=_workers_are_heard(), logging_level=logging.WARNING)
    except (ConnectionError, TimeoutError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise unreachable_error(f"no cluster can be joined at {address} (RAY_ADDRESS): {reason}") from error


def _start_ray(num_workers: int, data_tasks: int, worker_resource: str | None, cpus: int) -> None:
    """Starts a Ray on this machine, and lets processes for data tasks import what they need.

    Raises:
        ConfigError: there is no folder for its files.
        RayNotStarted: its processes do not start.
    """
    cores = os.cpu_count() or 1
    defaults = {name: os.environ.get(name, default) for name, default in _OWN_DEFAULTS.items()}
    tasks_at_once = min(data_tasks * num_workers, cores)
    folder = own_temporary_folder()
    try:
        ray.init(
            "local",  # not one that was started on this machine for another program
            num_cpus=max(cores, num_workers + tasks_at_once, cpus),
            resources={worker_resource: num_workers} if worker_resource else None,
            include_dashboard=False,
            log_to_driver=_workers_are_heard(),
            logging_level=logging.WARNING,
            configure_logging=True,
            runtime_env={"env_vars": _OWN_ENVIRONMENT | defaults},
            # Ray warns about many processes for each core; the trials of a search have them.
            _system_config=_OWN_SETTINGS | ({"worker_maximum_startup_concurrency": max(cores, cpus)} if cpus else {}),
            _temp_dir=folder,
        )
    except Exception as error:  # when it has waited too long for its processes, Ray raises no narrower class
        raise RayNotStarted(
            f"Ray did not start on this machine: {error}. The load is {os.getloadavg()[0]:.1f} on {cores} cores; if "
            "other programs take all of it, give the same command again when they have ended. Else see what Ray wrote "
            f"into {folder or 'its folder for temporary files'} (session_latest/logs)"
        ) from error
    warm_data_workers(min(tasks_at_once, MOST_WARMED))


def _workers_are_heard() -> bool:
    """Whether the output of workers is shown; progress is sent to the user in another way."""
    return os.environ.get("DETR_RAY_WORKER_OUTPUT", "0") == "1"


MOST_WARMED = 8


@ray.remote(num_cpus=1)  # type: ignore[untyped-decorator]
def _warm() -> int:
    import torchvision.io  # noqa: F401 - the imports are the work

    import detr_ray.runtime.datasets  # noqa: F401

    return os.getpid()


def warm_data_workers(count: int) -> list[ray.ObjectRef]:
    """Lets worker processes of a Ray on this machine import what data tasks need, while the training workers start.

    A new process needs seconds of imports before its first batch; data tasks run in the processes prepared here.
    """
    # Set explicitly, although it is the job's environment: Ray compares environments as text, and writes a merged one
    # differently. The training workers, which start the data tasks, have a merged one.
    environment = {"env_vars": _OWN_ENVIRONMENT}
    return [_warm.options(runtime_env=environment).remote() for _ in range(count)]


JOIN_S = 5.0
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""The first bytes of a gRPC client; a server answers them at once."""


_LONGEST_SOCKET = 107 if sys.platform.startswith("linux") else 103
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_SHORT_PLACE = "/tmp"


def unreachable_address() -> str | None:
    """Why the cluster named by the environment cannot be joined, found out within seconds; None if it seems reachable.

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
    except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
        return f"no cluster answers at {address} (RAY_ADDRESS): {getattr(error, 'strerror', None) or error}"
    return None if answer else f"what answers at {address} (RAY_ADDRESS) is no Ray cluster"


def unreachable_error(fault: str) -> ConfigError:
    """The error of a cluster that cannot be joined."""
    return ConfigError(f"{fault}; {HOW_TO_NAME_IT}")


def own_temporary_folder() -> str | None:
    """The folder for files of a Ray that is started here, short enough for its sockets; None for Ray's own choice.

    Raises:
        ConfigError: no folder has a path that is short enough.
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
