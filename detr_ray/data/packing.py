"""Packing the splits of a data set into one folder of shards, going on where an earlier attempt stopped.

`shards.py` writes one split; here is decided which splits are still to be written, and whether what lies in the folder
may stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from pyarrow.fs import FileType

from detr_ray.data.errors import DataError, few
from detr_ray.data.images import ImageReader
from detr_ray.data.index import CocoIndex
from detr_ray.data.inspection import find_missing_storage
from detr_ray.data.shards import is_unfinished, read_shard_index, write_shards
from detr_ray.locations import file_info, join, list_names, local_path
from detr_ray.retries import reason_of


class CountingReader(ImageReader):
    """An image reader that knows how much it has read, also when several threads use it."""

    def __init__(self, index: CocoIndex) -> None:
        super().__init__(index)
        self._lengths = np.zeros(len(index), np.int64)

    @property
    def num_bytes(self) -> int:
        """Bytes of the images read so far."""
        return int(self._lengths.sum())

    def read(self, i: int) -> bytes:
        """See `ImageReader.read`."""
        data = super().read(i)
        self._lengths[i] = len(data)
        return data


def unpacked_splits(indexes: Mapping[str, CocoIndex], folder: str) -> list[str]:
    """Which splits are still to be packed into ``folder`` (path or URI), where each has a folder of its name.

    Raises:
        DataError: the folder holds something else, or shards of other data.
        OSError: the storage does not answer.
    """
    if file_info(folder).type == FileType.File:
        raise DataError(f"{folder} is a file; give a folder")
    # What lies hidden is being written, or was left by an attempt that was killed: the writer has its say on that.
    strangers = [name for name in list_names(folder) if name not in indexes and name[0] != "."]
    if strangers:
        raise DataError(f"{folder} holds something else ({few(strangers)}): give a new or an empty folder")
    return [split for split, index in indexes.items() if not _is_packed(index, join(folder, split))]


def _is_packed(index: CocoIndex, folder: str) -> bool:
    """Whether a folder holds the shards of this split; False where there is nothing."""
    path = local_path(folder)
    if path is None:
        if is_unfinished(list_names(folder)):
            return False
    elif not path.exists():
        return False
    elif path.is_dir() and not any(path.iterdir()):
        path.rmdir()
        return False
    there = read_shard_index(folder)
    if there.fingerprint != index.fingerprint:
        raise DataError(
            f"{folder} holds shards of other data ({len(there)} images, this split has {len(index)}, or their "
            "annotations differ): delete it, or give another folder"
        )
    faults = find_missing_storage(there)
    if faults:
        raise DataError(f"{folder} is damaged ({few(list(faults.values()), 2)}): delete it and start again")
    return True


def pack_split(
    index: CocoIndex,
    folder: str,
    *,
    shard_megabytes: int,
    progress: Callable[[int, int, int], None] | None = None,
) -> tuple[int, int]:
    """Writes the shards of one split.

    Args:
        index: the split.
        folder: folder to make, or its URI.
        shard_megabytes: a shard is closed once its images have so many MB.
        progress: called with (images done, images in all, bytes of images read) from time to time.

    Returns:
        Bytes of images, and number of shards.

    Raises:
        DataError: see `write_shards`; or the folder cannot be written.
    """
    reader = CountingReader(index)

    def note(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total, reader.num_bytes)

    try:
        write_shards(index, folder, reader, shard_megabytes=shard_megabytes, progress=note)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {reason_of(error)}") from error
    written = read_shard_index(folder)
    assert written.shards is not None, "an index of shards says where they are"
    return reader.num_bytes, len(written.shards.files)
