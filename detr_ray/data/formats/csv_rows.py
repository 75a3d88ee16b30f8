"""Tables of boxes: one row a box, with the image's path, left, top, right, bottom in pixels and the class.

With a header, columns are found by their names (those of common exports), else the order is path, x1, y1, x2, y2,
class. A row without box and class is an image without boxes. Categories are the lines of ``classes.txt`` or the rows of
``classes.csv`` (name, number); without one, all names of all tables in alphabetical order, numbered from 0.
"""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from detr_ray.data.errors import DataError, few, shown
from detr_ray.data.formats import open_images
from detr_ray.data.formats.assembly import Gathered, Reading, assemble
from detr_ray.data.formats.csv_lines import numbered_rows
from detr_ray.data.formats.folder import Folder, SplitTables, first_line_of
from detr_ray.data.formats.image_names import ImageFinder, count_unused
from detr_ray.data.formats.values import (
    at_line,
    check_class_names,
    read_class_file,
    splits_in,
    to_number,
    to_size,
    words_in,
)
from detr_ray.data.index import DatasetIndex
from detr_ray.data.known_folders import SPLIT_NAMES
from detr_ray.printable import printable

NAME = "csv"
NEEDS = "CSV: train.csv and val.csv (or one table) with rows of path, x1, y1, x2, y2, class"

CLASS_TABLE = "classes.csv"
_SPLIT_TABLE = "_annotations.csv"
_COLUMNS = {
    "path": (
        "path",
        "filename",
        "file_name",
        "file",
        "image",
        "image_path",
        "img_path",
        "filepath",
        "image_name",
        "image_id",
    ),
    "x1": ("x1", "xmin", "x_min", "left"),
    "y1": ("y1", "ymin", "y_min", "top"),
    "x2": ("x2", "xmax", "x_max", "right"),
    "y2": ("y2", "ymax", "y_max", "bottom"),
    "class": ("class", "label", "class_name", "category", "category_name", "name"),
    "width": ("width", "image_width", "img_width"),
    "height": ("height", "image_height", "img_height"),
}
_ORDER = ("path", "x1", "y1", "x2", "y2", "class")
_MOST_DIGITS = 18  # of a number of 64 bits, whatever they are
_DELIMITERS = (";", "\t", ",")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: number of its line, and its values by column."""

    line: int
    values: dict[str, str]


@dataclass(frozen=True)
class CsvFolder(SplitTables):
    """A data set in tables of paths, boxes and classes."""

    def first_image(self, split: str) -> str | None:
        """Name of an image below the folder; None if there is none."""
        finder = ImageFinder(self.folder, self._bases(split))
        rows = read_rows(self.folder.location(self.tables[split]), self.folder.text(self.tables[split]))
        return next(filter(None, (finder.find(row.values["path"]) for row in rows)), None)

    def read(self, split: str, reading: Reading) -> DatasetIndex:
        """Reads a split into an index.

        Raises:
            DataError: no rows, or one that is not what it should be; names the file and the line.
        """
        table = self.tables[split]
        location = self.folder.location(table)
        rows = list(read_rows(location, self.folder.text(table)))
        boxes = [_box(row.values, at_line(location, row.line)) for row in rows]
        names = _Names(self.folder, self._bases(split), (row.values["path"] for row in rows))
        categories = self._categories()
        ids = {name: category_id for category_id, name in reversed(categories)}
        gathered = Gathered()
        image_of: dict[str, int] = {}
        for row, box in zip(rows, boxes, strict=True):
            where = at_line(location, row.line)
            name, kind = names[row.values["path"]], row.values["class"]
            if name not in image_of:
                image_of[name] = gathered.add_image(name, _size(row.values, where))
            if box is None:
                continue
            if kind not in ids:
                raise DataError(f"{where}: class {shown(kind)} is not in {self._class_source()}: add it there")
            gathered.add_box(image_of[name], ids[kind], box)
        others = [name for other in self.tables if other != split for name in self._images(other)]
        unused = count_unused(self.folder.images(), names.found, others)
        gathered.count("images_not_annotated", unused)
        return assemble(
            gathered, categories=categories, images_root=self.folder.location(names.base), source=location,
            follow_links=self.folder.follow_links, reading=reading,
        )  # fmt: skip

    def _images(self, split: str) -> frozenset[str]:
        """The images that a table names and that are there, below the data set's folder."""
        rows = read_rows(self.folder.location(self.tables[split]), self.folder.text(self.tables[split]))
        return _Names(self.folder, self._bases(split), (row.values["path"] for row in rows)).found

    def _bases(self, split: str) -> list[str]:
        """Folders that the paths of a table may be relative to."""
        above = posixpath.dirname(self.tables[split])
        named = [f"{inner}{name}" for name in SPLIT_NAMES.get(split, ()) for inner in ("images/", "")]
        return [above, posixpath.join(above, "images"), *named, *(f"{name}/images" for name in named)]

    def _categories(self) -> tuple[tuple[int, str], ...]:
        if CLASS_TABLE in self.folder.names():
            return _read_class_table(self.folder.location(CLASS_TABLE), self.folder.text(CLASS_TABLE))
        listed = read_class_file(self.folder)
        if listed is not None:
            return tuple(enumerate(listed[0]))
        names = {
            row.values["class"]
            for table in self.tables.values()
            for row in read_rows(self.folder.location(table), self.folder.text(table))
        }
        names.discard("")
        if not names:
            raise DataError(f"{printable(self.folder.root)}: no row of {few(list(self.tables.values()))} has a class")
        return tuple(enumerate(sorted(names)))

    def _class_source(self) -> str:
        listed = read_class_file(self.folder)
        name = self.folder.location(CLASS_TABLE) if listed is None else listed[1]
        return printable(name)


