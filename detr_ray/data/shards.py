"""COCO data as Parquet shards: a few large files instead of a hundred thousand small ones, annotations included.

A folder of shards holds

* ``shard-00000.parquet``, ...: ordinary Parquet files, one row an image: ``image_id``, ``file_name``,
  ``height``, ``width``, ``image`` (the stored file, byte for byte), and the annotations as lists (``annotation_ids``,
  ``category_ids``, ``boxes_xywh``, ``areas``, ``is_crowd``). The categories are in the schema's metadata;
* ``index.parquet``: the same rows without the pixels, and for each image the file, the offset and the length of its
  bytes. They lie in the shards as they are (plain, uncompressed), so that one image is one ranged read, in any order.

Knows nothing of decoding: bytes go in, bytes come out.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from detr_ray.data.coco_json import MOST_PIXELS_A_SIDE, read_categories
from detr_ray.data.errors import DataError, few, shown
from detr_ray.data.images import READS_AT_ONCE, ImageReader
from detr_ray.data.index import CocoIndex, ShardPlaces
from detr_ray.data.json_text import parse_json
from detr_ray.data.parquet_columns import ParquetColumns
from detr_ray.data.records import Records
from detr_ray.locations import (
    LocationError,
    delete_file,
    join,
    list_names,
    local_path,
    make_folder,
    parent,
    read_buffer,
    resolve,
    upload,
)
from detr_ray.retries import reason_of

INDEX_NAME = "index.parquet"

_SHARD_NAME = re.compile(r"shard-\d{5,}\.parquet")
_METADATA_KEY = b"detr_ray"
_FORMAT = 1
# Images that are read, held in memory and written at once: one row group.
_GROUP_IMAGES = 64
_READ_THREADS = 8
_ANNOTATION_COLUMNS = ("annotation_ids", "category_ids", "boxes_xywh", "areas", "is_crowd")


def write_shards(
    index: CocoIndex,
    out_dir: str | Path,
    reader: ImageReader | None = None,
    *,
    shard_megabytes: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a data set as Parquet shards, whole or not at all.

    On a disk, the files are made in ``.NAME.partial`` beside ``out_dir`` and get their name when everything is written
    and every image has been read back. Elsewhere, each is made on this machine and then uploaded, the index last: what
    has no index is no folder of shards. The same data set and the same library versions give the same bytes.

    Args:
        index: the data set.
        out_dir: folder to make, or its URI.
        reader: reads its images; the index's own by default.
        shard_megabytes: a shard is closed once its images have so many MB.
        progress: called with (images written, images in all) after each row group.

    Raises:
        DataError: ``out_dir`` exists, is being written already, or holds something else; an image is missing.
        OSError: it cannot be written.
    """
    if shard_megabytes < 1:
        raise DataError(f"shard_megabytes={shard_megabytes}: has to be at least 1")
    reader = reader or ImageReader(index)
    folder = local_path(str(out_dir))
    if folder is None:
        _write_remote(index, reader, resolve(str(out_dir)), shard_megabytes * 10**6, progress)
        return
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
        _write_all(index, reader, partial, shard_megabytes * 10**6, progress, finished=lambda path: None)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_unfinished(names: Collection[str]) -> bool:
    """Whether a folder with these names in it is what a writer left that was killed, and may be written again."""
    return all(_SHARD_NAME.fullmatch(name) for name in names)


