"""A data set as Parquet shards: a few large files instead of a hundred thousand small ones, annotations included.

A folder of shards holds

* ``shard-00000.parquet``, ...: ordinary Parquet files, one row an image: ``image_id``, ``file_name``,
  ``height``, ``width``, ``image`` (the stored file, byte for byte), and the annotations as lists (``annotation_ids``,
  ``category_ids``, ``boxes_xywh``, ``areas``, ``is_crowd``). The categories are in the schema's metadata;
* ``index.parquet``: the same rows without the pixels, and for each image the file, the offset and the length of its
  bytes. In the shards these are neither encoded nor compressed, so that any image can be read alone, by one range of a
  file.

Here they are read; `packing.py` writes them.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from detr_ray.addresses import LocationError, join, parent, resolve
from detr_ray.data.errors import DataError, few, shown
from detr_ray.data.formats.json_records import Records, parse_json, read_categories
from detr_ray.data.index import MOST_PIXELS_A_SIDE, DatasetIndex, ShardPlaces
from detr_ray.locations import read_buffer
from detr_ray.retries import reason_of

INDEX_NAME = "index.parquet"
SHARD_NAME = re.compile(r"shard-\d{5,}\.parquet")
METADATA_KEY = b"detr_ray"
FORMAT = 1
ANNOTATION_COLUMNS = ("annotation_ids", "category_ids", "boxes_xywh", "areas", "is_crowd")


def read_shard_index(location: str) -> DatasetIndex:
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
    content = (table.schema.metadata or {}).get(METADATA_KEY)
    if content is None:
        raise DataError(f"{path}: not an index of shards (its schema has no metadata named 'detr_ray')")
    about = parse_json(path, content)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else about
        raise DataError(f"{path}: shards of format {shown(found)}, this version reads {FORMAT}; write them again")
    return _index_of(ParquetColumns(path, table), about, path, folder)


def _index_of(columns: ParquetColumns, about: dict[str, Any], path: str, folder: str) -> DatasetIndex:
    first_box = columns.offsets("annotation_ids")
    if not all(np.array_equal(first_box, columns.offsets(name)) for name in ANNOTATION_COLUMNS):
        raise DataError(f"{path}: its lists of annotations are of unlike length: write the shards again")
    index = DatasetIndex(
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
    if not isinstance(names, list) or not all(isinstance(name, str) and SHARD_NAME.fullmatch(name) for name in names):
        raise DataError(f"{path}: its list of shards names other files than shards: {shown(names)}")
    return names


def _refuse_contradictions(index: DatasetIndex, path: str) -> None:
    """Refuses columns that contradict each other, although each has the right type."""
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


class ParquetColumns:
    """The columns of one table as arrays of the type that they should have, or an error.

    A table that another program has written may hold nulls, whole numbers of other widths, or text where numbers
    belong. numpy would take all of these, and change some numbers.

    Args:
        location: the file, for messages.
        table: its content.
    """

    def __init__(self, location: str, table: pa.Table) -> None:
        self._location = location
        self._table = table

    def integers(self, name: str) -> np.ndarray:
        """A column of whole numbers as int64."""
        return self._numbers(name, self._column(name))

    def texts(self, name: str) -> pa.StringArray:
        """A column of text."""
        column = self._column(name)
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise self._wrong(name, column.type, "text")
        return self._cast(name, column, pa.string())

    def offsets(self, name: str) -> np.ndarray:
        """Start of each list in the flattened column, and the end of the last list."""
        offsets: np.ndarray = self._lists(name).offsets.to_numpy().astype(np.int64)
        return offsets - offsets[0]

    def listed_integers(self, name: str) -> np.ndarray:
        """The whole numbers of a column of lists, one after the other, as int64."""
        return self._numbers(name, self._lists(name).flatten())

    def listed_floats(self, name: str, width: int = 1) -> np.ndarray:
        """The finite numbers of a column of lists, one after the other, as float64.

        Args:
            name: the column.
            width: numbers of one entry; where it is not 1, entries are lists of so many, and become ``[n, width]``.
        """
        column = self._lists(name).flatten()
        if width > 1:
            if not pa.types.is_fixed_size_list(column.type) or column.type.list_size != width:
                raise self._wrong(name, column.type, f"{width} numbers each")
            column = self._full(name, column).flatten()
        if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
            raise self._wrong(name, column.type, "numbers")
        numbers: np.ndarray = self._cast(name, column, pa.float64()).to_numpy()
        if not np.isfinite(numbers).all():
            raise DataError(f"{self._location}: column {name!r} has NaN or infinity in it: write the shards again")
        return numbers if width == 1 else numbers.reshape(-1, width)

    def listed_flags(self, name: str) -> np.ndarray:
        """The truth values of a column of lists, one after the other, as bool."""
        column = self._lists(name).flatten()
        if not pa.types.is_boolean(column.type):
            raise self._wrong(name, column.type, "true and false")
        flags: np.ndarray = self._full(name, column).to_numpy(zero_copy_only=False)
        return flags

    def _column(self, name: str) -> pa.Array:
        if self._table.column_names.count(name) != 1:
            raise DataError(f"{self._location}: there is no column {name!r}: is this an index that prepare wrote?")
        column = self._table[name].combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # of a table without rows
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        return self._full(name, column)

    def _lists(self, name: str) -> pa.ListArray:
        column = self._column(name)
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise self._wrong(name, column.type, "lists")
        return column

    def _numbers(self, name: str, column: pa.Array) -> np.ndarray:
        if not pa.types.is_integer(column.type):
            raise self._wrong(name, column.type, "whole numbers")
        numbers: np.ndarray = self._cast(name, column, pa.int64()).to_numpy()
        return numbers

    def _cast(self, name: str, column: pa.Array, kind: pa.DataType) -> pa.Array:
        try:
            return pc.cast(self._full(name, column), kind, safe=True)
        except pa.ArrowInvalid as error:
            raise DataError(f"{self._location}: column {name!r} does not fit {kind}: {error}") from error

    def _full(self, name: str, column: pa.Array) -> pa.Array:
        if column.null_count:
            raise DataError(f"{self._location}: column {name!r} has {column.null_count} nulls: write the shards again")
        return column

    def _wrong(self, name: str, found: pa.DataType, wanted: str) -> DataError:
        return DataError(f"{self._location}: column {name!r} is of type {found}, not {wanted}: write the shards again")