class _Names:
    """Names, below the data set's folder, of the images that a table names.

    Attributes:
        base: the folder that the names are relative to, below the data set's.
        found: the images that are there, below the data set's folder.
    """

    def __init__(self, folder: Folder, bases: Sequence[str], paths: Iterable[str]) -> None:
        finder = ImageFinder(folder, bases)
        found = {path: finder.find_below(path) for path in dict.fromkeys(paths)}
        self.found = frozenset(posixpath.join(*place) for place in found.values() if place is not None)
        used = {place[0] for place in found.values() if place is not None}
        self.base = used.pop() if len(used) == 1 else ""
        self._names = {
            # The name of a missing image stays; reading the image reports it.
            path: finder.plain(path) if place is None else place[1] if self.base else posixpath.join(*place)
            for path, place in found.items()
        }

    def __getitem__(self, path: str) -> str:
        return self._names[path]


def find(folder: Folder) -> CsvFolder | None:
    """The data set that lies in a folder in this format; None if it does not look like it."""
    others = [name for name in _own_tables(folder) if _is_table(folder, name)]
    tables = {}
    for split, names in SPLIT_NAMES.items():
        places = [place for name in names for place in (f"{name}.csv", f"{name}/{_SPLIT_TABLE}") if folder.has(place)]
        found = [place for place in places if not open_images.is_table(folder, place)]
        named = [name for name in others if splits_in(name) == [split]]  # train_labels.csv
        if found or len(named) == 1:
            tables[split] = (found or named)[0]
    if not tables:
        usual = [name for name in others if name in ("annotations.csv", _SPLIT_TABLE, "labels.csv")]
        only = usual or others
        if len(only) == 1:
            tables["all"] = only[0]
    return CsvFolder(folder, tables) if tables else None


def explain(folder: Folder) -> str:
    """Why the tables in a folder are not taken for a data set; empty if there are none."""
    tables = _own_tables(folder)
    for table in tables:
        try:
            next(read_rows(folder.location(table), folder.text(table)), None)
        except DataError as error:
            return f"{error}."
    if not tables:
        return ""
    if len(tables) == 1:
        return (
            f"{few(tables)} is no table of boxes: such a table begins with a header of {', '.join(_ORDER)}, or with "
            "a row of these 6 cells, the first not empty."
        )
    return f"{few(tables)} may each be the table of all boxes: keep one, or call them train.csv and val.csv."


def _own_tables(folder: Folder) -> list[str]:
    """Tables directly in a folder that may be of boxes to learn."""
    tables = [name for name in folder.names() if name.lower().endswith(".csv") and name != CLASS_TABLE]
    return [name for name in tables if not words_in(name) & {"test", "submission"}]


def _is_table(folder: Folder, table: str) -> bool:
    try:
        first = folder.first_line(table)
    except DataError:  # not text: no table of boxes
        return False
    cells = _cells(first, _delimiter(first))
    is_one = _by_header(cells) is not None or (len(cells) == len(_ORDER) and cells[0].strip() != "")
    return is_one and not open_images.is_table(folder, table)


