"""Whether MLflow can record in a store: found out in seconds, without changing anything in the store.

An unreachable server does not stop training: the records wait in the run's folder. An unusable store stops it.
"""

from __future__ import annotations

import base64
import http.client
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import socket
import sqlite3
import ssl
import tempfile
import urllib.error
import urllib.request
from contextlib import closing
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from detr_ray.credentials import without_credentials
from detr_ray.tracking.store import public_uri, sqlite_path, sqlite_uri

TIMEOUT_S = 5.0

_QUERY = "/api/2.0/mlflow/experiments/search?max_results=1"
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_HOST_AND_PORT = re.compile(r"[\w.-]+:\d+(/.*)?")
_SCHEME = re.compile(r"[a-zA-Z][\w+.-]*(?=:)")
_REVISION = re.compile(r"^(down_)?revision\s*=\s*['\"](\w+)['\"]", re.MULTILINE)
_ELSEWHERE = "set tracking.uri to another one"


class UnreachableError(Exception):
    """The store cannot be used now. The message says why and what to do."""


class UnusableError(UnreachableError):
    """The store can never be used at this address."""


def try_store(uri: str, timeout_s: float = TIMEOUT_S) -> str:
    """Tries an MLflow store.

    Args:
        uri: as `tracking_uri` gives it.
        timeout_s: how long a server may take to answer, or another process may lock the database.

    Returns:
        What was found, as a sentence without a full stop.

    Raises:
        UnusableError: MLflow can never record in it.
        UnreachableError: it does not answer, answers unlike an MLflow store, or is locked.
    """
    shown = public_uri(uri)
    if uri.startswith("sqlite"):
        database = sqlite_path(uri)
        if database is None:
            raise UnusableError(
                f"{shown} names no file that would keep the records; set tracking.uri to sqlite:/// and the path of one"
            )
        return _try_sqlite(database, timeout_s)
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


def _try_sqlite(database: Path, timeout_s: float) -> str:
    """Tries an SQLite file; see `try_store`."""
    try:
        there = database.exists()
    except OSError as error:  # a name that is too long, a loop of links
        raise UnusableError(f"{database} cannot be used ({error.strerror}); {_ELSEWHERE}") from error
    if not there:
        _try_folder(database.parent)
        return f"{database} is made by the first run"
    if database.is_dir():
        raise UnusableError(f"{database} is a folder, and not a database; {_ELSEWHERE}")
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", uri=True, timeout=timeout_s)) as found:
            tables = {name for (name,) in found.execute("select name from sqlite_master where type = 'table'")}
            versions = found.execute("select * from alembic_version").fetchall() if "alembic_version" in tables else []
            found.execute("begin immediate")  # fails where the file cannot be written or is locked
            found.rollback()
    except sqlite3.Error as error:
        kind = UnreachableError if "locked" in str(error) else UnusableError
        raise kind(f"{database} cannot be used ({error}); {_ELSEWHERE}") from error
    if tables:
        _check_schema(database, tables, [str(row[0]) for row in versions])
    _try_folder(database.parent)  # SQLite writes its journal beside the file
    return f"{database} can be written"


def _check_schema(database: Path, tables: set[str], versions: list[str]) -> None:
    """Refuses tables of another program, or of another version of MLflow."""
    if "experiments" not in tables or len(versions) != 1:
        raise UnusableError(f"{database} is a database of something else; {_ELSEWHERE}")
    current, known = _revisions()
    if versions[0] == current or current is None:
        return
    if versions[0] in known:
        upgrade = shlex.join(["mlflow", "db", "upgrade", sqlite_uri(database)])
        raise UnusableError(
            f"{database} was made by an older MLflow, which this one does not write to; copy it away, then run "
            f"`{upgrade}`, or {_ELSEWHERE}"
        )
    raise UnusableError(
        f"{database} was made by a newer MLflow than is installed here, or by something else; install that MLflow, or "
        f"{_ELSEWHERE}"
    )


@cache
def _revisions() -> tuple[str | None, set[str]]:
    """The schema version of the installed MLflow (None if it cannot be told), and all versions that it knows.

    Read from MLflow's migration files: importing MLflow takes seconds.
    """
    package = importlib.util.find_spec("mlflow")
    places = (package.submodule_search_locations or []) if package is not None else []
    known: set[str] = set()
    replaced: set[str] = set()
    for place in places:
        for file in Path(place, "store", "db_migrations", "versions").glob("*.py"):
            for down, revision in _REVISION.findall(file.read_text(encoding="utf-8")):
                (replaced if down else known).add(revision)
    current = known - replaced
    return (current.pop() if len(current) == 1 else None), known


def _try_folder(folder: Path) -> None:
    """Writes a temporary file into the folder, or into the nearest folder above that exists."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UnusableError(f"{folder} cannot be written ({error.strerror}); set tracking.uri") from error


def _try_files(shown: str) -> str:
    """Refuses folders: current versions of MLflow do not record in them. An address without a scheme is one."""
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
    request = urllib.request.Request(_query_address(uri, shown), headers=_credentials(uri))
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


def _query_address(uri: str, shown: str) -> str:
    """The URL of a small query that every MLflow server answers.

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
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}{_QUERY}"


def _credentials(uri: str) -> dict[str, str]:
    """The header with user and password, or token, as MLflow's own client sends it."""
    parts = urlsplit(uri)
    user = unquote(parts.username) if parts.username else os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = unquote(parts.password) if parts.password else os.environ.get("MLFLOW_TRACKING_PASSWORD")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if user and password:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    return {"Authorization": f"Bearer {token}"} if token else {}


def _tls(uri: str) -> ssl.SSLContext | None:
    """How the server's certificate is checked: by the environment variables of MLflow's own client."""
    if urlsplit(uri).scheme != "https":
        return None
    context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _try_databricks(uri: str) -> str:
    """Looks for Databricks credentials in the places where MLflow's client looks."""
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
    """Tries to connect to a database server. A store of an MLflow plugin is accepted untried."""
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
        UnusableError: the Python package for this database is not installed, or the address cannot be parsed.
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
