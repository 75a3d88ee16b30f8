"""The folder of a search, and its record: space, base configuration and fingerprints of the data."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from detr_ray.addresses import join, local_path
from detr_ray.callbacks import Say
from detr_ray.config import Config, ConfigError, flatten
from detr_ray.engine.checkpoints.run_directory import (
    RECORD,
    absolute_storage,
    begun_with,
    is_covered,
    record_at,
    storage_errors,
    unique_name,
)
from detr_ray.engine.checkpoints.run_lock import held
from detr_ray.locations import make_folder, read_bytes, write_bytes
from detr_ray.retries import NoSuchObject
from detr_ray.search.trials import Trial, read_trials

SEARCH_RECORD = "search.json"
_POPULATION = "population.json"

# Keys that may change when a search is resumed: they change its length and speed, not the search itself.
FREE_SETTINGS = ("tune.name", "tune.trials", "tune.max_concurrent", "tune.time_budget_s", "tune.max_trial_failures")
FREE_KEYS = ("run.name", "tracking.", "data.tasks_per_worker", "data.prefetch_batches", "train.max_failures")


@dataclass(frozen=True)
class SearchDirectory:
    """An opened search.

    Attributes:
        name: of the search.
        path: absolute folder or URI.
        search_id: globally unique.
        trials: trials of an earlier process; they are read when the search is locked.
        population: state of the population from an earlier process, likewise; None if there was none.
        record: of a new search, what `locked` writes first; None for one that exists.
    """

    name: str
    path: str
    search_id: str
    trials: tuple[Trial, ...] = ()
    population: Mapping[str, Any] | None = None
    record: Mapping[str, Any] | None = field(default=None, compare=False)

    @property
    def is_new(self) -> bool:
        """Whether nothing is written of it yet."""
        return self.record is not None

    @contextlib.contextmanager
    def locked(self, say: Say) -> Iterator[SearchDirectory]:
        """Locks the search for this process, and makes the folder of a new one.

        Yields:
            The search with the trials and the population that earlier processes left.

        Raises:
            ConfigError: another process has locked or just begun it, a file of it is damaged, or the storage cannot be
                used.
        """
        if self.is_new:
            with storage_errors(self.path):
                make_folder(self.path)
        with locked_search(self.path, self.name, say):
            with storage_errors(self.path):
                if self.is_new:
                    self._begin()
                    now = self
                else:  # not before: the process that has held the lock until now may have written them last
                    now = dataclasses.replace(self, trials=_trials(self.path), population=_read(self.path, _POPULATION))
            yield now

    def _begin(self) -> None:
        if _read(self.path, SEARCH_RECORD) is not None:
            raise _taken(self.name, self.path)
        _refuse_a_training(self.path)
        if local_path(self.path) is not None:
            make_folder(join(self.path, "logs"))
        self.write(SEARCH_RECORD, json.dumps(self.record, indent=1))

    def write_population(self, state: Mapping[str, Any]) -> None:
        """Writes the state of the population, atomically."""
        self.write(_POPULATION, json.dumps(state, indent=1))

    def write(self, name: str, text: str) -> str:
        """Writes a file of the search; gives its location."""
        return self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, content: bytes) -> str:
        """Writes a file of the search; gives its location."""
        write_bytes(join(self.path, name), content)
        return join(self.path, name)


def open_search(config: Config, fingerprints: Mapping[str, str], *, resume: bool) -> SearchDirectory:
    """Opens a new search, of which nothing is written yet, or an existing one to resume it.

    Args:
        config: of the search.
        fingerprints: split -> fingerprint of the data; empty where settings of the data are searched.
        resume: whether to resume an existing one.

    Raises:
        ConfigError: the name is taken, or there is no such search; an existing one searches something else; the storage
            cannot be used.
    """
    if resume and config.tune.name is None:
        raise ConfigError("tune.name: --resume needs the name of the search to go on with")
    name = config.tune.name or unique_name("search")
    path = join(absolute_storage(config.run.storage), name)
    content = {"config": json.loads(json.dumps(flatten(config))), "fingerprints": dict(fingerprints)}
    with storage_errors(path):
        stored = _read(path, SEARCH_RECORD)
        if stored is None:
            _refuse_a_training(path)
            if resume:
                raise ConfigError(f"tune.name: there is no search {name!r} in {config.run.storage}")
            search_id = uuid.uuid4().hex
            created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            return SearchDirectory(
                name, path, search_id, record={"search_id": search_id, "created": created, **content}
            )
        if not resume:
            raise _taken(name, path)
        differences = _differences(stored, content)
        if differences:
            raise ConfigError(
                f"tune.name: the search {name!r} in {path} was begun differently; choose another tune.name, or give "
                "the same values:\n  " + "\n  ".join(differences)
            )
        return SearchDirectory(name, path, stored["search_id"])


@contextlib.contextmanager
def locked_search(path: str, name: str, say: Say) -> Iterator[None]:
    """Locks a search for this process.

    Args:
        path: its folder.
        name: its name.
        say: shows the user a line.

    Raises:
        ConfigError: another process has locked it, or the storage cannot be used.
    """
    with contextlib.ExitStack() as stack:
        with storage_errors(path):
            stack.enter_context(held(path, name, say))
        yield


def _trials(path: str) -> tuple[Trial, ...]:
    try:
        return tuple(read_trials(path))
    except ValueError as error:
        raise ConfigError(f"tune.name: {error}") from error


def _refuse_a_training(path: str) -> None:
    if record_at(join(path, RECORD)) is not None:
        raise ConfigError(f"tune.name: {path} is a training run; choose another tune.name")


def _taken(name: str, path: str) -> ConfigError:
    return ConfigError(
        f"tune.name: a search {name!r} exists in {path}; go on with it by --resume, or choose another name"
    )


def _read(path: str, name: str) -> dict[str, Any] | None:
    try:
        content = json.loads(read_bytes(join(path, name)))
    except (FileNotFoundError, NoSuchObject):
        return None
    except ValueError as error:
        raise ConfigError(f"tune.name: {join(path, name)} is damaged ({error}); choose another tune.name") from error
    parts = {"search_id": str, "config": dict, "fingerprints": dict} if name == SEARCH_RECORD else {}
    if not isinstance(content, dict) or not all(isinstance(content.get(key), kind) for key, kind in parts.items()):
        raise ConfigError(f"tune.name: {join(path, name)} is damaged; choose another tune.name")
    return content


def _differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    before = begun_with(stored, now["config"])
    lines = [
        f"{key}: begun with {before.get(key)!r}, now {value!r}"
        for key, value in now["config"].items()
        if before.get(key) != value and not is_covered(key, (*FREE_SETTINGS, *FREE_KEYS))
    ]
    if stored["fingerprints"] != now["fingerprints"]:
        lines.append("the data: other annotations than the search was begun with")
    return lines
