"""Which MLflow store a run goes to: its address, where its files lie, how to look at it.

Only addresses are handled here; nothing is connected to, and MLflow is not imported.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+:")
_USER_INFO = re.compile(r"(?<=://)[^/@]+@")
_SQLITE = "sqlite:///"


def default_tracking_uri(storage_dir: str | Path) -> str:
    """An SQLite database ``mlflow.db`` in a local folder, addressed absolutely.

    Raises:
        ValueError: The folder is in a bucket, where no database can live.
    """
    if _SCHEME.match(str(storage_dir)) and not str(storage_dir).startswith("file://"):
        raise ValueError(
            f"{storage_dir} is not a local folder, so MLflow's SQLite database cannot lie in it: "
            "give the address of an MLflow server, or a local sqlite:/// one"
        )
    folder = Path(str(storage_dir).removeprefix("file://")).expanduser().resolve()
    return sqlite_uri(folder / "mlflow.db")


def tracking_uri(configured: str | None, storage_dir: str | Path) -> str:
    """The address to use: the configured one, else ``MLFLOW_TRACKING_URI``, else SQLite in ``storage_dir``.

    Relative SQLite addresses are made absolute, since workers run in other folders.
    """
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI") or default_tracking_uri(storage_dir)
    path = sqlite_path(uri)
    if path is None or path.is_absolute():
        return uri
    return uri.replace(str(path), str(path.expanduser().resolve()), 1)


def sqlite_uri(path: Path) -> str:
    """The address of an SQLite database file."""
    return f"{_SQLITE}{path}"


def sqlite_path(uri: str) -> Path | None:
    """The database file of an SQLite address; None for any other store."""
    path = uri.removeprefix(_SQLITE).partition("?")[0]
    return Path(path) if uri.startswith(_SQLITE) and path and not path.startswith(":memory:") else None


def artifact_location(uri: str) -> str | None:
    """Where a new experiment keeps its files: beside an SQLite database; None leaves it to the server."""
    path = sqlite_path(uri)
    return None if path is None else (path.resolve().parent / "mlartifacts").as_uri()


def public_uri(uri: str) -> str:
    """The address without user and password: for messages and files."""
    return _USER_INFO.sub("", uri)


def viewing_hint(uri: str) -> str:
    """What a person does to see the runs of a store."""
    if sqlite_path(uri) is not None:
        return f"mlflow ui --backend-store-uri {uri}"
    return public_uri(uri)
