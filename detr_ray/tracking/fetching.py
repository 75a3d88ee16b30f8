"""Downloads models from MLflow addresses: ``models:/detr@champion``, ``models:/detr/3``, ``runs:/RUN``.

Of an MLflow model only the package is downloaded; its code file is neither downloaded nor run, and other files are
ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detr_ray.addresses import local_path
from detr_ray.tracking.logged_model import PACKAGE
from detr_ray.tracking.registry import (
    CHAMPION,
    CHECKPOINT,
    PACKAGE_SHA256,
    ModelRegistry,
    ModelVersion,
    RegistryError,
    RegistryUnavailable,
    model_of,
)
from detr_ray.tracking.store import BEST_CHECKPOINT, public_uri, tracking_uri

RECORD = "model.json"
"""The file of a package that describes it."""

_RUN = re.compile(r"runs:/(?P<run>[0-9a-f]{32})(?:/(?P<path>[^\\]+?))?/?")
_ELSEWHERE = re.compile(r"(?!file:)[a-zA-Z][a-zA-Z0-9+.-]+:/")
"""Addresses of other machines; those of a server's own artifacts (``mlflow-artifacts:/``) have one slash."""


@contextlib.contextmanager
def fetched(source: str, uri: str | None = None) -> Iterator[str]:
    """A local copy of the model at an MLflow address; a temporary copy is removed at the end of the block.

    Args:
        source: ``models:/NAME/VERSION``, ``models:/NAME@ALIAS``, ``runs:/RUN`` (the version that was registered of the
            run, or else its best checkpoint) or ``runs:/RUN/PATH`` (a file or folder of its artifacts).
        uri: address of the MLflow store; None: ``MLFLOW_TRACKING_URI``, or else ``runs/mlflow.db``.

    Yields:
        The folder of a package or of a checkpoint, or a model file.

    Raises:
        RegistryError: there is no such version or run, or its files are missing or differ from the registered ones.
        RegistryUnavailable: the store does not answer.
    """
    store = uri or tracking_uri(None, "runs")
    model, run = model_of(source), _RUN.fullmatch(source)
    if model is not None:
        registry = ModelRegistry(store, model)
        with fetched_version(registry, _version(registry, source)) as folder:
            yield folder
    elif run is not None:
        with _fetched_run(store, run["run"], run["path"]) as place:
            yield place
    else:
        raise RegistryError(
            f"{source} is no address of a model: give models:/NAME/VERSION, models:/NAME@ALIAS (models:/detr@champion) "
            "or runs:/RUN_ID, whose id has 32 hexadecimal digits"
        )


def pinned(source: str, uri: str | None = None) -> str:
    """The address of the version that an alias means now; other addresses are returned unchanged.

    Args:
        source: as `fetched` takes it.
        uri: likewise.

    Raises:
        RegistryError: there is no such version.
    """
    model = model_of(source)
    if model is None or "@" not in source:
        return source
    version = _version(ModelRegistry(uri or tracking_uri(None, "runs"), model), source)
    return f"models:/{version.name}/{version.version}"


def _version(registry: ModelRegistry, source: str) -> ModelVersion:
    try:
        return registry.version(source)
    except RegistryError as error:
        hint = ""
        if source.endswith(f"@{CHAMPION}") and registry.versions():
            hint = ". None is champion yet: `python -m detr_ray.registry promote VERSION` makes one that"
        raise type(error)(f"{source} (in {public_uri(registry.uri)}): {error}{hint}") from error


@contextlib.contextmanager
def fetched_version(registry: ModelRegistry, version: ModelVersion) -> Iterator[str]:
    """A local copy of a version's package; see `fetched`.

    Raises:
        RegistryError: its files are missing, or differ from the registered ones.
    """
    with _part_of(registry, version, PACKAGE) as folder:
        _refuse_changed(version, folder / RECORD)
        yield str(folder)


def read_record(registry: ModelRegistry, version: ModelVersion) -> bytes:
    """The description in the package of a version (``model.json``), without its weights.

    Raises:
        RegistryError: as `fetched_version`.
    """
    with _part_of(registry, version, f"{PACKAGE}/{RECORD}") as file:
        _refuse_changed(version, file)
        return file.read_bytes()


