"""Whether MLflow can record in an SQLite file, found out without MLflow and without changing the file."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sqlite3
import tempfile
from contextlib import closing
from functools import cache
from pathlib import Path

from detr_ray.tracking.store import sqlite_uri
from detr_ray.tracking.unusable import UnreachableError, UnusableError

TIMEOUT_S = 5.0
"""How long another process may hold the database."""

_REVISION = re.compile(r"^(down_)?revision\s*=\s*['\"](\w+)['\"]", re.MULTILINE)
_ELSEWHERE = "set tracking.uri to another one"


def try_sqlite(database: Path) -> str:
    """Tries the SQLite database of an MLflow store.

    Returns:
        What was found, as a sentence without a full stop.

    Raises:
        UnusableError: MLflow can never record in it.
        UnreachableError: it is held by another process.
    """
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
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", uri=True, timeout=TIMEOUT_S)) as found:
            tables = {name for (name,) in found.execute("select name from sqlite_master where type = 'table'")}
            versions = found.execute("select * from alembic_version").fetchall() if "alembic_version" in tables else []
            # Asks for the right to write, and gives it back.
            found.execute("begin immediate")
            found.rollback()
    except sqlite3.Error as error:
        kind = UnreachableError if "locked" in str(error) else UnusableError
        raise kind(f"{database} cannot be used ({error}); {_ELSEWHERE}") from error
    if tables:
        _check_schema(database, tables, [str(row[0]) for row in versions])
    _try_folder(database.parent)  # a change is written beside the file first
    return f"{database} can be written"


def _check_schema(database: Path, tables: set[str], versions: list[str]) -> None:
    """Refuses tables that are not those of the MLflow that is installed."""
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
    """The version of the tables that the installed MLflow makes (None if it cannot be told), and all it knows.

    Read from its files: importing MLflow takes seconds.
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
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UnusableError(f"{folder} cannot be written ({error.strerror}); set tracking.uri") from error
