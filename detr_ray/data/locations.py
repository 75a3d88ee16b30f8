"""Where data lies: a local path or the URI of a file system that pyarrow knows (``s3://``, ``gs://``, ``hdfs://``).

Knows nothing of what the files hold.
"""

from __future__ import annotations

from pathlib import Path

from pyarrow import fs

from detr_ray.data.errors import DataError


def is_uri(location: str) -> bool:
    """Whether a location names its file system (``s3://bucket/x``), rather than a path on this machine."""
    return "://" in location


def join(root: str, name: str) -> str:
    """The location of ``name`` in the folder ``root``."""
    return f"{root.rstrip('/')}/{name}" if is_uri(root) else str(Path(root) / name)


def open_location(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a location, and the path on it.

    Raises:
        DataError: a URI that no file system answers to.
    """
    if not is_uri(location):
        return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())
    try:
        file_system, path = fs.FileSystem.from_uri(location)
    except (ValueError, OSError, NotImplementedError) as error:
        raise DataError(f"{location}: no file system for this address: {error}") from error
    return file_system, path


def read_bytes(location: str) -> bytes:
    """The whole content of a file.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
    """
    file_system, path = open_location(location)
    with file_system.open_input_file(path) as file:
        return file.read()
