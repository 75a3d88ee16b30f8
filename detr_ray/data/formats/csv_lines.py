"""Rows of CSV files with the numbers of their lines, or an error that names file and line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from detr_ray.data.errors import DataError
from detr_ray.data.formats.values import at_line


def numbered_rows(location: str, text: str, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Number of the last line of each row that is not blank, and its cells.

    Args:
        location: path or URI of the file, for messages.
        text: its content.
        delimiter: between cells.

    Raises:
        DataError: a row is not CSV.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                yield reader.line_num, cells
    except csv.Error as error:
        raise DataError(f"{at_line(location, reader.line_num)}: not CSV: {error}") from error
