"""Recognises the format of a data set by the files in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, Protocol

from pyarrow.fs import FileType

from detr_ray.addresses import LocationError
from detr_ray.data.errors import DataError, UnlistedError, few
from detr_ray.data.formats import coco_folder, csv_rows, open_images, shard_folder, voc, yolo
from detr_ray.data.formats.assembly import Reading
from detr_ray.data.formats.folder import Folder
from detr_ray.data.formats.unrecognised import hint
from detr_ray.data.index import DatasetIndex
from detr_ray.locations import file_info
from detr_ray.printable import printable
from detr_ray.retries import reason_of


class DataSet(Protocol):
    """A data set that was found in a folder.

    A split is ``train``, ``val``, or ``all`` where the images are not divided.
    """

    @property
    def splits(self) -> Sequence[str]:
        """Which splits there are."""

    def read(self, split: str, reading: Reading) -> DatasetIndex:
        """Reads a split."""

    def first_image(self, split: str) -> str | None:
        """Name of an image, or of a file with images, below the folder; None if there is none."""


class Format(Protocol):
    """A module that reads a format."""

    NAME: str
    NEEDS: str

    def find(self, folder: Folder) -> DataSet | None:
        """The data set that lies in a folder in this format; None if it does not look like it."""


_FORMATS: tuple[Format, ...] = (coco_folder, shard_folder, yolo, voc, csv_rows, open_images)
NAMES = tuple(known.NAME for known in _FORMATS)
_MOST_FOLDERS = 20
"""So many are looked into for a data set, where there is none in `data.root` itself."""


def find_data_set(root: str, name: str | None, follow_links: bool) -> DataSet:
    """The data set in a folder.

    Args:
        root: path or URI of the folder.
        name: its format; None: it is recognised by its files.
        follow_links: whether links in it may lead out of it.

    Raises:
        DataError: it is in none of the formats, or looks like several; says what each needs; or it cannot be listed.
    """
    folder = Folder(root, follow_links)
    try:
        names = folder.names()  # first, so that it is the root that is named
    except UnlistedError as error:
        raise UnlistedError(f"{error}; data.train.annotations and data.train.images need no listing") from error
    if name is not None:
        return _of_format(folder, name)
    found = _recognised(folder)
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise DataError(
            f"{printable(root)} looks like {' and '.join(found)}: say which it is by data.format={next(iter(found))}, "
            "or remove what is of the other format"
        )
    if not names:
        _refuse_what_is_empty(folder)
    advice = _advice(folder)
    if not advice:
        needs = ";\n".join(f"  {known.NEEDS}" for known in _FORMATS)
        advice = f" What lies in data.root is one of\n{needs}\nor give data.train.annotations and data.train.images"
    raise DataError(f"{printable(root)} holds no data set in a known format. There is {few(list(names))}.{advice}")


def _recognised(folder: Folder) -> dict[str, DataSet]:
    """Format -> the data set that lies in the folder in it."""
    usual = coco_folder.find(folder)
    if usual is not None:  # before other folders are listed, which takes long in a bucket
        return {coco_folder.NAME: usual}
    found = {known.NAME: data for known in _FORMATS if (data := known.find(folder)) is not None}
    exported = None if found else coco_folder.find_exported(folder)
    return found if exported is None else {coco_folder.NAME: exported}


def _refuse_what_is_empty(folder: Folder) -> NoReturn:
    """Refuses a folder without anything in it.

    Raises:
        DataError: it is empty, not there, or a file, or cannot be read.
    """
    root = printable(folder.root)
    try:
        kind = file_info(folder.root).type
    except (OSError, LocationError) as error:
        raise DataError(f"{root}: cannot be read: {reason_of(error)}") from error
    if kind == FileType.NotFound:
        raise DataError(f"{root}: there is no such folder; data.root is the folder of a data set")
    if kind == FileType.File:
        raise DataError(
            f"{root} is a file; data.root is the folder of a data set. A COCO file and its images are "
            "data.train.annotations=FILE data.train.images=FOLDER, and the same for data.val"
        )
    raise DataError(f"{root} is empty; data.root is the folder of a data set")


def _advice(folder: Folder) -> str:
    """What to do about a folder that is in no format, as far as it can be told; empty or with a blank before it."""
    inner = [folder.location(name) for name in list(folder.names())[:_MOST_FOLDERS] if _holds_data_set(folder, name)]
    if len(inner) == 1:
        return f" A data set lies in {printable(inner[0])}: set data.root to that."
    if inner:
        return f" Data sets lie in {few(inner)}: set data.root to one of them, or data.sources to several."
    found = hint(folder)
    return found and f" {found}"


def _holds_data_set(folder: Folder, name: str) -> bool:
    """Whether a data set with images lies in a folder below."""
    inner = Folder(folder.location(name), folder.follow_links)
    try:
        found = _recognised(inner)
        images = [data.first_image(split) for data in found.values() for split in data.splits]
    except UnlistedError:
        raise
    except ValueError:  # a DataError, or a name that is not text
        return False
    return any(image is not None and inner.has(image) for image in images)


def _of_format(folder: Folder, name: str) -> DataSet:
    known = next((known for known in _FORMATS if name == known.NAME), None)
    if known is None:
        raise DataError(f"data.format: {name!r} is not known; one of {', '.join(NAMES)}")
    found = known.find(folder)
    if found is None and known is coco_folder:
        found = coco_folder.find_exported(folder)
    if found is None and known is not coco_folder:
        raise DataError(
            f"{printable(folder.root)} is not in the format of data.format={name}; what it needs is {known.NEEDS}"
        )
    return found or coco_folder.CocoFolder(folder, {})
