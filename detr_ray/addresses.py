"""Addresses of files and folders: a local path, or the URI of a file system that pyarrow supports.

All addresses are built and split here; nothing is opened. A path may contain any characters. In the names of a URI,
``%``, ``?`` and ``#`` are escaped; options are at its end, after ``?``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from detr_ray.config.errors import ConfigError
from detr_ray.credentials import credentials_in

_URI = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
MLFLOW_SCHEMES = ("models:", "runs:")
"""How addresses of models and runs of MLflow begin."""

_OBJECT_STORES = frozenset({"s3", "gs", "gcs", "abfs", "abfss"})


class LocationError(ConfigError):
    """An address that cannot be used. The message never repeats credentials."""


def is_uri(location: str) -> bool:
    """Whether a location is a URI (``s3://bucket/x``, ``file:///x``) and not a path."""
    return _URI.match(location) is not None


def is_remote(location: str) -> bool:
    """Whether a location is not on this machine."""
    return is_uri(location) and scheme_of(location) != "file"


def is_object_store(location: str) -> bool:
    """Whether a location is in a bucket: no folders, writing an object is atomic, and moving an object copies it."""
    return is_uri(location) and scheme_of(location) in _OBJECT_STORES


def local_path(location: str) -> Path | None:
    """The absolute path of a location on this machine; None for other locations.

    A ``file://`` address is decoded; a path is not.

    Raises:
        LocationError: a ``file://`` address of another machine, or with options or a fragment.
    """
    if not is_uri(location):
        # pathlib would read ./~x as the home folder of user x, and raise if there is no such user.
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
    """The location as an absolute path, or as a URI without a slash at its end: the same for every process."""
    path = local_path(location)
    if path is not None:
        return str(path)
    address, mark, options = location.partition("?")
    return address.rstrip("/") + mark + options


def join(root: str, *names: str) -> str:
    """The location of a file or folder below the folder ``root``; the names are escaped where necessary."""
    if not is_uri(root):
        return str(Path(root, *names))
    address, mark, options = root.partition("?")
    return "/".join([address.rstrip("/"), *map(_escaped, names)]) + mark + options


def name_of(location: str) -> str:
    """The last part of a location, unescaped."""
    if not is_uri(location):
        return Path(location).name
    return unquote(location.partition("?")[0].rstrip("/").rpartition("/")[2])


def _escaped(name: str) -> str:
    return name.replace("%", "%25").replace("?", "%3F").replace("#", "%23")


def with_suffix(location: str, suffix: str) -> str:
    """The location with a suffix added to the file name."""
    address, mark, options = location.partition("?") if is_uri(location) else (location, "", "")
    return address + suffix + mark + options


def parent(location: str) -> str:
    """The folder that contains a file or folder."""
    if not is_uri(location):
        return str(Path(location).parent)
    address, mark, options = location.partition("?")
    return address.rstrip("/").rpartition("/")[0] + mark + options


def check_address(location: str) -> None:
    """Refuses an address that contains credentials or is malformed; contacts no server.

    Raises:
        LocationError: the address is refused.
    """
    found = credentials_in(location)
    if found is not None:
        raise LocationError(
            f"an address {location.partition('://')[0]}://... holds credentials ({found}), which would be stored with "
            "the run and shown in its records (it is not repeated here). Give them in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, the machine's role), and the address without "
            "them"
        )
    local_path(location)


def scheme_of(location: str) -> str:
    """The scheme of a URI, in lower case."""
    return location.partition("://")[0].lower()
