"""Open Images' tables of boxes: one row a box, with the image's id, the class's id and the box in fractions.

Tables are recognised by their header and told apart by their names, as they are downloaded
(``train-annotations-bbox.csv``, ``validation-annotations-bbox.csv``) or exported (``train/labels/detections.csv``).
Images are found by their id, whatever their suffix. Groups of objects (``IsGroupOf``) are crowds. Categories are the
rows of ``class-descriptions-boxable.csv`` (id, name), numbered from 0; without it, the ids of all tables in
alphabetical order.

Source: https://storage.googleapis.com/openimages/web/download_v7.html (the format of the CSV files).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from detr_ray.data.errors import DataError, few, shown
from detr_ray.data.formats.assembly import Gathered, Reading, assemble, refuse_pixels
from detr_ray.data.formats.csv_lines import numbered_rows
from detr_ray.data.formats.folder import Folder, SplitTables, first_line_of, stem
from detr_ray.data.formats.values import at_line, check_class_names, to_number, words_in
from detr_ray.data.index import DatasetIndex
from detr_ray.data.known_folders import SPLIT_NAMES
from detr_ray.printable import printable

NAME = "open_images"
NEEDS = (
    "Open Images: train-annotations-bbox.csv, validation-annotations-bbox.csv and class-descriptions-boxable.csv "
    "beside folders train and validation with images"
)

_SIDES = ("XMin", "YMin", "XMax", "YMax")
_NEEDED = ("ImageID", "LabelName", *_SIDES)
_EXPORTED_TABLE, _EXPORTED_CLASSES = "labels/detections.csv", "metadata/classes.csv"
_DESCRIPTIONS = re.compile(r"class-descriptions.*\.csv$")


@dataclass(frozen=True)
class OpenImagesFolder(SplitTables):
    """A data set in tables of Open Images."""

    def first_image(self, split: str) -> str | None:
        """Name of an image below the folder; None if there is none."""
        root, found = self._images(split)
        known = (found.get(row["ImageID"]) for _, row in _rows(self.folder, self.tables[split]))
        return next((posixpath.join(root, names[0]) for names in known if names), None)

    def read(self, split: str, reading: Reading) -> DatasetIndex:
        """Reads a split into an index.

        Rows of images that are not there are left out and counted: few have all of Open Images.

        Raises:
            DataError: a row that is not what it should be, or no image of the table is there; names file and line.
        """
        table = self.tables[split]
        location = self.folder.location(table)
        categories, listed_in = self._categories()
        root, found = self._images(split)
        is_own = len(self.tables) == 1 or root in _folders(split)
        gathered = Gathered(in_fractions=True)
        image_of: dict[str, int] = {}
        missing: dict[str, None] = {}
        for line, row in _rows(self.folder, table):
            where = at_line(location, line)
            box = _box(row, where)
            if box is not None and row["LabelName"] not in categories:
                raise DataError(
                    f"{where}: class {shown(row['LabelName'])} is not in {printable(listed_in)}: add it there"
                )
            image = row["ImageID"]
            if image not in found:
                missing[image] = None
                continue
            if image not in image_of:
                image_of[image] = gathered.add_image(_only(found[image], image, where))
            if box is not None:
                category_id = categories[row["LabelName"]][0]
                gathered.add_box(image_of[image], category_id, box, row.get("IsGroupOf", "") in ("1", "true", "True"))
        if not image_of:
            raise DataError(
                f"{printable(location)}: none of the {len(missing)} images of the table is in "
                f"{printable(self.folder.location(root))}: an image's file is called as its ImageID "
                f"({few(list(missing), 1)}.jpg)"
            )
        refuse_pixels(gathered, printable(location), "XMin and XMax by the image's width, YMin and YMax by its height")
        gathered.count("labels_without_image", len(missing))
        gathered.count("images_not_annotated", len(found) - len(image_of) if is_own else 0)
        return assemble(
            gathered, categories=tuple(categories.values()), images_root=self.folder.location(root), source=location,
            follow_links=self.folder.follow_links, reading=reading,
        )  # fmt: skip

    def _images(self, split: str) -> tuple[str, dict[str, list[str]]]:
        """The folder of a split's images, and by id the names below it."""
        root = next((place for place in (*_folders(split), "data", "images") if self.folder.images(place)), "")
        found: dict[str, list[str]] = {}
        for image in self.folder.images(root):
            name = posixpath.relpath(image, root) if root else image
            found.setdefault(posixpath.basename(stem(name)), []).append(name)
        return root, found

    def _categories(self) -> tuple[dict[str, tuple[int, str]], str]:
        """By the class's id its number and name, and where they are listed."""
        listed = [name for name in self.folder.names() if _DESCRIPTIONS.search(name)]
        exported = (posixpath.join(posixpath.dirname(table), "..", _EXPORTED_CLASSES) for table in self.tables.values())
        listed += [name for name in map(posixpath.normpath, exported) if self.folder.has(name)]
        if listed:
            location = self.folder.location(listed[0])
            names = _read_descriptions(location, self.folder.text(listed[0]))
        else:
            location = ", ".join(map(self.folder.location, self.tables.values()))
            of_rows = {row["LabelName"] for table in self.tables.values() for _, row in _rows(self.folder, table)}
            names = {name: name for name in sorted(of_rows - {""})}
        check_class_names(list(names.values()), location)
        return {key: (number, name) for number, (key, name) in enumerate(names.items())}, location


