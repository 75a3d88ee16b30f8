"""Reads and writes files at locations: local paths, or URIs that pyarrow supports (``s3://``, ``gs://``, ``hdfs://``).

Credentials come from the environment (``AWS_ACCESS_KEY_ID``, a profile, the machine's role), never from an address.
Each process opens its own file systems; processes exchange locations only. Every operation is repeated after temporary
errors; see `retries.py`.

An S3 address may end in ``?region=...&endpoint_override=host:port&scheme=http``. The environment variables
``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``, ``AWS_REGION`` and ``AWS_DEFAULT_REGION`` set the same for all addresses.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote

import pyarrow as pa
from pyarrow import fs

from detr_ray.addresses import (
    LocationError,
    check_address,
    is_object_store,
    is_remote,
    local_path,
    name_of,
    parent,
    scheme_of,
    with_suffix,
)
from detr_ray.retries import PATIENT, Patience, patiently

T = TypeVar("T")

S3_ATTEMPTS = 3
"""Attempts of one request inside the S3 client. Afterwards the whole operation is repeated."""
CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 20.0
"""A request fails if the server sends nothing for this time."""

_S3_OPTIONS = frozenset({"region", "endpoint_override", "scheme"})
_PART_BYTES = 64 << 20
_PARALLEL_PARTS = 4


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file in a listing.

    Attributes:
        name: path relative to the listed folder, with ``/`` between its parts.
        num_bytes: size.
        changed: time of the last change in nanoseconds; 0 if the storage does not report it.
    """

    name: str
    num_bytes: int
    changed: int


