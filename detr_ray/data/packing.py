"""Packs a data set into shards: writes the files of one split, and goes on where an earlier attempt stopped.

What a folder of shards holds is said in `formats/shards.py`. Images are copied byte for byte, never decoded.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileType

from detr_ray.addresses import join, local_path, resolve
from detr_ray.data.errors import DataError, few
from detr_ray.data.formats.shards import (
    ANNOTATION_COLUMNS,
    FORMAT,
    INDEX_NAME,
    METADATA_KEY,
    SHARD_NAME,
    read_shard_index,
)
from detr_ray.data.image_groups import in_groups
from detr_ray.data.images import READS_AT_ONCE, ImageReader
from detr_ray.data.index import DatasetIndex
from detr_ray.data.inspection import find_missing_storage
from detr_ray.locations import delete_file, file_info, list_names, make_folder, upload
from detr_ray.retries import reason_of

# Images that are read, held in memory and written at once: one row group.
_GROUP_IMAGES = 64
_READ_THREADS = 8

PackingProgress = Callable[[int, int, int], None]
"""Is told of the images packed, of all, and of the bytes packed."""


def unpacked_splits(indexes: Mapping[str, DatasetIndex], folder: str) -> list[str]:
    """Which splits are still to be packed into ``folder`` (path or URI), where each has a folder of its name.

    Raises:
        DataError: the folder holds something else, or shards of other data.
        OSError: the storage does not answer.
    """
    if file_info(folder).type == FileType.File:
        raise DataError(f"{folder} is a file; give a folder")
    # Hidden folders are being written, or were left by an attempt that was killed: `write_shards` looks at these.
    strangers = [name for name in list_names(folder) if name not in indexes and name[0] != "."]
    if strangers:
        raise DataError(f"{folder} holds something else ({few(strangers)}): give a new or an empty folder")
    return [split for split, index in indexes.items() if not _is_packed(index, join(folder, split))]


def _is_packed(index: DatasetIndex, folder: str) -> bool:
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


def write_shards(
    index: DatasetIndex,
    out_dir: str | Path,
    *,
    shard_megabytes: int = 256,
    progress: PackingProgress | None = None,
) -> tuple[int, int]:
    """Writes a data set as Parquet shards, whole or not at all.

    On a local disk, the files are made in ``.NAME.partial`` beside ``out_dir``; the folder is renamed when everything
    is written and every image has been read back. For remote storage, each file is made on this machine and then
    uploaded, the index last: a folder without an index is no folder of shards. The same data set and the same library
    versions give the same bytes.

    Args:
        index: the data set.
        out_dir: folder to make, or its URI.
        shard_megabytes: a shard is closed once its images have this size in MB.
        progress: called with (images written, images in all, bytes of images written) after each row group.

    Returns:
        Bytes of images, and number of shards.

    Raises:
        DataError: ``out_dir`` exists, is being written already, holds something else or cannot be written; an image is
            missing.
    """
    if shard_megabytes < 1:
        raise DataError(f"shard_megabytes={shard_megabytes}: has to be at least 1")
    folder = local_path(str(out_dir))
    try:
        if folder is None:
            return _write_remote(index, resolve(str(out_dir)), shard_megabytes * 10**6, progress)
        return _write_local(index, folder, shard_megabytes * 10**6, progress)
    except OSError as error:
        raise DataError(f"{out_dir} cannot be written: {reason_of(error)}") from error


def _write_local(
    index: DatasetIndex, folder: Path, shard_bytes: int, progress: PackingProgress | None
) -> tuple[int, int]:
    if folder.exists():
        raise DataError(f"{folder} exists already: delete it or give another folder")
    partial = folder.parent / f".{folder.name}.partial"
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
    except FileExistsError as error:
        raise DataError(
            f"{partial} exists: another process is writing these shards, or one was killed while it did. If none runs, "
            "delete that folder and start again"
        ) from error
    try:
        written = _write_all(index, partial, shard_bytes, progress, finished=lambda path: None)
        partial.rename(folder)
        return written
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_unfinished(names: Collection[str]) -> bool:
    """Whether a folder with these names was left by a writer that was killed, and may be written again."""
    return all(SHARD_NAME.fullmatch(name) for name in names)


def _write_remote(
    index: DatasetIndex, folder: str, shard_bytes: int, progress: PackingProgress | None
) -> tuple[int, int]:
    """Writes shards to remote storage, where no folder can be renamed: the index, written last, marks them as whole."""
    before = list_names(folder)
    if not is_unfinished(before):
        raise DataError(f"{folder} exists already ({few(before)}): delete it or give another folder")
    uploaded: list[str] = []

    def take_away(path: Path) -> None:
        uploaded.append(path.name)
        upload(path, join(folder, path.name))
        path.unlink()

    try:
        make_folder(folder)
        # One shard at a time lies on this machine.
        with tempfile.TemporaryDirectory(prefix="shards-") as scratch:
            written = _write_all(index, Path(scratch), shard_bytes, progress, finished=take_away)
    except BaseException:
        with contextlib.suppress(OSError):
            for name in uploaded[::-1]:
                delete_file(join(folder, name))
        raise
    for name in set(before) - set(uploaded):
        delete_file(join(folder, name))
    return written


def _write_all(
    index: DatasetIndex,
    folder: Path,
    shard_bytes: int,
    progress: PackingProgress | None,
    finished: Callable[[Path], None],
) -> tuple[int, int]:
    """Writes the shards and then their index into an empty folder; ``finished`` gets each, and may take it away."""
    reader, num_bytes = ImageReader(index), 0

    def note(done: int, new_bytes: int) -> None:
        nonlocal num_bytes
        num_bytes += new_bytes
        if progress is not None:
            progress(done, len(index), num_bytes)

    about: dict[str, Any] = {
        "format": FORMAT,
        "categories": [{"id": category_id, "name": name} for category_id, name in index.categories],
    }
    rows = _rows(index)
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    while len(places) < len(index):
        name = f"shard-{len(names):05d}.parquet"
        groups = _read_groups(reader, len(places), len(index), shard_bytes, note)
        _write_shard(folder / name, rows.replace_schema_metadata(_metadata(about)), groups)
        places += [(len(names), offset, length) for offset, length in _find_images(folder / name)]
        names.append(name)
        finished(folder / name)

    shard, offset, length = np.array(places, np.int64).reshape(-1, 3).T
    table = rows.append_column("shard", pa.array(shard, pa.int32()))
    table = table.append_column("offset", pa.array(offset)).append_column("length", pa.array(length))
    about |= {"shards": names, "problems": index.problems}
    pq.write_table(table.replace_schema_metadata(_metadata(about)), folder / INDEX_NAME, compression="zstd")
    if read_shard_index(str(folder)).fingerprint != index.fingerprint:
        raise RuntimeError("the index of the shards that were written differs from the data set's")
    finished(folder / INDEX_NAME)
    return num_bytes, len(names)


def _metadata(about: dict[str, Any]) -> dict[bytes, bytes]:
    return {METADATA_KEY: json.dumps(about).encode()}


def _rows(index: DatasetIndex) -> pa.Table:
    """A table of all columns without the pixels, one row an image."""
    offsets = pa.array(index.first_box, pa.int32())
    boxes = pa.FixedSizeListArray.from_arrays(pa.array(index.boxes_xywh_px.reshape(-1)), 4)
    values = (index.annotation_ids, index.category_ids, boxes, index.areas, index.is_crowd)
    columns: dict[str, pa.Array] = {
        "image_id": pa.array(index.image_ids),
        "file_name": index.file_names,
        "height": pa.array(index.heights),
        "width": pa.array(index.widths),
    }
    for name, column in zip(ANNOTATION_COLUMNS, values, strict=True):
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(column) if column is not boxes else boxes)
    return pa.table(columns)


def _read_groups(
    reader: ImageReader, start: int, end: int, most_bytes: int, note: Callable[[int, int], None]
) -> Iterator[tuple[int, list[bytes]]]:
    """Stored images from ``start`` on, in groups of (first image, their bytes), until they have ``most_bytes``.

    After each group, ``note`` gets the number of images done and the bytes of the group.
    """
    num_bytes = 0
    threads = READS_AT_ONCE if reader.is_remote else _READ_THREADS
    for group, images in in_groups(reader.read, range(start, end), _GROUP_IMAGES, threads, "packing"):
        yield group[0], images
        group_bytes = sum(map(len, images))
        num_bytes += group_bytes
        note(group[-1] + 1, group_bytes)
        if num_bytes >= most_bytes:
            return


def _write_shard(path: Path, rows: pa.Table, groups: Iterable[tuple[int, list[bytes]]]) -> None:
    """One Parquet file with one row group a group of images."""
    image_field = pa.field("image", pa.large_binary(), nullable=False)
    writer = pq.ParquetWriter(
        path,
        rows.schema.append(image_field),
        compression="none",
        use_dictionary=False,
        # Statistics would repeat whole images in the file's footer; pages end after each image that fills them.
        write_statistics=False,
        write_batch_size=1,
    )
    with writer:
        for start, images in groups:
            group = rows.slice(start, len(images))
            writer.write_table(group.append_column(image_field, pa.array(images, pa.large_binary())))


def _find_images(path: Path) -> Iterator[tuple[int, int]]:
    """Offset and length of each image's bytes in a shard.

    No public interface tells the position of a value in the file. So the file is searched for the bytes that Parquet
    gives, which also proves that they can be read back.
    """
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        pq.ParquetFile(path) as shard,
    ):
        column = shard.schema_arrow.get_field_index("image")
        for group in range(shard.num_row_groups):
            about = shard.metadata.row_group(group).column(column)
            place, end = about.data_page_offset, about.data_page_offset + about.total_compressed_size
            for image in shard.read_row_group(group, columns=["image"])["image"]:
                stored = image.as_py()
                # A plain byte array is its length in four bytes, and then the bytes.
                found = content.find(len(stored).to_bytes(4, "little") + stored, place, end)
                if found < 0:
                    raise RuntimeError(f"{path}: the bytes of an image are not in the file as they are")
                yield found + 4, len(stored)
                place = found + 4 + len(stored)