def find(folder: Folder) -> OpenImagesFolder | None:
    """The data set that lies in a folder in this format; None if it does not look like it."""
    tables: dict[str, str] = {}
    for split, names in SPLIT_NAMES.items():
        exported = (f"{name}/{_EXPORTED_TABLE}" for name in names)
        of_split = (name for name in folder.names() if name.endswith(".csv") and words_in(name) & set(names))
        found = next((name for name in (*of_split, *exported) if folder.has(name) and is_table(folder, name)), None)
        if found is not None:
            tables[split] = found
    if not tables:
        others = [name for name in folder.names() if name.endswith(".csv") and "test" not in words_in(name)]
        found_others = [name for name in others if is_table(folder, name)]
        if len(found_others) == 1:
            tables["all"] = found_others[0]
    return OpenImagesFolder(folder, tables) if tables else None


def is_table(folder: Folder, name: str) -> bool:
    """Whether a file is a table of Open Images: by its header, or by its name if it is not text, as reading it says."""
    try:
        return set(_NEEDED) <= set(_header(folder.first_line(name)))
    except DataError:
        return name.endswith(("annotations-bbox.csv", _EXPORTED_TABLE))


def _folders(split: str) -> list[str]:
    """Folders that may hold the images of a split and no others."""
    return [
        place
        for name in SPLIT_NAMES.get(split, ())
        for place in (f"{name}/data", f"{name}/images", f"images/{name}", name)
    ]


def _only(names: list[str], image: str, where: str) -> str:
    if len(names) > 1:
        raise DataError(f"{where}: the image {shown(image)} may be {few(names)}: rename or remove one of them")
    return names[0]


def _header(text: str) -> list[str]:
    return [cell.strip() for cell in first_line_of(text).split(",")]


def _rows(folder: Folder, table: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Numbers of the lines of a table, and their values by column."""
    location, text = folder.location(table), folder.text(table)
    header = _header(text)
    for line, cells in islice(numbered_rows(location, text), 1, None):
        if len(cells) != len(header):
            where = at_line(location, line)
            raise DataError(f"{where}: {len(cells)} cells, the header has {len(header)}: complete the row")
        yield line, dict(zip(header, map(str.strip, cells), strict=True))


def _box(row: Mapping[str, str], where: str) -> tuple[float, float, float, float] | None:
    """Left, top, right, bottom of a row as fractions; None of one that only names an image."""
    if not row["ImageID"]:
        raise DataError(f"{where}: no ImageID: fill it in, or take the row out")
    missing = [name for name in _NEEDED if not row[name]]
    if missing == list(_NEEDED[1:]):
        return None
    if missing:
        raise DataError(
            f"{where}: no {', '.join(missing)}: fill in the row, or leave box and class empty where there is no box"
        )
    left, top, right, bottom = (to_number(row[name], where) for name in _SIDES)
    return left, top, right, bottom


def _read_descriptions(location: str, text: str) -> dict[str, str]:
    """Names of classes by their ids, of rows id, name; a header is left out."""
    names: dict[str, str] = {}
    for place, (line, cells) in enumerate(numbered_rows(location, text)):
        if place == 0 and cells[0].strip() == "LabelName":
            continue
        where = at_line(location, line)
        if len(cells) != 2:
            raise DataError(f"{where}: {len(cells)} cells: a row is the class's id, its name")
        if cells[0].strip() in names:
            raise DataError(f"{where}: class {shown(cells[0].strip())} is there twice: remove one of the rows")
        names[cells[0].strip()] = cells[1].strip()
    return names
