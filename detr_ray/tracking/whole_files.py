"""Files and databases that appear whole or not at all, whenever the process dies or the power fails."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replaces a file in one go: a reader sees the old or the new content and nothing between.

    That holds also after a loss of power.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Has a disk keep the names in a folder even if the power fails now."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_database_whole(path: Path, create: Callable[[Path], None]) -> None:
    """Makes an SQLite database where there is none, so that a death half-way leaves none behind.

    A database whose tables were made by halves can often not be completed. So it is made under another name, copied
    (what made it may still hold it open) and put in its place; if another process was faster, that one's stays.

    Args:
        path: the database file.
        create: makes a database in the file that it is given.
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
