"""Whether an MLflow store can be used, found out in seconds and without making anything in it.

Training does not need to know: its records wait until the store answers. A person before a long run does.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import sqlite3
import ssl
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from detr_ray.tracking.store import public_uri, sqlite_path

TIMEOUT_S = 5.0
"""How long a server may take to answer."""

_QUESTION = "/api/2.0/mlflow/experiments/search?max_results=1"
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


class UnreachableError(Exception):
    """A store that cannot be used; the message says why and what to do."""


def try_store(uri: str, timeout_s: float = TIMEOUT_S) -> str:
    """Tries an MLflow store.

    Args:
        uri: as `tracking_uri` gives it.
        timeout_s: how long a server may take.

    Returns:
        What was found, as a sentence without a full stop.

    Raises:
        UnreachableError: it does not answer, or not as an MLflow store.
    """
    database = sqlite_path(uri)
    if database is not None:
        return _try_sqlite(database)
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https"):
        return _try_server(uri, timeout_s)
    if scheme in ("", "file"):
        return _try_folder(Path(unquote(urlsplit(uri).path)))
    return _try_port(uri, timeout_s)


def _try_sqlite(database: Path) -> str:
    if not database.exists():
        _try_folder(database.parent)
        return f"{database} is made by the first run"
    try:
        connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", uri=True, timeout=TIMEOUT_S)
        try:
            tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
            # Asks for the right to write, and gives it back.
            connection.execute("begin immediate")
            connection.rollback()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise UnreachableError(f"{database} cannot be used ({error}); set tracking.uri to another one") from error
    if tables and "experiments" not in tables:
        raise UnreachableError(f"{database} is a database of something else; set tracking.uri to another one")
    return f"{database} can be written"


def _try_folder(folder: Path) -> str:
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UnreachableError(f"{folder} cannot be written ({error.strerror}); set tracking.uri") from error
    return f"{folder} can be written"


def _try_server(uri: str, timeout_s: float) -> str:
    shown = public_uri(uri)
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    address = f"{parts.scheme}://{host}{parts.path.rstrip('/')}{_QUESTION}"
    request = urllib.request.Request(address, headers=_credentials(uri))
    try:
        with urllib.request.urlopen(request, timeout=timeout_s, context=_tls(parts.scheme)) as response:
            content = json.loads(response.read())
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UnreachableError(
                f"{shown} refuses this user ({error.code}); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
                "or MLFLOW_TRACKING_TOKEN"
            ) from error
        raise UnreachableError(
            f"{shown} answers {error.code} {error.reason}: is it an MLflow server, and the address whole?"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UnreachableError(
            f"{shown} does not answer ({reason}); start the server, or set tracking.uri or MLFLOW_TRACKING_URI"
        ) from error
    except ValueError as error:
        raise UnreachableError(f"{shown} answers, but not as an MLflow server does") from error
    if not isinstance(content, dict):
        raise UnreachableError(f"{shown} answers, but not as an MLflow server does")
    return f"{shown} answers"


def _credentials(uri: str) -> dict[str, str]:
    """The header that MLflow's own client would send."""
    parts = urlsplit(uri)
    user = unquote(parts.username) if parts.username else os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = unquote(parts.password) if parts.password else os.environ.get("MLFLOW_TRACKING_PASSWORD")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if user and password:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    return {"Authorization": f"Bearer {token}"} if token else {}


def _tls(scheme: str) -> ssl.SSLContext | None:
    """How far a server's certificate is trusted, by the variables of MLflow's own client."""
    if scheme != "https":
        return None
    context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _try_port(uri: str, timeout_s: float) -> str:
    """A database server, or an address of another kind: as far as it can be tried without its client."""
    parts = urlsplit(uri)
    kind = parts.scheme.partition("+")[0]
    if kind not in _DATABASE_PORTS or not parts.hostname:
        return f"{public_uri(uri)} is of a kind that is not tried here"
    port = parts.port or _DATABASE_PORTS[kind]
    try:
        socket.create_connection((parts.hostname, port), timeout=timeout_s).close()
    except OSError as error:
        raise UnreachableError(f"{parts.hostname}:{port} does not answer ({error}); set tracking.uri") from error
    return f"{parts.hostname}:{port} answers (its user and its database are not tried here)"
