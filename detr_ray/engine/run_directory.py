"""A run's place in storage: what makes it this run, and whether a command may go on with it.

``STORAGE/NAME/run.json`` says which configuration and data the run was begun with. A command that names an existing run
goes on with it where both agree, and is refused, saying what differs, where they don't. A lock keeps two commands from
writing into one run at the same time; the kernel frees it when its holder dies, however it dies.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import secrets
import socket
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr_ray.config import ConfigError
from detr_ray.engine.checkpoint import CheckpointStore
from detr_ray.locations import check_address, join, local_path, read_bytes, resolve, write_bytes
from detr_ray.retries import reason_of

RECORD = "run.json"

# What may change between two starts of one run: where and how it is computed, never what.
FREE_KEYS = (
    "run.storage",
    "data.root",
    "data.train.",
    "data.val.",
    "data.generate",
    "data.tasks_per_worker",
    "data.prefetch_batches",
    "data.follow_links",
    "data.on_bad_image",
    "data.max_bad_images",
    "model.init_from",
    "model.backbone_weights",
    "train.micro_batch_size",
    "train.num_workers",
    "train.use_gpu",
    "train.launcher",
    "train.checkpoint_every_steps",
    "train.keep_last",
    "train.max_failures",
    "train.log_every_steps",
    "train.compile",
    "train.channels_last",
    "train.on_nonfinite",
    "train.max_nonfinite_steps",
    "train.worker_resource",
    "train.stall_timeout_s",
    "train.start_timeout_s",
    "train.resize_check_s",
    "train.record_stream",
    "train.max_steps",
    "eval.",
    "tracking.",
)


@dataclass(frozen=True)
class RunDirectory:
    """An opened run.

    Attributes:
        name: name of the run.
        path: absolute folder or URI.
        run_id: unique for ever, also where a name is used again in another storage.
        is_new: whether this command began the run.
    """

    name: str
    path: str
    run_id: str
    is_new: bool

    @property
    def checkpoints(self) -> CheckpointStore:
        """The run's checkpoints."""
        return CheckpointStore(join(self.path, "checkpoints"))

    @property
    def local_path(self) -> Path | None:
        """The folder, where it is on a local disk."""
        return local_path(self.path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run for this process.

        Raises:
            ConfigError: another process on this file system holds it.
        """
        if self.local_path is None:
            # Object stores have no lock that dies with its holder; a run there is not protected.
            yield
            return
        with (self.local_path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise ConfigError(
                    f"run.name: {self.name!r} in {self.path} is being written by {holder}; wait for it, stop it, or "
                    "choose another run.name"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield


def absolute_storage(storage: str) -> str:
    """A storage folder as an absolute path; one that is not on this machine as a URI.

    Raises:
        LocationError: a URI that holds credentials.
    """
    check_address(storage)
    return resolve(storage)


def unique_name(prefix: str) -> str:
    """A name that no run has: the time, and four random characters."""
    return f"{prefix}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def open_run(
    name: str | None, storage: str, flat_config: Mapping[str, Any], fingerprints: Mapping[str, str], config_yaml: str
) -> RunDirectory:
    """Opens a run to train in: a new one, or an existing one that the configuration and the data agree with.

    Args:
        name: ``run.name``; None for a new, unique name.
        storage: ``run.storage``.
        flat_config: dotted key -> value.
        fingerprints: split -> fingerprint of its data.
        config_yaml: the same configuration as YAML, kept beside the run for people.

    Raises:
        ConfigError: the name is taken by a run of another configuration or other data; the storage cannot be written.
    """
    root = absolute_storage(storage)
    name = name or unique_name("run")
    path = join(root, name)
    comparable = json.loads(json.dumps({key: value for key, value in flat_config.items() if key != "run.name"}))
    try:
        stored = _read_record(join(path, RECORD))
        if stored is not None:
            _refuse_differences(name, path, stored, comparable, fingerprints)
            return RunDirectory(name, path, stored["run_id"], is_new=False)
        run_id = uuid.uuid4().hex
        content = {
            "run_id": run_id,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "fingerprints": dict(fingerprints),
            "config": comparable,
        }
        # The record comes last: without it, there is no run.
        write_bytes(join(path, "config.yaml"), config_yaml.encode())
        write_bytes(join(path, RECORD), json.dumps(content, indent=1).encode())
    except OSError as error:
        raise ConfigError(f"run.storage: {path} cannot be used: {reason_of(error)}") from error
    return RunDirectory(name, path, run_id, is_new=True)


def find_run(name: str, storage: str) -> RunDirectory:
    """A run that is there, to look at.

    Raises:
        ConfigError: there is none of this name, or the storage cannot be read.
    """
    path = join(absolute_storage(storage), name)
    try:
        stored = _read_record(join(path, RECORD))
    except OSError as error:
        raise ConfigError(f"run.storage: {path} cannot be read: {reason_of(error)}") from error
    if stored is None:
        raise ConfigError(f"run.name: there is no run {name!r} in {absolute_storage(storage)}")
    return RunDirectory(name, path, stored["run_id"], is_new=False)


def _read_record(location: str) -> dict[str, Any] | None:
    """What a run was begun with; None where there is no run."""
    try:
        return json.loads(read_bytes(location))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"run.name: {location} is damaged ({error}); choose another run.name") from error


def _refuse_differences(
    name: str, path: str, stored: Mapping[str, Any], config: Mapping[str, Any], fingerprints: Mapping[str, str]
) -> None:
    begun = stored["config"]
    differences = [
        f"{key}: begun with {begun.get(key)!r}, now {config.get(key)!r}"
        for key in sorted(begun.keys() | config.keys())
        if begun.get(key) != config.get(key) and not key.startswith(FREE_KEYS)
    ]
    differences += [
        f"the {split} data: other annotations than the run was begun with"
        for split, fingerprint in fingerprints.items()
        if split == "train" and stored["fingerprints"].get(split) != fingerprint
    ]
    if differences:
        raise ConfigError(
            f"run.name: a run {name!r} exists in {path} and was begun differently; choose another run.name (and "
            "model.init_from to start from its weights), or give the same values:\n  " + "\n  ".join(differences)
        )
