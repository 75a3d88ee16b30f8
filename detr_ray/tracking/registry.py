"""The versions of a registered model in an MLflow store: facts about each, and the champion.

A version is found by its number, by an alias (``@champion``) or by MLflow's address (``models:/detr/3``). Facts about
it are its tags in the store; its files are an MLflow model (`logged_model.py`).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from detr_ray.coco_numbers import COCO_METRICS
from detr_ray.printable import shortened
from detr_ray.tracking.mlflow_client import first_line, open_client, set_environment
from detr_ray.tracking.reachability import UnreachableError, UnusableError, try_store
from detr_ray.tracking.store import public_uri, sqlite_path

CHAMPION = "champion"
"""The alias of the version that is in use."""

AP = "val/AP"
MEASURED_ON = "measured_on"
"""Tag: JSON of what the numbers were measured with and on. Only equal ones are compared."""
MEASURED_ANEW = "champion.measured_anew"
"""Tag: JSON list of ``[measured_on, AP]``, for a champion that was measured on the data of later versions."""
DECISION = "champion.decision"
REASON = "champion.reason"
PACKAGE_SHA256 = "package.sha256"
"""Tag: hash of the package's description, which holds the hashes of its other files."""
WEIGHTS_SHA256 = "package.weights_sha256"
CHECKPOINT = "checkpoint"
"""Tag: what was registered."""

BECAME_CHAMPION = "became champion"
ROLLED_BACK = "rolled back"

_HISTORY = "champion.history"
"""Tag of the registered model: JSON list of the versions that were champion, the present one last."""
_LONGEST_HISTORY = 200
_LONGEST_VALUE = 20_000
_MOST_NAMED = 10
"""Most versions, or models, that a message names."""
_MISSING = {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE"}
_ADDRESS = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))")


def model_of(which: str) -> str | None:
    """The name of the model in an address as ``models:/detr/3``; None for a number or an alias."""
    address = _ADDRESS.fullmatch(which)
    return None if address is None else address["name"]


class RegistryError(Exception):
    """A request to the registry failed. The message says what to do."""


