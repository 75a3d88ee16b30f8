"""Whether something can be written: a storage for runs, or the output files of a command."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from pyarrow.fs import FileType

from detr_ray.addresses import LocationError, is_remote, join, local_path, parent
from detr_ray.config import ConfigError
from detr_ray.locations import (
    delete_file,
    delete_folder,
    file_info,
    list_files,
    make_folder,
    open_location,
    read_bytes,
    write,
    write_bytes,
)
from detr_ray.retries import Patience, reason_of

TIMEOUT_S = 10.0
"""How long a storage may take to write, read and delete a small file."""

PATIENCE = Patience(attempts=3, first_pause_s=0.2, longest_pause_s=0.4, give_up_after_s=6.0)
"""Limits of repetition of a check: shorter than `TIMEOUT_S`, but enough for a server that is briefly busy."""

T = TypeVar("T")


def try_storage(storage: str) -> None:
    """Writes a small file into a folder, reads it and deletes it, together with all folders that it created.

    May take long if the storage does not answer at all; `within` limits the time.

    Raises:
        LocationError: the URI has no supported file system, or contains credentials.
        OSError: writing, reading or deleting failed.
    """
    content = secrets.token_bytes(64)
    location = join(storage, f".check-{secrets.token_hex(4)}")
    new_folder = first_missing(storage, PATIENCE)
    try:
        make_folder(storage, PATIENCE)
        write(location, lambda stream: stream.write(content), PATIENCE)
        if read_bytes(location, PATIENCE) != content:
            raise OSError("reading gives other bytes than were written")
        delete_file(location, PATIENCE)
    finally:
        # Deleting the last object in a "folder" of a bucket leaves an empty object for the folder.
        if new_folder is not None and not list_files(new_folder, PATIENCE):
            delete_folder(new_folder, PATIENCE)


def first_missing(folder: str, patience: Patience) -> str | None:
    """The outermost folder above ``folder`` (or itself) that does not exist; None if all exist.

    Stops below the bucket: it must exist, and listing it is often not permitted.
    """
    missing = None
    while not (is_remote(folder) and folder.partition("?")[0].count("/") < 3):
        if file_info(folder, patience).type != FileType.NotFound:
            break
        missing, folder = folder, parent(folder)
    return missing


def within(seconds: float, work: Callable[[], T]) -> T:
    """Runs ``work`` in a thread with a time limit, and returns its result.

    Raises:
        TimeoutError: the time is over; the thread goes on, but does not keep the process alive.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="storage check", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if errors:
        raise errors[0]
    return results[0]


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
