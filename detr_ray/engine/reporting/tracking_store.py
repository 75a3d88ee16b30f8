"""The MLflow store of a run's records: its address, the local folder for unsent records, and whether it works."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from detr_ray.addresses import local_path
from detr_ray.callbacks import Say
from detr_ray.config import Config, ConfigError
from detr_ray.engine.checkpoints.run_directory import RunDirectory, absolute_storage
from detr_ray.tracking.reachability import UnreachableError, UnusableError, try_store
from detr_ray.tracking.store import STORE_VARIABLE, tracking_uri

TRY_STORE_S = 3.0
"""How long a tracking server may take to answer before training starts without it."""


def local_storage(config: Config) -> Path:
    """A local folder for what cannot be in a bucket: ``run.storage`` if it is local, otherwise a folder of the user.

    Raises:
        ConfigError: other users can write to this folder.
    """
    folder = local_path(absolute_storage(config.run.storage))
    if folder is not None:
        return folder
    user = str(os.getuid()) if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    folder = Path(tempfile.gettempdir()) / f"detr_ray-records-{user}"
    _refuse_others(folder)
    return folder


def _refuse_others(folder: Path) -> None:
    """Refuses a folder that other users can write to: in the temporary folder, any user may have created it."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return
    mine = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
    if not stat.S_ISDIR(found.st_mode) or not mine:
        raise ConfigError(
            f"{folder} is a link, or not only this user's: records of runs in buckets cannot be kept there; remove it, "
            "or set TMPDIR to a folder of your own"
        )


def run_tracking_uri(config: Config) -> str:
    """The address of the MLflow store that runs of a configuration go to."""
    return tracking_uri(config.tracking.uri, local_storage(config))


def recorded_in(config: Config, uri: str) -> Config:
    """The configuration with an MLflow store in place of the default one in its own ``run.storage``.

    Args:
        config: the configuration. A store that it or the environment names stays.
        uri: address of the store.
    """
    if config.tracking.uri or _from_environment():
        return config
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})


def tracking_folder(config: Config, run: RunDirectory) -> Path:
    """Folder for records that are not in the store yet: in the run's folder, or on this machine's disk."""
    return (run.local_path or local_storage(config) / f"{run.name}-{run.run_id[:8]}") / "tracking"


def check_tracking(config: Config, say: Say) -> None:
    """Refuses a store that can never record, and warns if one is unreachable; see `try_store`.

    Raises:
        ConfigError: the configured store can never record.
    """
    if not config.tracking.enabled:
        return
    try:
        try_store(run_tracking_uri(config), TRY_STORE_S)
    except UnusableError as error:
        key = "tracking.uri" if config.tracking.uri else STORE_VARIABLE if _from_environment() else "run.storage"
        raise ConfigError(f"{key}: {error}, or train without records: tracking.enabled=false") from error
    except UnreachableError as error:
        say(f"WARNING: {error}; training goes on, and its records are sent once they can be")


def _from_environment() -> bool:
    return bool(os.environ.get(STORE_VARIABLE))
