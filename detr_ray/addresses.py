"""Addresses of files and folders: a local path, or the URI of a file system that pyarrow knows.

The one place that makes and takes apart addresses; nothing is opened here. A path is taken as it is, whatever
characters it has. In a URI, what has a meaning there (``%``, ``?``, ``#``) is escaped in names, and options stand at
the end.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from detr_ray.config.errors import ConfigError
from detr_ray.credentials import credentials_in

_URI = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_OBJECT_STORES = frozenset({"s3", "gs", "gcs", "abfs", "abfss"})


class LocationError(ConfigError):
    """An address that cannot be used, whatever lies there; the text never repeats credentials."""


def is_uri(location: str) -> bool:
    """Whether a location names its file system (``s3://bucket/x``), rather than a path on this machine."""
    return _URI.match(location) is not None


def is_remote(location: str) -> bool:
    """Whether a location is beyond a network."""
    return is_uri(location) and scheme_of(location) != "file"


def is_object_store(location: str) -> bool:
    """Whether a location is in a bucket: no folders, objects appear whole or not at all, and moving one copies it."""
    return is_uri(location) and scheme_of(location) in _OBJECT_STORES


def local_path(location: str) -> Path | None:
    """The absolute path of a location on this machine; None for any other.

    A path is taken as it is, whatever characters it has; a ``file://`` address is decoded.

    Raises:
        LocationError: a ``file://`` address of another machine, or with what has no meaning behind one.
    """
    if not is_uri(location):
        # pathlib would take ./~x for the home folder of x, and raise where there is nobody of that name.
        return Path(os.path.expanduser(location)).absolute()  # noqa: PTH111
    if scheme_of(location) != "file":
        return None
    host, _, path = location.partition("://")[2].partition("/")
    if host not in ("", "localhost"):
        raise LocationError(f"{location}: names a machine, {host!r}; an address of a file here has three slashes")
    if "?" in path or "#" in path:
        raise LocationError(
            f"{location}: there are no options behind file://; write %3F for a question mark and %23 for a number "
            "sign, or give the path without file://"
        )
    return Path(unquote(f"/{path}"))


def resolve(location: str) -> str:
    """A location that means the same in every process: an absolute path, or a URI without a slash at its end."""
    path = local_path(location)
    if path is not None:
        return str(path)
    address, mark, options = location.partition("?")
    return address.rstrip("/") + mark + options


def join(root: str, *names: str) -> str:
    """The location of a file or folder below the folder ``root``.

    Names are those of files, as they are listed: what has a meaning in an address is escaped.
    """
    if not is_uri(root):
        return str(Path(root, *names))
    address, mark, options = root.partition("?")
    return "/".join([address.rstrip("/"), *map(_escaped, names)]) + mark + options


def name_of(location: str) -> str:
    """The name of a file or folder in its folder."""
    if not is_uri(location):
        return Path(location).name
    return unquote(location.partition("?")[0].rstrip("/").rpartition("/")[2])


def _escaped(name: str) -> str:
    return name.replace("%", "%25").replace("?", "%3F").replace("#", "%23")


def with_suffix(location: str, suffix: str) -> str:
    """The location of a file whose name is this one's and a suffix, in the same folder."""
    address, mark, options = location.partition("?") if is_uri(location) else (location, "", "")
    return address + suffix + mark + options


def parent(location: str) -> str:
    """The folder that a file or folder lies in."""
    if not is_uri(location):
        return str(Path(location).parent)
    address, mark, options = location.partition("?")
    return address.rstrip("/").rpartition("/")[0] + mark + options


def check_address(location: str) -> None:
    """Refuses an address that holds credentials, or names no place on any machine; asks no server.

    Raises:
        LocationError: it does.
    """
    found = credentials_in(location)
    if found is not None:
        raise LocationError(
            f"an address {location.partition('://')[0]}://... holds credentials ({found}), which would be kept with "
            "the run and shown in its records (it is not repeated here). Give them in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, the machine's role), and the address without "
            "them"
        )
    local_path(location)


def scheme_of(location: str) -> str:
    """The kind of file system that a URI names, in lower case."""
    return location.partition("://")[0].lower()