class RegistryUnavailable(RegistryError):  # noqa: N818 - the name says what it is
    """The store does not answer, or refuses; the same may succeed later."""


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version of a registered model.

    Attributes:
        name: of the registered model.
        version: its number, from 1.
        aliases: names that point to it.
        created_ms: when it was registered, in milliseconds since 1970.
        run_id: MLflow's id of the run that it came from; None where there is none in this store.
        source: where MLflow keeps its files.
        tags: further facts about it.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    created_ms: int
    run_id: str | None
    source: str
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_champion(self) -> bool:
        """Whether the alias ``champion`` points to it."""
        return CHAMPION in self.aliases

    @property
    def metrics(self) -> dict[str, float]:
        """COCO's twelve numbers when it was registered, without missing ones."""
        return {name: float(self.tags[name]) for name in COCO_METRICS if name in self.tags}

    @property
    def measured_on(self) -> dict[str, Any]:
        """What the numbers were measured with and on; empty if unknown."""
        return json.loads(self.tags.get(MEASURED_ON, "{}"))

    def ap_on(self, measured_on: Mapping[str, Any]) -> float | None:
        """Its AP on given validation data with given settings; None if it was not measured so.

        Args:
            measured_on: data and settings. If it is empty, they are unknown, and the AP is not comparable.
        """
        if not measured_on:
            return None
        if self.measured_on == measured_on:
            return self.metrics.get(AP)
        anew = json.loads(self.tags.get(MEASURED_ANEW, "[]"))
        return next((ap for where, ap in anew if where == measured_on), None)

    def __str__(self) -> str:
        return f"version {self.version} of {self.name}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two versions side by side.

    Attributes:
        first: a version.
        second: the other one.
        metrics: name -> (value of the first, of the second); None where one has none.
        same_data: whether both were measured on the same validation data in the same way.
    """

    first: ModelVersion
    second: ModelVersion
    metrics: Mapping[str, tuple[float | None, float | None]]
    same_data: bool


class ModelRegistry:
    """The versions of one registered model.

    Args:
        uri: address of the MLflow store, as `tracking_uri` gives it.
        name: of the registered model.
        create: whether an SQLite database may be made where there is none.

    Raises:
        RegistryError: there is no such store.
        RegistryUnavailable: it cannot be used now.
    """

    def __init__(self, uri: str, name: str, *, create: bool = False) -> None:
        self.uri, self.name = uri, name
        database = sqlite_path(uri)
        if database is not None and not database.exists() and not create:
            raise RegistryError(
                f"there is no MLflow store in {database}; set MLFLOW_TRACKING_URI or tracking.uri to the one that has "
                f"the model {name!r}"
            )
        try:
            try_store(uri)
        except UnusableError as error:
            raise RegistryError(str(error)) from error
        except UnreachableError as error:
            raise RegistryUnavailable(str(error)) from error
        set_environment()
        with self.calls():
            self.client = open_client(uri)

    @contextlib.contextmanager
    def calls(self) -> Iterator[None]:
        """Turns errors of MLflow and of the network into `RegistryUnavailable`."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:
            raise RegistryUnavailable(f"the registry {public_uri(self.uri)}: {first_line(error)}") from error

    # What there is

    def versions(self) -> list[ModelVersion]:
        """All versions, oldest first; none where there is no such model."""
        from mlflow.exceptions import MlflowException

        with self.calls():
            try:
                aliases = self.client.get_registered_model(self.name).aliases
            except MlflowException as error:
                if error.error_code in _MISSING:
                    return []
                raise
            found: list[Any] = []
            token = None
            while token or not found:
                page = self.client.search_model_versions(f"name='{self.name}'", page_token=token)
                found += page
                token = page.token
                if not page:
                    break
        return sorted((_version(entry, aliases) for entry in found), key=lambda version: version.version)

    def version(self, which: str | int) -> ModelVersion:
        """One version.

        Args:
            which: its number, an alias (``champion`` or ``@champion``), or an address as ``models:/detr/3``.

        Raises:
            RegistryError: there is no such version.
        """
        text = str(which)
        address = _ADDRESS.fullmatch(text)
        if address is not None and address["name"] != self.name:
            raise RegistryError(
                f"{text} is of another model than {self.name!r}; versions of one model are compared and changed"
            )
        if address is not None:
            text = address["version"] or f"@{address['alias']}"
        versions = self.versions()
        alias = text.removeprefix("@")
        found = [each for each in versions if str(each.version) == text or alias in each.aliases]
        if found:
            return found[0]
        raise RegistryError(f"there is no version {text} of {self.name!r}; {self.what_there_is(versions)}")

    def what_there_is(self, versions: Sequence[ModelVersion]) -> str:
        """What to name instead of what is not there: the given versions, or if there are none, models of the store."""
        if versions:
            named = [f"{each.version}" + "".join(f" ({alias})" for alias in each.aliases) for each in versions]
            return f"there {'are' if len(named) > 1 else 'is'} {', '.join(named[-_MOST_NAMED:])}"
        with self.calls():
            models = self.client.search_registered_models(max_results=_MOST_NAMED)
        others = [model.name for model in models if model.name != self.name]
        instead = f"; the store has {', '.join(others)}, which tracking.model_name chooses" if others else ""
        return f"it has no versions (python -m detr_ray.registry register CHECKPOINT makes one){instead}"

    def champion(self) -> ModelVersion | None:
        """The version that the alias ``champion`` points to; None where there is none."""
        return next((version for version in self.versions() if version.is_champion), None)

    def compare(self, first: str | int, second: str | int) -> Comparison:
        """The numbers of two versions side by side."""
        a, b = self.version(first), self.version(second)
        names = [name for name in COCO_METRICS if name in a.metrics or name in b.metrics]
        metrics = {name: (a.metrics.get(name), b.metrics.get(name)) for name in names}
        return Comparison(a, b, metrics, bool(a.measured_on) and a.measured_on == b.measured_on)

    # What changes

    def tag(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        """Sets tags of a version."""
        with self.calls():
            for key, value in tags.items():
                self.client.set_model_version_tag(
                    self.name, str(version.version), key, shortened(value, _LONGEST_VALUE)
                )

    def promote(self, which: str | int, reason: str = "promoted by hand") -> ModelVersion:
        """Makes a version the champion, whatever its numbers are.

        Raises:
            RegistryError: there is no such version.
        """
        version = self.version(which)
        if not version.is_champion:
            self.move_champion(version, reason)
        return self.version(version.version)

    def rollback(self, reason: str = "rolled back by hand") -> ModelVersion:
        """Makes the previous champion the champion again.

        Raises:
            RegistryError: there is no champion, or there was none before it.
        """
        versions = {version.version: version for version in self.versions()}
        history = self._history(versions) if versions else []
        if not history:
            raise RegistryError(
                f"{self.name!r} has no champion to roll back; {self.what_there_is([*versions.values()])}"
            )
        present = history.pop()
        before = next((versions[number] for number in reversed(history) if number in versions), None)
        if before is None:
            raise RegistryError(f"{versions[present]} is the first champion of {self.name!r}: none was before it")
        history = history[: history.index(before.version) + 1]
        self._point_at(before, history)
        self.tag(versions[present], {DECISION: ROLLED_BACK, REASON: f"{reason}: back to version {before.version}"})
        self.tag(before, {DECISION: BECAME_CHAMPION, REASON: f"{reason}: back from version {present}"})
        return self.version(before.version)

    def move_champion(self, version: ModelVersion, reason: str) -> None:
        """Points the alias to a version, and records the reason."""
        history = self._history({each.version: each for each in self.versions()})
        self._point_at(version, [*history, version.version])
        self.tag(version, {DECISION: BECAME_CHAMPION, REASON: reason})

    def _point_at(self, version: ModelVersion, history: Sequence[int]) -> None:
        with self.calls():
            self.client.set_registered_model_alias(self.name, CHAMPION, str(version.version))
            self.client.set_registered_model_tag(self.name, _HISTORY, json.dumps(list(history)[-_LONGEST_HISTORY:]))

    def _history(self, versions: Mapping[int, ModelVersion]) -> list[int]:
        """The versions that were champion, the present one last, also if its alias was set by other means."""
        with self.calls():
            noted = self.client.get_registered_model(self.name).tags.get(_HISTORY, "[]")
        history: list[int] = [number for number in json.loads(noted) if isinstance(number, int)]
        present = next((version.version for version in versions.values() if version.is_champion), None)
        if present is None:
            return []
        return history if history and history[-1] == present else [*history, present]


def _version(entry: Any, aliases: Mapping[str, str]) -> ModelVersion:
    number = int(entry.version)
    mine = tuple(sorted(alias for alias, version in aliases.items() if int(version) == number))
    return ModelVersion(
        entry.name, number, mine, int(entry.creation_timestamp), entry.run_id or None, entry.source, dict(entry.tags)
    )
