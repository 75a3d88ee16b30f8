"""Addresses of MLflow stores and in them. Nothing is opened here, and MLflow is not imported."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

from detr_ray.addresses import is_uri, local_path
from detr_ray.credentials import without_credentials

STORE_VARIABLE = "MLFLOW_TRACKING_URI"
"""MLflow's environment variable with the address of the store."""
BEST_CHECKPOINT = "checkpoints/best"
"""Where a training stores its best checkpoint among the artifacts of its run. In those of earlier releases it is the
model file alone."""

_SQLITE = "sqlite:///"
_SQLITE_QUOTED = "sqlite+pysqlite:///"
"""Means the same to SQLAlchemy. With `_SQLITE`, MLflow would create the folder of the path without decoding it."""
_ANY_SQLITE = re.compile(r"sqlite(\+pysqlite)?:///")


def default_tracking_uri(storage_dir: str | Path) -> str:
    """Address of the SQLite database ``mlflow.db`` in a local folder, with an absolute path.

    Raises:
        ValueError: The folder is in a bucket, which cannot hold a database.
    """
    folder = local_path(str(storage_dir))
    if folder is None:
        raise ValueError(
            f"{storage_dir} is not a local folder, so MLflow's SQLite database cannot lie in it: "
            "give the address of an MLflow server, or a local sqlite:/// one"
        )
    return sqlite_uri(folder.resolve() / "mlflow.db")


def tracking_uri(configured: str | None, storage_dir: str | Path) -> str:
    """The address to use: the configured one, else ``MLFLOW_TRACKING_URI``, else SQLite in ``storage_dir``.

    Relative SQLite addresses are made absolute, because workers run in other folders.
    """
    uri = configured or os.environ.get(STORE_VARIABLE) or default_tracking_uri(storage_dir)
    path = sqlite_path(uri)
    if path is None or path.is_absolute():
        return uri
    _, mark, options = uri.partition("?")
    return sqlite_uri(local_path(str(path)) or path) + mark + options


def sqlite_uri(path: Path) -> str:
    """The address of an SQLite database file; ``%`` and ``?`` in its path are escaped."""
    quoted = str(path).replace("%", "%25").replace("?", "%3F")
    return f"{_SQLITE if quoted == str(path) else _SQLITE_QUOTED}{quoted}"


def sqlite_path(uri: str) -> Path | None:
    """The database file of an SQLite address; None for other stores and for databases in memory."""
    begin = _ANY_SQLITE.match(uri)
    path = "" if begin is None else unquote(uri[begin.end() :].partition("?")[0])
    if path.startswith("file:"):
        path = unquote(path.removeprefix("file:"))
    return Path(path) if path and not path.startswith(":memory:") else None


def artifact_location(uri: str) -> str | None:
    """Where a new experiment stores its files: beside an SQLite database; None: the server decides."""
    path = sqlite_path(uri)
    return None if path is None else (path.resolve().parent / "mlartifacts").as_uri()


def public_uri(uri: str) -> str:
    """The address without user and password, for messages and files. Options are kept only for SQLite."""
    shown = without_credentials(uri)
    return shown if sqlite_path(uri) is not None else shown.partition("?")[0]


def viewing_hint(uri: str) -> str:
    """How to see the runs of a store: a command to copy, or the server's address."""
    if sqlite_path(uri) is not None:
        return shlex.join(["mlflow", "ui", "--backend-store-uri", uri])
    return public_uri(uri) if is_uri(uri) else uri
