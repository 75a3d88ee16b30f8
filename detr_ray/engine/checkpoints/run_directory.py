"""The folder of a run, and its record: the configuration and data that the run was started with.

The record is ``STORAGE/NAME/run.json``. A command with the name of an existing run resumes the run if configuration and
data agree with the record; otherwise it is refused with a list of the differences. If several commands start a run at
the same time, one writes the record and the others read it. `run_lock` ensures that only one process writes a run.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from detr_ray.addresses import check_address, join, local_path, resolve
from detr_ray.callbacks import Say
from detr_ray.config import Config, ConfigError, ModelConfig, flatten
from detr_ray.config.yaml_format import parse_yaml
from detr_ray.engine.checkpoints.run_lock import claimed, held
from detr_ray.engine.checkpoints.store import CheckpointStore
from detr_ray.locations import make_folder, read_bytes, sync, write_bytes
from detr_ray.retries import reason_of

RECORD = "run.json"
CONFIG = "config.yaml"
"""Name of the file with the configuration of the run's last start, for reports; nothing is decided by it."""

# Keys that may change when a run is resumed: they do not change its results. See `is_covered`.
FREE_KEYS = (
    "run.storage",
    "data.root",
    "data.format",
    "data.train.",
    "data.val.",
    "data.generate.",
    "data.tasks_per_worker",
    "data.prefetch_batches",
    "data.follow_links",
    "data.on_bad_image",
    "data.max_bad_images",
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
    "train.recompute_encoder",
    "train.on_nonfinite",
    "train.max_nonfinite_steps",
    "train.worker_resource",
    "train.stall_timeout_s",
    "train.start_timeout_s",
    "train.resize_check_s",
    "train.record_stream",
    "train.max_steps",
    "train.early_stopping.",
    "eval.",
    "tracking.",
    "tune.",
)

# The source of the first weights, which is not needed any more when there is a checkpoint.
FREE_WITH_CHECKPOINT = ("model.init_from", "model.backbone_weights", "run.fork_from")

# Keys that may differ in a run that begins at a checkpoint of another one, beside those that may change on resume. They
# affect neither the model nor the optimizer's state nor the stream, except for the values in `may_differ_in_fork`.
_FORK_KEYS = ("optim.", "loss.", "train.epochs")


def is_covered(key: str, names: Iterable[str]) -> bool:
    """Whether a key is one of some names; a name that ends in a dot means all keys below it."""
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)


def is_free(key: str, has_checkpoint: bool = True) -> bool:
    """Whether a key of the configuration may change when a run is resumed.

    Args:
        key: dotted name.
        has_checkpoint: whether there is a checkpoint to resume from.
    """
    return is_covered(key, FREE_KEYS + (FREE_WITH_CHECKPOINT if has_checkpoint else ()))


def may_differ_in_fork(key: str, before: Any, now: Any) -> bool:
    """Whether a key that may not change on resume may differ in a run that begins at a checkpoint of another one.

    Args:
        key: dotted name.
        before: value in the other run.
        now: value in the new one.
    """
    if key == "optim.ema_decay":
        return bool(before) == bool(now)  # an average starts with a run, not in its middle
    if key == "optim.lr_backbone":
        return before != 0  # a backbone that was frozen has no moments
    if key == "optim.freeze":
        return before == "[]"
    return is_covered(key, _FORK_KEYS)


