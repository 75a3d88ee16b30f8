"""Writes a data set in another format: images byte for byte, annotations with all their ids.

What was written is read back and compared before the folder gets its name.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from detr_ray.addresses import local_path
from detr_ray.data.errors import DataError
from detr_ray.data.formats import coco_writer, shard_folder, yolo_writer
from detr_ray.data.formats.assembly import Reading
from detr_ray.data.formats.recognition import find_data_set
from detr_ray.data.image_groups import in_groups
from detr_ray.data.image_places import name_below
from detr_ray.data.images import READS_AT_ONCE, ImageReader
from detr_ray.data.index import DatasetIndex
from detr_ray.printable import printable

ConversionProgress = Callable[[str, int, int, int], None]
"""Is told of a split, its images written, all of its images, and the bytes written."""

SHARDS = shard_folder.NAME
"""The format that `packing` writes."""

_GROUP_IMAGES = 64
_LOCAL_THREADS = 4


class Writer(Protocol):
    """A module that writes a format."""

    NAME: str

    def image_folder(self, split: str) -> str:
        """The folder of a split's images below the data set's."""

    def write_annotations(self, indexes: Mapping[str, DatasetIndex], folder: Path) -> None:
        """Writes the annotations of all splits into a folder that has the images."""


_WRITERS: tuple[Writer, ...] = (coco_writer, yolo_writer)
WRITTEN = (*(writer.NAME for writer in _WRITERS), SHARDS)
"""The formats that can be written."""


def convert(
    indexes: Mapping[str, DatasetIndex], folder: str, name: str, progress: ConversionProgress | None = None
) -> int:
    """Writes a data set in a format, whole or not at all.

    Args:
        indexes: split -> its index.
        folder: folder to make.
        name: the format, one of `WRITTEN` other than shards.
        progress: called with (split, images written, images in all, bytes of images written) from time to time.

    Returns:
        Bytes of images.

    Raises:
        DataError: the folder exists or cannot be written, or is not on this machine; an image cannot be read; or the
            format cannot hold the data set.
    """
    writer = next(writer for writer in _WRITERS if name == writer.NAME)
    target = local_path(folder)
    if target is None:
        raise DataError(f"{folder}: give a folder of this machine, and upload it; only shards are written into buckets")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target} exists already: give a new or an empty folder")
    partial = target.parent / f".{target.name}.partial"
    named = {split: _with_plain_names(index) for split, index in indexes.items()}
    _make_parents(target)
    try:
        partial.mkdir()
    except FileExistsError as error:
        raise DataError(f"{partial} exists: an attempt was killed, or one is running; delete it") from error
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error}") from error
    try:
        num_bytes = 0
        for split, index in indexes.items():
            place = partial / writer.image_folder(split)
            num_bytes += _copy_images(index, named[split].file_names.to_pylist(), place, split, progress)
        writer.write_annotations(named, partial)
        _compare(named, partial, name)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return num_bytes


def _make_parents(folder: Path) -> None:
    for above in folder.parents:
        if above.is_file():
            raise DataError(f"{above} is a file, not a folder: give another folder than {folder}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error}") from error


def _with_plain_names(index: DatasetIndex) -> DatasetIndex:
    """The index with names that lie below the folder of images: absolute ones are shortened.

    Images of a merged data set get a folder for each of its sources (``1``, ``2``, ...), since the sources may have
    images of equal names.
    """
    names, sources = index.file_names.to_pylist(), index.sources
    if sources is None:
        plain = [name_below(index.images_root or "/", name) for name in names]
    else:
        roots = sources.folders or ("/",) * len(sources.names)
        plain = [f"{k + 1}/{name_below(roots[k], name)}" for name, k in zip(names, sources.of.tolist(), strict=True)]
    return replace(index, file_names=pa.array(plain, pa.string()))


def _copy_images(
    index: DatasetIndex, names: list[str], folder: Path, split: str, progress: ConversionProgress | None
) -> int:
    reader, num_bytes = ImageReader(index), 0

    def copy(i: int) -> int:
        path = folder / names[i]
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.write_bytes(reader.read(i))

    folder.mkdir(parents=True)
    threads = READS_AT_ONCE if reader.is_remote else _LOCAL_THREADS
    for group, sizes in in_groups(copy, range(len(names)), _GROUP_IMAGES, threads, "conversion"):
        num_bytes += sum(sizes)
        if progress is not None:
            progress(split, group[-1] + 1, len(names), num_bytes)
    return num_bytes


def _compare(indexes: Mapping[str, DatasetIndex], folder: Path, name: str) -> None:
    """Makes sure that what was written is the data set.

    Raises:
        DataError: it is not; names what differs.
    """
    for split, index in indexes.items():
        back = find_data_set(str(folder), name, follow_links=False).read(split, Reading())
        if back.fingerprint == index.fingerprint:
            continue
        if back.file_names != index.file_names:
            names = set(index.file_names.to_pylist()) ^ set(back.file_names.to_pylist())
            what = f"names of images such as {printable(min(names, default=''))}"
        elif back.categories != index.categories:
            what = "names of classes"
        else:
            equal = np.array_equal(back.annotation_ids, index.annotation_ids)
            what = "boxes" if equal else "ids of boxes"
        raise DataError(f"{split}: {what} would be others in the format {name}; nothing was written")