def open_location(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a location, and the path on it.

    Raises:
        LocationError: the address has no supported file system, or contains credentials.
        OSError: the region of an S3 bucket could not be found out.
    """
    check_address(location)
    path = local_path(location)
    if path is not None:
        return _local_file_system(), str(path)
    if scheme_of(location) == "s3":
        return _open_s3(location)
    folder, name = _split(location)
    try:
        # Opened by folder, so that all files of a folder share one client.
        file_system, path_of_folder = _from_uri(folder)
    except (ValueError, OSError, NotImplementedError) as error:
        raise LocationError(f"{location}: no file system for this address: {error}") from error
    return file_system, f"{path_of_folder.rstrip('/')}/{name}" if name else path_of_folder


def _split(location: str) -> tuple[str, str]:
    """URI of the folder, and name in it; the name is empty if there is no folder above."""
    address = location.partition("?")[0].rstrip("/")
    return (parent(location), name_of(location)) if address.count("/") > 2 else (location, "")


@functools.cache
def _local_file_system() -> fs.FileSystem:
    return fs.LocalFileSystem()


@functools.lru_cache(maxsize=128)
def _from_uri(location: str) -> tuple[fs.FileSystem, str]:
    address, _, options = location.partition("?")
    if scheme_of(location) in ("gs", "gcs") and "retry_limit_seconds" not in options:
        options = f"{options}&retry_limit_seconds=60".lstrip("&")
    return fs.FileSystem.from_uri(f"{address}?{options}" if options else address)


def _open_s3(location: str) -> tuple[fs.FileSystem, str]:
    address, _, query = location.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(options.keys() - _S3_OPTIONS)
    if unknown:
        raise LocationError(
            f"{address}: unknown option {unknown[0]!r} in the address; known are {', '.join(sorted(_S3_OPTIONS))}"
        )
    path = unquote(address.partition("://")[2]).rstrip("/")
    bucket = path.partition("/")[0]
    if not bucket:
        raise LocationError(f"{address}: names no bucket")
    endpoint = options.get("endpoint_override") or _first_set("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    region = options.get("region") or _first_set("AWS_REGION", "AWS_DEFAULT_REGION")
    if region is None:
        # The region of a bucket can only be queried at Amazon's own servers.
        region = _region_of(bucket) if endpoint is None else "us-east-1"
    return _s3_file_system(endpoint, region, options.get("scheme"), os.environ.get("AWS_ACCESS_KEY_ID")), path


def _first_set(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


@functools.lru_cache(maxsize=64)
def _region_of(bucket: str) -> str:
    return fs.resolve_s3_region(bucket)


@functools.lru_cache(maxsize=16)
def _s3_file_system(endpoint: str | None, region: str, scheme: str | None, key_id: str | None) -> fs.FileSystem:
    """A client. It reads the credentials from the environment; ``key_id`` is only part of the cache key."""
    return fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        scheme=scheme,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=SILENCE_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
        allow_delayed_open=True,  # a small object is then one request instead of three
    )


def at(location: str, operation: Callable[[fs.FileSystem, str], T], patience: Patience = PATIENT) -> T:
    """Calls an operation with file system and path, repeated after temporary errors (see `patiently`)."""
    return patiently(
        location, lambda: operation(*open_location(location)), remote=is_remote(location), patience=patience
    )


def read_buffer(location: str, num_bytes: int | None = None, patience: Patience = PATIENT) -> pa.Buffer:
    """The whole content of a file.

    Args:
        location: the file.
        num_bytes: its size, if known: then large remote files are read in several parts in parallel, and a shorter
            file is an error.
        patience: limits of repetition.

    Raises:
        NoSuchObject: there is no such file.
        AccessDenied: reading is not permitted.
        OSError: the file cannot be read.
    """
    if num_bytes is not None and num_bytes > _PART_BYTES and is_remote(location):
        parts = [(start, min(_PART_BYTES, num_bytes - start)) for start in range(0, num_bytes, _PART_BYTES)]
        content = bytearray(num_bytes)

        def fetch(part: tuple[int, int]) -> None:
            content[part[0] : sum(part)] = read_range(location, *part)

        with ThreadPoolExecutor(_PARALLEL_PARTS) as pool:
            list(pool.map(fetch, parts))
        return pa.py_buffer(content)

    def read(file_system: fs.FileSystem, path: str) -> pa.Buffer:
        with file_system.open_input_file(path) as file:
            data = file.read_buffer()
        if num_bytes is not None and data.size < num_bytes:
            raise OSError(f"{data.size} of {num_bytes} bytes came")
        return data

    return at(location, read, patience)


def read_bytes(location: str, patience: Patience = PATIENT) -> bytes:
    """The whole content of a file; see `read_buffer`."""
    return read_buffer(location, patience=patience).to_pybytes()


def read_range(location: str, start: int, num_bytes: int) -> bytes:
    """``num_bytes`` bytes of a file from ``start`` on.

    Raises:
        OSError: see `read_buffer`; or the file is too short.
    """

    def read(file_system: fs.FileSystem, path: str) -> bytes:
        with file_system.open_input_file(path) as file:
            data = file.read_at(num_bytes, start)
        if len(data) < num_bytes:
            raise OSError(f"{len(data)} of {num_bytes} bytes came")
        return data

    return at(location, read)


def write_bytes(location: str, data: bytes, patience: Patience = PATIENT) -> None:
    """Writes a file atomically: readers see the old or the new content. Creates the folders above it.

    Raises:
        OSError: it could not be written.
    """
    if is_object_store(location):
        # Uploading an object is atomic already; moving it would copy it.
        write(location, lambda stream: stream.write(data), patience)
        return
    make_folder(parent(location))
    temporary = with_suffix(location, f".{secrets.token_hex(4)}.tmp")
    try:
        write(temporary, lambda stream: stream.write(data), patience)
        at(location, lambda file_system, path: file_system.move(open_location(temporary)[1], path), patience)
    except BaseException:
        with contextlib.suppress(OSError):
            delete_file(temporary)
        raise
    sync(parent(location))


def write(location: str, fill: Callable[[Any], T], patience: Patience = PATIENT) -> T:
    """Writes a file as a stream. After a failure, an incomplete file may be left.

    Args:
        location: the file. Its folder must exist, except in a bucket.
        fill: writes the content into a binary stream; called again for each attempt.
        patience: limits of repetition.

    Returns:
        What ``fill`` returned.
    """

    def attempt(file_system: fs.FileSystem, path: str) -> T:
        with file_system.open_output_stream(path) as stream:
            return fill(stream)

    result = at(location, attempt, patience)
    sync(location)
    return result


def sync(location: str) -> None:
    """Flushes a local file, or the names in a local folder, to the disk. Does nothing for remote locations."""
    path = local_path(location)
    if path is None:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(location: str, patience: Patience = PATIENT) -> None:
    """Creates a folder and the folders above it. Does nothing in a bucket, which has no folders."""
    if not is_object_store(location):
        at(location, lambda file_system, path: file_system.create_dir(path, recursive=True), patience)


def file_info(location: str, patience: Patience = PATIENT) -> fs.FileInfo:
    """Type and size of a file or folder; type NotFound if there is none."""
    return at(location, lambda file_system, path: file_system.get_file_info(path), patience)


def list_files(location: str, patience: Patience = PATIENT) -> list[StoredFile]:
    """All files below a folder, sorted by name; none if there is no such folder. One request in a bucket."""

    def look(file_system: fs.FileSystem, path: str) -> list[StoredFile]:
        selector = fs.FileSelector(path, allow_not_found=True, recursive=True)
        return [
            StoredFile(str(PurePosixPath(info.path).relative_to(path)), info.size, info.mtime_ns or 0)
            for info in file_system.get_file_info(selector)
            if info.type == fs.FileType.File
        ]

    return sorted(at(location, look, patience), key=lambda file: file.name)


def list_names(location: str) -> list[str]:
    """Sorted names of the files and folders in a folder; none if there is no such folder."""

    def look(file_system: fs.FileSystem, path: str) -> list[str]:
        return [info.base_name for info in file_system.get_file_info(fs.FileSelector(path, allow_not_found=True))]

    return sorted(at(location, look))


def upload(path: Path, location: str) -> None:
    """Copies a local file to a location; see `write`."""

    def fill(stream: Any) -> None:
        with path.open("rb") as file:
            shutil.copyfileobj(file, stream, 4 << 20)

    write(location, fill)


def download(location: str, path: Path, patience: Patience = PATIENT) -> None:
    """Copies a file to a local path.

    Raises:
        OSError: see `read_buffer`.
    """

    def fetch(file_system: fs.FileSystem, source: str) -> None:
        with file_system.open_input_stream(source) as stream, path.open("wb") as file:
            shutil.copyfileobj(stream, file, 4 << 20)

    at(location, fetch, patience)


def delete_file(location: str, patience: Patience = PATIENT) -> None:
    """Deletes a file, if it exists."""
    with contextlib.suppress(FileNotFoundError):
        at(location, lambda file_system, path: file_system.delete_file(path), patience)


def delete_folder(location: str, patience: Patience = PATIENT) -> None:
    """Deletes a folder with its content, if it exists."""
    with contextlib.suppress(FileNotFoundError):
        at(location, lambda file_system, path: file_system.delete_dir(path), patience)