@dataclass(frozen=True)
class RunDirectory:
    """An opened run.

    Attributes:
        name: name of the run.
        path: absolute folder or URI.
        run_id: globally unique, also if another storage has a run of the same name.
        is_new: whether this command started the run.
    """

    name: str
    path: str
    run_id: str
    is_new: bool

    @classmethod
    def at(cls, name: str, storage: str, record: Mapping[str, Any]) -> RunDirectory:
        """An existing run, from its record."""
        return cls(name, join(absolute_storage(storage), name), record["run_id"], is_new=False)

    @property
    def checkpoints(self) -> CheckpointStore:
        """The run's checkpoints."""
        return CheckpointStore(join(self.path, "checkpoints"))

    @property
    def local_path(self) -> Path | None:
        """The folder, if it is on a local disk."""
        return local_path(self.path)

    def keep_config(self, config_yaml: str) -> None:
        """Writes the configuration that the run goes on with, in place of that of its start before.

        Of an existing run to be called by its only writer (`locked`): another command may not change what the run is
        said to be.

        Args:
            config_yaml: the whole configuration.

        Raises:
            ConfigError: the storage cannot be written.
        """
        with storage_errors(self.path):
            write_bytes(join(self.path, CONFIG), config_yaml.encode())

    @contextlib.contextmanager
    def locked(self, say: Say = lambda line: None) -> Iterator[Callable[[], bool]]:
        """Locks the run for this process as its only writer; other processes may still read it.

        Args:
            say: shows the user a line while the state of another process is being checked.

        Yields:
            Whether another process has taken the run over since; see `held`.

        Raises:
            ConfigError: another process has locked the run, or the storage cannot be used.
        """
        with contextlib.ExitStack() as stack:
            with storage_errors(self.path):
                is_lost = stack.enter_context(held(self.path, self.name, say))
            yield is_lost


def absolute_storage(storage: str) -> str:
    """A storage folder as an absolute path, or as a URI if it is remote.

    Raises:
        LocationError: the URI contains credentials.
    """
    check_address(storage)
    return resolve(storage)


def unique_name(prefix: str) -> str:
    """A new name: the time, and random characters, enough for hundreds of runs that start in the same second."""
    return f"{prefix}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def read_record(name: str | None, storage: str) -> dict[str, Any] | None:
    """The record of a run; None if there is no such run.

    Raises:
        ConfigError: it is damaged, or the storage cannot be read.
    """
    if name is None:
        return None
    path = join(absolute_storage(storage), name)
    with storage_errors(path):
        return record_at(join(path, RECORD))


def open_run(
    name: str | None,
    storage: str,
    flat_config: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    config_yaml: str,
    label_space: str | None = None,
    forked_from: str | None = None,
    say: Say = lambda line: None,
    record: Mapping[str, Any] | Literal["unread"] | None = "unread",
) -> RunDirectory:
    """Opens a run for training: a new run, or an existing run whose record agrees with configuration and data.

    Args:
        name: ``run.name``; None for a new, unique name.
        storage: ``run.storage``.
        flat_config: dotted key -> value.
        fingerprints: split -> fingerprint of its data.
        config_yaml: the same configuration as YAML; stored with the run for information.
        label_space: see ``data.label_space``.
        forked_from: checkpoint of another run that the run begins at; None for none.
        say: shows the user a line.
        record: the run's record if it was read before (`read_record`): None if there was none.

    Raises:
        ConfigError: the name is taken by a run of another configuration or other data; the storage cannot be written.
    """
    root = absolute_storage(storage)
    name = name or unique_name("run")
    path = join(root, name)
    comparable = json.loads(json.dumps({key: value for key, value in flat_config.items() if key != "run.name"}))
    with storage_errors(path):
        stored = record_at(join(path, RECORD)) if record == "unread" else record
        if stored is None:
            content = {
                "run_id": uuid.uuid4().hex,
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "label_space": label_space,
                "forked_from": forked_from,
                "fingerprints": dict(fingerprints),
                "config": comparable,
            }
            stored = _begin(path, name, content, say)
            if stored is None:
                begun = RunDirectory(name, path, content["run_id"], is_new=True)
                begun.keep_config(config_yaml)
                return begun
        run = RunDirectory.at(name, storage, stored)
        changed = _changed_keys(run, stored, comparable, say)
        differences = _described(changed, stored)
        can_fork = all(may_differ_in_fork(key, *values) for key, values in changed.items())
        if stored["fingerprints"].get("train") != fingerprints.get("train"):
            differences.append("the train data: other annotations than the run was begun with")
            can_fork = False
        if label_space is not None and stored.get("label_space") not in (None, label_space):
            differences.append(f"data.label_space: begun with {stored['label_space']}, now {label_space}")
            can_fork = False
    if differences:
        begin = "model.init_from to start from its weights"
        if can_fork:
            begin = f"run.fork_from={path} to begin it at the last checkpoint of this one, if it has one"
        raise ConfigError(
            f"run.name: a run {name!r} exists in {path} and was begun differently; choose another run.name (and "
            f"{begin}), or give the same values:\n  " + "\n  ".join(differences)
        )
    return run