def _write_remote(
    index: CocoIndex,
    reader: ImageReader,
    folder: str,
    shard_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Writes shards to where there are no folders to rename: the index, which is written last, makes them whole."""
    before = list_names(folder)
    if not is_unfinished(before):
        raise DataError(f"{folder} exists already ({few(before)}): delete it or give another folder")
    written: list[str] = []

    def take_away(path: Path) -> None:
        written.append(path.name)
        upload(path, join(folder, path.name))
        path.unlink()

    try:
        make_folder(folder)
        # One shard at a time lies on this machine.
        with tempfile.TemporaryDirectory(prefix="shards-") as scratch:
            _write_all(index, reader, Path(scratch), shard_bytes, progress, finished=take_away)
    except BaseException:
        with contextlib.suppress(OSError):
            for name in written[::-1]:
                delete_file(join(folder, name))
        raise
    for name in set(before) - set(written):
        delete_file(join(folder, name))


def read_shard_index(location: str) -> CocoIndex:
    """Reads the index of a folder of shards.

    Args:
        location: the folder (path or URI) that `write_shards` made, or its ``index.parquet``.

    Raises:
        DataError: no such folder, or what lies there is not an index of shards.
    """
    folder = resolve(location)
    if folder.partition("?")[0].endswith(f"/{INDEX_NAME}"):
        folder = parent(folder)
    path = join(folder, INDEX_NAME)
    try:
        table = pq.ParquetFile(pa.BufferReader(read_buffer(path))).read()
    except FileNotFoundError as error:
        reason = reason_of(error)
        raise DataError(f"{path}: {reason}. Is {folder} a folder that `prepare` wrote shards into?") from error
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be read: {reason_of(error)}") from error
    except LocationError as error:
        raise DataError(str(error)) from error
    content = (table.schema.metadata or {}).get(_METADATA_KEY)
    if content is None:
        raise DataError(f"{path}: not an index of shards (its schema has no metadata named 'detr_ray')")
    about = parse_json(path, content)
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        found = about.get("format") if isinstance(about, dict) else about
        raise DataError(f"{path}: shards of format {shown(found)}, this version reads {_FORMAT}; write them again")
    return _index_of(ParquetColumns(path, table), about, path, folder)


def _index_of(columns: ParquetColumns, about: dict[str, Any], path: str, folder: str) -> CocoIndex:
    first_box = columns.offsets("annotation_ids")
    if not all(np.array_equal(first_box, columns.offsets(name)) for name in _ANNOTATION_COLUMNS):
        raise DataError(f"{path}: its lists of annotations are of unlike length: write the shards again")
    index = CocoIndex(
        image_ids=columns.integers("image_id"),
        heights=_sides(columns, "height", path),
        widths=_sides(columns, "width", path),
        file_names=columns.texts("file_name"),
        first_box=first_box,
        boxes_xywh_px=columns.listed_floats("boxes_xywh", width=4),
        category_ids=columns.listed_integers("category_ids"),
        areas=columns.listed_floats("areas"),
        is_crowd=columns.listed_flags("is_crowd"),
        annotation_ids=columns.listed_integers("annotation_ids"),
        categories=read_categories(Records(path, "category", about.get("categories") or [])),
        source=folder,
        shards=ShardPlaces(
            files=tuple(join(folder, name) for name in _shard_names(about, path)),
            file_of=columns.integers("shard"),
            offsets=columns.integers("offset"),
            lengths=columns.integers("length"),
        ),
        problems=about.get("problems") or {},
    )
    _refuse_contradictions(index, path)
    return index


def _sides(columns: ParquetColumns, name: str, path: str) -> np.ndarray:
    sides = columns.integers(name)
    if len(sides) and not 1 <= sides.min() <= sides.max() <= MOST_PIXELS_A_SIDE:
        raise DataError(f"{path}: column {name!r} has sizes that no image has: write the shards again")
    return sides


def _shard_names(about: dict[str, Any], path: str) -> list[str]:
    names = about.get("shards")
    if not isinstance(names, list) or not all(isinstance(name, str) and _SHARD_NAME.fullmatch(name) for name in names):
        raise DataError(f"{path}: its list of shards names other files than shards: {shown(names)}")
    return names


def _refuse_contradictions(index: CocoIndex, path: str) -> None:
    """Refuses columns that are each of the right type and don't fit together."""
    places = index.shards
    assert places is not None
    known = [category_id for category_id, _ in index.categories]
    faults = {
        "no image": len(index) == 0,
        "images twice, or not by rising id": (np.diff(index.image_ids) <= 0).any(),
        "boxes of unknown categories": not np.isin(index.category_ids, known).all(),
        "images in no shard": ((places.file_of < 0) | (places.file_of >= len(places.files))).any(),
        "places before the beginning of a shard": ((places.offsets < 0) | (places.lengths < 0)).any(),
    }
    found = [fault for fault, is_there in faults.items() if is_there]
    if found:
        raise DataError(f"{path}: contradicts itself ({few(found)}): write the shards again")


def _write_all(
    index: CocoIndex,
    reader: ImageReader,
    folder: Path,
    shard_bytes: int,
    progress: Callable[[int, int], None] | None,
    finished: Callable[[Path], None],
) -> None:
    """Writes the shards and then their index into an empty folder; ``finished`` gets each, and may take it away."""
    about: dict[str, Any] = {
        "format": _FORMAT,
        "categories": [{"id": category_id, "name": name} for category_id, name in index.categories],
    }
    rows = _rows(index)
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    while len(places) < len(index):
        name = f"shard-{len(names):05d}.parquet"
        groups = _read_groups(reader, len(places), len(index), shard_bytes, progress)
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


def _metadata(about: dict[str, Any]) -> dict[bytes, bytes]:
    return {_METADATA_KEY: json.dumps(about).encode()}


def _rows(index: CocoIndex) -> pa.Table:
    """All but the pixels: one row an image."""
    offsets = pa.array(index.first_box, pa.int32())
    boxes = pa.FixedSizeListArray.from_arrays(pa.array(index.boxes_xywh_px.reshape(-1)), 4)
    values = (index.annotation_ids, index.category_ids, boxes, index.areas, index.is_crowd)
    columns: dict[str, pa.Array] = {
        "image_id": pa.array(index.image_ids),
        "file_name": index.file_names,
        "height": pa.array(index.heights),
        "width": pa.array(index.widths),
    }
    for name, column in zip(_ANNOTATION_COLUMNS, values, strict=True):
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(column) if column is not boxes else boxes)
    return pa.table(columns)


def _read_groups(
    reader: ImageReader, start: int, end: int, most_bytes: int, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[int, list[bytes]]]:
    """Stored images from ``start`` on, in groups of (first image, their bytes), until they have ``most_bytes``."""
    num_bytes = 0
    with ThreadPoolExecutor(READS_AT_ONCE if reader.is_remote else _READ_THREADS) as pool:
        while start < end and num_bytes < most_bytes:
            images = list(pool.map(reader.read, range(start, min(start + _GROUP_IMAGES, end))))
            yield start, images
            start += len(images)
            num_bytes += sum(len(image) for image in images)
            if progress is not None:
                progress(start, end)


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
    """Offset and length of each image's bytes in a shard, found by the bytes that Parquet gives for it."""
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
