"""Writes files and databases atomically: complete or not at all, even if the process dies or the power fails.

Of local disks alone, without pyarrow, which a training that is recorded in a local folder does not need.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Replaces the content of a file atomically: readers see the old or the new content, also after a loss of power."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with draft.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk, so that new and renamed files survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_database_whole(path: Path, create: Callable[[Path], None]) -> None:
    """Creates an SQLite database atomically if it does not exist.

    MLflow often cannot complete a database in which only some tables were created. So the database is created under
    another name, copied (MLflow may keep the first file open) and then renamed. If another process has created the
    database meanwhile, that database stays.

    Args:
        path: the database file.
        create: creates a database in the file that it is given.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as workplace:
        draft, copy = Path(workplace, "draft.db"), Path(workplace, "copy.db")
        create(draft)
        with closing(sqlite3.connect(draft)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        try:
            path.hardlink_to(copy)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            if not path.exists():
                shutil.move(copy, path)