def find_run(name: str, storage: str) -> RunDirectory:
    """An existing run.

    Raises:
        ConfigError: there is no run of this name, or the storage cannot be read.
    """
    stored = read_record(name, storage)
    if stored is None:
        raise ConfigError(f"run.name: there is no run {name!r} in {absolute_storage(storage)}")
    return RunDirectory.at(name, storage, stored)


def _begin(path: str, name: str, content: Mapping[str, Any], say: Say) -> dict[str, Any] | None:
    """Writes the record of a new run. If another process has just written one, returns that instead."""
    location, data = join(path, RECORD), json.dumps(content, indent=1).encode()
    folder = local_path(path)
    if folder is not None:
        make_folder(path)
        return None if _create(folder / RECORD, data) else record_at(location)
    with claimed(path, name, "beginning", say):
        stored = record_at(location)
        if stored is None:
            write_bytes(location, data)
        return stored


def _create(path: Path, data: bytes) -> bool:
    """Creates a file atomically; False if it exists already."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.write_bytes(data)
    try:
        sync(str(temporary))
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                with path.open("xb") as file:
                    file.write(data)
            except FileExistsError:
                return False
    finally:
        temporary.unlink()
    sync(str(path))
    sync(str(path.parent))
    return True


@contextlib.contextmanager
def storage_errors(path: str, key: str = "run.storage") -> Iterator[None]:
    """Turns storage errors into `ConfigError`, which names the key of the configuration that gives the path."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be used: {reason_of(error)}") from error


def record_at(location: str) -> dict[str, Any] | None:
    """The record of a run; None if there is no run."""
    try:
        record = json.loads(read_bytes(location))
        if not {"run_id", "fingerprints", "config"} <= record.keys():
            raise ValueError("it lacks what a run's record holds")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"run.name: {location} is damaged ({error}); choose another run.name") from error
    return record


def begun_with(record: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Key -> its value when a run was begun. A key that came later had its architecture's default then."""
    architecture = record["config"].get("model.architecture", Config().model.architecture)
    defaults = json.loads(json.dumps(flatten(Config(model=ModelConfig(architecture=architecture)))))
    return {key: record["config"].get(key, defaults.get(key)) for key in keys}


def _has_moved(key: str, before: str, now: str) -> bool:
    """Whether data sets of ``data.sources`` lie elsewhere and no more: fingerprints tell whether they are the same."""
    if key != "data.sources":
        return False
    weights = [[source["weight"] for source in parse_yaml(sources)] for sources in (before, now)]
    return weights[0] == weights[1] != []


def _changed_keys(
    run: RunDirectory, stored: Mapping[str, Any], config: Mapping[str, Any], say: Say
) -> dict[str, tuple[Any, Any]]:
    """Key -> its value before and now, of the keys whose change prevents resuming.

    A key that is newer than the run counts as having had its default. For a key that does not exist any more, only a
    warning is shown.
    """
    begun = stored["config"]
    before = begun_with(stored, config)
    changed = sorted(
        key
        for key, now in config.items()
        if before[key] != now and not is_free(key, has_checkpoint=False) and not _has_moved(key, before[key], now)
    )
    if any(is_free(key) for key in changed) and run.checkpoints.latest() is not None:
        changed = [key for key in changed if not is_free(key)]
    for key in sorted(begun.keys() - config.keys()):
        say(f"WARNING: run {run.name} was begun with {key}={begun[key]!r}, which this version does not know (any more)")
    return {key: (before[key], config[key]) for key in changed}


def _described(changed: Mapping[str, tuple[Any, Any]], stored: Mapping[str, Any]) -> list[str]:
    """A line for each key that differs from the run's record."""
    came_later = " (the default, from before there was this key)"
    return [
        f"{key}: begun with {before!r}{'' if key in stored['config'] else came_later}, now {now!r}"
        for key, (before, now) in changed.items()
    ]
