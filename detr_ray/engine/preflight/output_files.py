"""Output files of a command: checked before its work starts, written after its end."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping
from pathlib import Path

from detr_ray.addresses import LocationError, local_path, parent
from detr_ray.config import ConfigError
from detr_ray.locations import open_location, write_bytes
from detr_ray.retries import reason_of


def check_outputs(locations: Mapping[str, str]) -> None:
    """Creates the folders of output files, and checks that the files can be written.

    Args:
        locations: option or key -> path or URI of its file.

    Raises:
        ConfigError: some files cannot be written, or two options name the same file.
    """
    errors = []
    taken: dict[str, str] = {}
    for option, location in locations.items():
        try:
            place = _try(location)
        except (OSError, LocationError) as error:
            errors.append(f"{option}: {location} cannot be written: {reason_of(error)}")
            continue
        if place in taken:
            errors.append(f"{option}: {location} is the file of {taken[place]} too; name another one")
        taken[place] = option
    if errors:
        raise ConfigError(errors)


def write_output(location: str, content: bytes) -> None:
    """Writes a file atomically, and creates its folders. Devices and pipes are written directly.

    Raises:
        OSError: it could not be written.
    """
    path = local_path(location)
    if path is None:
        write_bytes(location, content)
    elif path.exists() and not path.is_file():
        path.write_bytes(content)
    else:
        write_bytes(str(path.resolve()), content)  # the target of a link, not the link itself


def _try(location: str) -> str:
    """Checks that a file can be opened and that a file beside it can be written. Returns its resolved location."""
    path = local_path(location)
    if path is None:
        open_location(location)  # fails for an address without a supported file system
        from detr_ray.engine.preflight.storage import try_storage  # imports the model

        try_storage(parent(location))
        return location
    path = path.resolve()
    if path.is_dir() or location.endswith("/"):
        raise IsADirectoryError("it is a folder; name a file in it")
    if path.exists() and not path.is_file():
        return str(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{path.parent} cannot be made a folder: there is a file of that name") from None
    if path.exists():
        path.open("ab").close()
    beside = Path(f"{path}.{secrets.token_hex(4)}.tmp")  # as long as the temporary name used when writing
    try:
        beside.open("xb").close()
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
    return str(path)