def has_record(registry: ModelRegistry, version: ModelVersion) -> bool:
    """Whether the description in the package of a version is there, and is what was registered.

    Raises:
        RegistryUnavailable: the store does not answer.
    """
    try:
        read_record(registry, version)
    except RegistryUnavailable:
        raise
    except RegistryError:
        return False
    return True


@contextlib.contextmanager
def _part_of(registry: ModelRegistry, version: ModelVersion, name: str) -> Iterator[Path]:
    with registry.calls():
        place = registry.client.get_model_version_download_uri(registry.name, str(version.version))
    gone = (
        f"the files of {version} are gone: there is no {name} in {public_uri(place)}. Its entry in the registry is all "
        f"that is left; register {version.tags.get(CHECKPOINT, 'its checkpoint')} again, and delete the version"
    )
    with _local(registry, f"{place.rstrip('/')}/{name}", gone) as part:
        yield part


def _refuse_changed(version: ModelVersion, record: Path) -> None:
    """Refuses a package whose description differs from the registered one; it has the hashes of the other files."""
    registered = version.tags.get(PACKAGE_SHA256)
    if registered is None:
        raise RegistryError(
            f"{version} was not registered by detr_ray: it has no tag {PACKAGE_SHA256}, so nobody can tell whether its "
            "files are what was registered. Register its checkpoint: python -m detr_ray.registry register CHECKPOINT"
        )
    if hashlib.sha256(record.read_bytes()).hexdigest() != registered:
        raise RegistryError(
            f"{record} is not what was registered as {version}: its SHA-256 is another. It is damaged or was "
            "changed; nothing of it is used"
        )


@contextlib.contextmanager
def _fetched_run(store: str, run_id: str, path: str | None) -> Iterator[str]:
    """A model of an MLflow run: its registered version, or files of its artifacts."""
    registry = ModelRegistry(store, "")
    with registry.calls():
        run = _run(registry, run_id)
        entries = [] if path else list(registry.client.search_model_versions(f"run_id='{run_id}'"))
    if entries:
        newest = max(entries, key=lambda entry: int(entry.creation_timestamp))
        named = ModelRegistry(store, newest.name)
        with fetched_version(named, named.version(newest.version)) as folder:
            yield folder
        return
    path = path or BEST_CHECKPOINT
    gone = f"run {run_id} has no {path} among its artifacts in {public_uri(run.info.artifact_uri)}"
    if run.info.status == "RUNNING":
        gone += (
            ": it still runs, and stores its best checkpoint after an evaluation, for which to try again later; or "
            "it was killed"
        )
    with _local(registry, f"{run.info.artifact_uri.rstrip('/')}/{path}", gone) as place:
        yield str(place)


def _run(registry: ModelRegistry, run_id: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return registry.client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise RegistryError(f"there is no run {run_id} in {public_uri(registry.uri)}") from error


@contextlib.contextmanager
def _local(registry: ModelRegistry, address: str, gone: str) -> Iterator[Path]:
    """A file or folder of the store's artifacts: its local path, or that of a copy if it is remote.

    Raises:
        RegistryError: it is not there; the message is ``gone``.
    """
    path = None if _ELSEWHERE.match(address) else local_path(address)
    if path is not None:
        if not (path.is_file() or (path / RECORD).is_file() or (path / "model.pt").is_file()):
            raise RegistryError(gone)
        yield path
        return
    from mlflow.artifacts import download_artifacts, list_artifacts

    with tempfile.TemporaryDirectory(prefix="detr_ray-fetched-") as workplace:
        with registry.calls():
            parent, _, name = address.rpartition("/")
            there = {Path(entry.path).name for entry in list_artifacts(parent, tracking_uri=registry.uri)}
            if name not in there:
                raise RegistryError(gone)
            place = download_artifacts(
                address, dst_path=workplace, tracking_uri=registry.uri, registry_uri=registry.uri
            )
        yield Path(place)
