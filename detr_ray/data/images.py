"""Reads the bytes of stored images: from a folder or from shards, local or remote.

Knows nothing of pixels (see `decoding.py`), of boxes, augmentation or batches.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import pyarrow as pa

from detr_ray.addresses import LocationError, is_remote, join, resolve
from detr_ray.data.errors import DataError
from detr_ray.data.image_headers import ImageError, ImageHeader, read_header
from detr_ray.data.image_places import missing, name_below, refuse_link_outside
from detr_ray.data.index import ShardPlaces, Sources
from detr_ray.data.ranges import OpenFiles, Span, join_parts
from detr_ray.locations import open_location
from detr_ray.printable import printable
from detr_ray.retries import AccessDenied, patiently, reason_of

READS_AT_ONCE = 16
"""Remote reads of one process that are under way at the same time."""

_HEAD_BYTES = 65_536


class StoredImages(Protocol):
    """Where images lie and what they are called; a `DatasetIndex` is one."""

    @property
    def file_names(self) -> pa.StringArray:
        """A name for each."""

    @property
    def images_root(self) -> str | None:
        """Folder or URI that the names are relative to; None where they lie in shards."""

    @property
    def shards(self) -> ShardPlaces | None:
        """Where they lie in shards."""

    @property
    def sources(self) -> Sources | None:
        """The data sets that they are of, where they lie in the folders of several."""

    @property
    def follow_links(self) -> bool:
        """Whether links in the folder may lead out of it."""


@dataclass(frozen=True, slots=True)
class StoredNames:
    """Images in a folder, without anything else: enough to read them."""

    file_names: pa.StringArray
    images_root: str | None
    follow_links: bool
    shards: None = None
    sources: None = None


class ImageReader:
    """Reads the stored bytes of a data set's images, from a folder or from shards, local or remote.

    Holds locations only; files and file systems are opened where it is used, so that it can be sent to other
    processes. One reader may be used by several threads.

    Args:
        index: says where the images lie and what they are called: a `DatasetIndex`.

    Attributes:
        is_remote: whether the images are on another machine; then several reads at a time take about as long as one.
    """

    def __init__(self, index: StoredImages) -> None:
        folders = (index.images_root,) if index.images_root is not None else index.sources and index.sources.folders
        if bool(folders) == (index.shards is not None):
            raise ValueError("an index has its images either in a folder or in shards")
        self._file_names = index.file_names
        # Absolute: the processes that it is sent to may have other working folders.
        self._folders = tuple(resolve(folder) for folder in folders or ())
        self._folder_of = None if index.sources is None else index.sources.of
        self._follow_links = index.follow_links
        self._shards = index.shards
        self._shard_files = OpenFiles(() if index.shards is None else index.shards.files)
        self.is_remote = any(map(is_remote, self._folders if index.shards is None else index.shards.files))

    def name(self, i: int) -> str:
        """What to call image ``i`` in messages: its location, or its file name and its shard; on one line."""
        file_name = self._file_names[i].as_py()
        if self._shards is not None:
            return f"{printable(file_name)} in {self._shards.files[self._shards.file_of[i]]}"
        return printable(join(self._folder(i), file_name))

    def _folder(self, i: int) -> str:
        """The folder that the name of image ``i`` is relative to."""
        return self._folders[0 if self._folder_of is None else int(self._folder_of[i])]

    def read(self, i: int) -> bytes:
        """The encoded bytes of image ``i``.

        Raises:
            ImageError: no such file, not allowed to read it, or a file name that leads out of the images' folder.
            DataError: a shard is missing or ends too early, or the storage failed or refused; the image itself may be
                fine.
        """
        return self._read(i, None)

    def read_many(self, images: Sequence[int]) -> list[Callable[[], bytes]]:
        """Begins to read several images; each of the functions that it returns gives one, or raises, as `read` does.

        Remote images are read in threads, `READS_AT_ONCE` at a time in the process; those that lie near each other in
        a shard are read by one request. Local images are read when the function is called.
        """
        if not self.is_remote:
            return [functools.partial(self.read, i) for i in images]
        if self._shards is None:
            return [_reading_threads().submit(self.read, i).result for i in images]
        places, rows = self._shards, np.asarray(images, np.int64)
        offsets, lengths = places.offsets[rows], places.lengths[rows]
        reads: list[Callable[[], bytes]] = [bytes] * len(rows)
        for span in join_parts(places.file_of[rows], offsets, lengths):
            content = _reading_threads().submit(self._read_span, span, images[span.parts[0]])
            for part in span.parts:
                reads[part] = functools.partial(_cut, content, int(offsets[part]) - span.start, int(lengths[part]))
        return reads

    def read_head(self, i: int, num_bytes: int = _HEAD_BYTES) -> bytes:
        """The first bytes of image ``i``, enough for most headers; all of them where there are no more. See `read`."""
        return self._read(i, num_bytes)

    def read_end(self, i: int, num_bytes: int) -> tuple[int, bytes]:
        """Length and last bytes of image ``i``, which lies on this machine. See `read`."""
        if self._shards is not None:
            length, offset = int(self._shards.lengths[i]), int(self._shards.offsets[i])
            num_bytes = min(num_bytes, length)
            span = Span(int(self._shards.file_of[i]), offset + length - num_bytes, num_bytes, (0,))
            return length, self._read_span(span, i)
        with self._open(i, name_below(self._folder(i), self._file_names[i].as_py())) as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(-min(num_bytes, length), os.SEEK_END)
            return length, file.read()

    def read_header(self, i: int) -> ImageHeader:
        """What the header of image ``i`` says; see `read_header`. Reads little of the file where that is enough."""
        head, name = self.read_head(i), self.name(i)
        is_whole = len(head) < _HEAD_BYTES
        try:
            header = read_header(head, name, is_whole=is_whole)
        except ImageError:
            if is_whole:
                raise
        else:
            if is_whole or header.is_certain:
                return header
        return read_header(self.read(i), name)

    def _read(self, i: int, num_bytes: int | None) -> bytes:
        if self._shards is not None:
            length = int(self._shards.lengths[i])
            wanted = length if num_bytes is None else min(num_bytes, length)
            return self._read_span(Span(int(self._shards.file_of[i]), int(self._shards.offsets[i]), wanted, (0,)), i)
        try:
            return self._read_file(i, num_bytes)
        except AccessDenied as error:  # credentials concern the whole storage, not one image
            raise DataError(f"{self.name(i)}: {reason_of(error)}") from error
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
            raise ImageError(f"{self.name(i)}: {reason_of(error)}") from error
        except LocationError as error:
            raise DataError(str(error)) from error
        except OSError as error:
            raise DataError(f"{self.name(i)}: cannot be read: {reason_of(error)}") from error

    def _read_file(self, i: int, num_bytes: int | None) -> bytes:
        root = self._folder(i)
        name = name_below(root, self._file_names[i].as_py())

        def read_local() -> bytes:
            with self._open(i, name) as file:
                return file.read(-1 if num_bytes is None else num_bytes)

        def read_remote() -> bytes:
            # The name is not made part of an address, where some of its characters could have a meaning.
            file_system, folder = open_location(root)
            with file_system.open_input_file(f"{folder}/{name}") as file:
                return file.read(num_bytes)

        remote = is_remote(root)
        return patiently(self.name(i), read_remote if remote else read_local, remote=remote)

    def _open(self, i: int, name: str) -> IO[bytes]:
        root = self._folder(i)
        try:
            if not self._follow_links:
                refuse_link_outside(root, name, self.name(i))
            return Path(root, name).open("rb")
        except FileNotFoundError as error:
            raise missing(root, name, self.name(i), "no such file") from error
        except UnicodeEncodeError as error:
            raise ImageError(
                f"{self.name(i)}: file names of this machine are {error.encoding}, which lacks characters of this one: "
                "set PYTHONUTF8=1"
            ) from error

    def _read_span(self, span: Span, i: int) -> bytes:
        """A range of a shard that begins with, or is of, image ``i``."""
        try:
            data = self._shard_files.read(span.file, span.start, span.num_bytes)
        except FileNotFoundError as error:
            reason = f" ({reason_of(error)})" if self.is_remote else ""
            raise DataError(f"{self.name(i)}: the shard is missing{reason}") from error
        except OSError as error:
            raise DataError(f"{self.name(i)}: cannot be read: {reason_of(error)}") from error
        if len(data) < span.num_bytes:
            raise DataError(f"{self.name(i)}: the shard ends {span.num_bytes - len(data)} bytes too early")
        return data


def _cut(content: Future[bytes], start: int, num_bytes: int) -> bytes:
    return content.result()[start : start + num_bytes]


@functools.cache
def _reading_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="reading")
