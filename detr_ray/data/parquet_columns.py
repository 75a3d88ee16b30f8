"""Columns of a Parquet table as arrays of exactly the type that they are meant to have, or an error.

A table that another program has written over may hold nulls, whole numbers of other widths, or text where numbers
belong; numpy would take all of them, some as other numbers.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from detr_ray.data.errors import DataError


class ParquetColumns:
    """The columns of one table.

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
        """Where the lists of a column begin in what is flattened of it, and the end of the last one."""
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