def read_rows(location: str, text: str) -> Iterator[Row]:
    """The rows of a table.

    Raises:
        DataError: a row with another number of cells than the first, or a table that is not one of boxes.
    """
    first = first_line_of(text)
    if not first:
        raise DataError(f"{printable(location)}: the table is empty")
    columns: dict[str, int] | None = None
    width = 0
    for line, cells in numbered_rows(location, text, _delimiter(first)):
        where = at_line(location, line)
        if columns is None:
            width, columns = len(cells), _by_header(cells)
            if columns is not None:
                continue
            columns = _by_order(cells, where)
        if len(cells) != width:
            raise DataError(f"{where}: {len(cells)} cells, the first row has {width}{_comma_advice(cells, width)}")
        yield Row(line, {name: cells[place].strip() for name, place in columns.items()})


def _by_header(cells: Sequence[str]) -> dict[str, int] | None:
    """Column -> place, of a header; None if it is none."""
    places = _places(cells)
    return places if set(_ORDER) <= places.keys() else None


def _places(cells: Sequence[str]) -> dict[str, int]:
    """Column -> place, of those that a row names."""
    given = [cell.strip().lower().replace(" ", "_") for cell in cells]
    found = {name: next((word for word in words if word in given), None) for name, words in _COLUMNS.items()}
    return {name: given.index(word) for name, word in found.items() if word is not None}


def _by_order(cells: Sequence[str], where: str) -> dict[str, int]:
    if len(cells) > 2 and all(cell.strip()[:1].isalpha() for cell in cells[1:]):
        missing = [name for name in _ORDER if name not in _places(cells)]
        raise DataError(
            f"{where}: a header of other columns ({few(list(map(str.strip, cells)), 12)}), without "
            f"{', '.join(missing)}: the columns are {', '.join(_ORDER)}, where x1, y1 is the left upper corner and x2, "
            "y2 the right lower one, in pixels (x2 = x + width), each in a column of its own"
        )
    if len(cells) != len(_ORDER):
        raise DataError(
            f"{where}: neither a header with {', '.join(_ORDER)} nor a row of these 6 cells, but {len(cells)} "
            f"cells{_comma_advice(cells, len(_ORDER))}"
        )
    return {name: place for place, name in enumerate(_ORDER)}


def _comma_advice(cells: Sequence[str], wanted: int) -> str:
    if len(cells) > wanted and sum(cell.strip().isdigit() for cell in cells) > 4:
        return ": were numbers written with decimal commas? Write decimal points"
    return ": put cells that have the separator in them in quotes"


def _box(values: Mapping[str, str], where: str) -> tuple[float, float, float, float] | None:
    """Left, top, right, bottom of a row; None of one that only names an image."""
    if not values["path"]:
        raise DataError(f"{where}: no path of an image: fill it in, or take the row out")
    given = [values[name] for name in ("x1", "y1", "x2", "y2")]
    if not any(given) and not values["class"]:
        return None
    missing = [name for name in _ORDER[1:] if not values[name]]
    if missing:
        raise DataError(
            f"{where}: no {', '.join(missing)}: fill in the row, or leave box and class empty where there is no box"
        )
    left, top, right, bottom = (to_number(value, where) for value in given)
    return left, top, right, bottom


def _size(values: Mapping[str, str], where: str) -> tuple[int, int] | None:
    """(height, width) where the row states it."""
    return to_size(values.get("height", ""), values.get("width", ""), where)


def _read_class_table(location: str, text: str) -> tuple[tuple[int, str], ...]:
    """Categories of rows name, number."""
    categories = {}
    for place, (line, cells) in enumerate(numbered_rows(location, text, _delimiter(first_line_of(text)))):
        where = at_line(location, line)
        if len(cells) != 2:
            raise DataError(f"{where}: {len(cells)} cells: a row is name, number")
        given = cells[1].strip()
        if place == 0 and not given.isdigit():
            continue  # a header
        if not given.isdecimal() or len(given) > _MOST_DIGITS:
            raise DataError(
                f"{where}: {shown(given)} is not a number of a class, of at most {_MOST_DIGITS} digits: a row is name, "
                "number"
            )
        number = int(given)
        if number in categories:
            raise DataError(f"{where}: class number {number} is there twice: give each class its own")
        categories[number] = cells[0].strip()
    return tuple(zip(categories, check_class_names(list(categories.values()), location), strict=True))


def _delimiter(line: str) -> str:
    return max(_DELIMITERS, key=line.count)


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:  # a cell of more than 128 KiB; reading the table says so
        return []
