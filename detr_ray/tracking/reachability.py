"""Whether an MLflow store can be used, found out in seconds and without making anything in it.

A server that is away is no reason not to train: the records wait until it answers. A store that can never record is.
"""

from __future__ import annotations

import base64
import http.client
import importlib.metadata
import json
import os
import re
import socket
import ssl
import urllib.error
import urllib.request
from urllib.parse import unquote, urlsplit

from detr_ray.credentials import without_credentials
from detr_ray.tracking.sqlite_check import try_sqlite
from detr_ray.tracking.store import public_uri, sqlite_path
from detr_ray.tracking.unusable import UnreachableError, UnusableError

__all__ = ["UnreachableError", "UnusableError", "try_store"]

TIMEOUT_S = 5.0
"""How long a server may take to answer."""

_QUESTION = "/api/2.0/mlflow/experiments/search?max_results=1"
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_HOST_AND_PORT = re.compile(r"[\w.-]+:\d+(/.*)?")
_SCHEME = re.compile(r"[a-zA-Z][\w+.-]*(?=:)")


def try_store(uri: str, timeout_s: float = TIMEOUT_S) -> str:
    """Tries an MLflow store.

    Args:
        uri: as `tracking_uri` gives it.
        timeout_s: how long a server may take.

    Returns:
        What was found, as a sentence without a full stop.

    Raises:
        UnusableError: it can never record.
        UnreachableError: it does not answer, or not as an MLflow store.
    """
    shown = public_uri(uri)
    if uri.startswith("sqlite"):
        database = sqlite_path(uri)
        if database is None:
            raise UnusableError(
                f"{shown} names no file that would keep the records; set tracking.uri to sqlite:/// and the path of one"
            )
        return try_sqlite(database)
    if "://" in uri:
        scheme = uri.partition("://")[0].lower()
    else:
        found = _SCHEME.match(uri)
        scheme = "" if found is None or _HOST_AND_PORT.fullmatch(shown) else found[0].lower()
        scheme = uri if uri in ("databricks", "databricks-uc") else scheme
    if scheme in ("http", "https"):
        return _try_server(uri, timeout_s)
    if scheme == "databricks":
        return _try_databricks(uri)
    if scheme in ("", "file"):
        return _try_files(shown)
    return _try_other(uri, scheme, timeout_s)


def _try_files(shown: str) -> str:
    """MLflow takes what has no scheme for a folder; of late, it records in none."""
    if _HOST_AND_PORT.fullmatch(shown):
        raise UnusableError(f"{shown} is no address of a server; set tracking.uri to http://{shown}")
    if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
        return f"{shown} is a folder, which MLflow takes because of MLFLOW_ALLOW_FILE_STORE"
    raise UnusableError(
        f"{shown} is a folder to MLflow, which does not record in folders any more; set tracking.uri to sqlite:/// and "
        "the path of a file, to the address of a server (http://HOST:PORT), or to null for a file in run.storage"
    )


def _try_server(uri: str, timeout_s: float) -> str:
    shown = public_uri(uri)
    request = urllib.request.Request(_question(uri, shown), headers=_credentials(uri))
    try:
        with urllib.request.urlopen(request, timeout=timeout_s, context=_tls(uri)) as response:
            answer = response.read()
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
    try:
        content = json.loads(answer)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UnreachableError(f"{shown} answers, but not as an MLflow server does; is it another service's address?")
    return f"{shown} answers"


def _question(uri: str, shown: str) -> str:
    """The address to ask a server at.

    Raises:
        UnusableError: the address names no server.
    """
    try:
        parts = urlsplit(uri)
        port, host = parts.port, parts.hostname or ""
        host.encode("idna")
    except ValueError as error:
        raise UnusableError(
            f"{shown} is no address of a server ({error}); set tracking.uri to http://HOST:PORT"
        ) from error
    if not host or port == 0 or re.search(r"\s", uri):
        raise UnusableError(f"{shown} is no address of a server; set tracking.uri to http://HOST:PORT")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}{_QUESTION}"


def _credentials(uri: str) -> dict[str, str]:
    """The header that MLflow's own client would send."""
    parts = urlsplit(uri)
    user = unquote(parts.username) if parts.username else os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = unquote(parts.password) if parts.password else os.environ.get("MLFLOW_TRACKING_PASSWORD")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if user and password:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    return {"Authorization": f"Bearer {token}"} if token else {}


def _tls(uri: str) -> ssl.SSLContext | None:
    """How far a server's certificate is trusted, by the variables of MLflow's own client."""
    if urlsplit(uri).scheme != "https":
        return None
    context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _try_databricks(uri: str) -> str:
    """Whether there are credentials for Databricks, where MLflow's client would look for them."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.databricks_utils import get_databricks_host_creds

    try:
        host = get_databricks_host_creds(uri).host
    except (MlflowException, ValueError, OSError) as error:
        raise UnusableError(
            f"{uri} needs credentials, and there are none here; set DATABRICKS_HOST and DATABRICKS_TOKEN, or make a "
            "profile in ~/.databrickscfg"
        ) from error
    return f"{uri} is {host} (which is not tried here)"


def _try_other(uri: str, scheme: str, timeout_s: float) -> str:
    """A database server, or a store that a plugin brings: as far as it can be tried without its client."""
    shown = public_uri(uri)
    kind = scheme.partition("+")[0]
    if kind not in _DATABASE_PORTS:
        if scheme in {entry.name for entry in importlib.metadata.entry_points(group="mlflow.tracking_store")}:
            return f"{shown} is of a kind that is not tried here"
        kinds = ", ".join(f"{known}://..." for known in ("http", "https", "sqlite", *_DATABASE_PORTS))
        meant = "postgresql://..." if kind == "postgres" else f"one that begins with one of {kinds}"
        raise UnusableError(f"{shown} is of no kind that MLflow records in; set tracking.uri to {meant}")
    host, port = _database_server(uri, shown)
    try:
        socket.create_connection((host, port or _DATABASE_PORTS[kind]), timeout=timeout_s).close()
    except OSError as error:
        where = f"{host}:{port or _DATABASE_PORTS[kind]}"
        raise UnreachableError(f"{where} does not answer ({error}); set tracking.uri") from error
    return f"{host}:{port or _DATABASE_PORTS[kind]} answers (its user and its database are not tried here)"


def _database_server(uri: str, shown: str) -> tuple[str, int | None]:
    """Host and port of a database server.

    Raises:
        UnusableError: its client is not installed, or the address is none.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
        url.get_dialect().import_dbapi()
    except ImportError as error:
        name = error.name or str(error)
        raise UnusableError(f"{shown} needs the package {name}, which is not installed: pip install {name}") from error
    except (ArgumentError, ValueError) as error:
        reason = without_credentials(str(error).splitlines()[0])
        raise UnusableError(f"{shown} is no address of a database ({reason}); set tracking.uri") from error
    return url.host or "localhost", url.port
