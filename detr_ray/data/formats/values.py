"""Values that text files and their names hold: numbers and names, or an error that names file, line and value."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence

from detr_ray.data.errors import DataError, few, shown
from detr_ray.data.formats.folder import Folder
from detr_ray.data.index import MOST_PIXELS_A_SIDE
from detr_ray.data.known_folders import SPLIT_NAMES
from detr_ray.printable import printable

_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+(e[+-]?\d+)?", re.IGNORECASE)
CLASS_FILES = ("classes.txt", "obj.names")


def at_line(location: str, line: int) -> str:
    """What to call a line of a file in messages."""
    return f"{printable(location)}, line {line}"


def words_in(file: str) -> set[str]:
    """The words in a file's name: instances, train and json in ``annotations/instances_train.json``."""
    return set(re.split(r"[^a-z]+", posixpath.basename(file).lower()))


def splits_in(file: str) -> list[str]:
    """The splits that a file's name tells: train in ``train_labels.csv``, both in ``train_val.csv``."""
    words = words_in(file)
    return [split for split, names in SPLIT_NAMES.items() if words & set(names)]


def to_number(text: str, where: str) -> float:
    """A number; NaN and infinity are numbers here.

    Raises:
        DataError: it is none, or has a decimal comma.
    """
    try:
        if "_" not in text:  # Python takes 1_000 for a number
            return float(text)
    except ValueError:
        pass
    if _DECIMAL_COMMA.fullmatch(text.strip()):
        raise DataError(f"{where}: {shown(text)} has a decimal comma: write decimal points ({text.replace(',', '.')})")
    raise DataError(f"{where}: {shown(text)} is not a number")


def to_size(height: str, width: str, where: str) -> tuple[int, int] | None:
    """(height, width) of an image; None where one is empty, or is that of no image: some tools write 0.

    Raises:
        DataError: one is no number.
    """
    if not height or not width:
        return None
    sides = to_number(height, where), to_number(width, where)
    return (int(sides[0]), int(sides[1])) if all(1 <= side <= MOST_PIXELS_A_SIDE for side in sides) else None


def to_class_number(text: str, names: Sequence[str], where: str, listed_in: str) -> int:
    """A class number; ``2.0`` is taken for 2.

    Args:
        text: as the file has it.
        names: the classes by number.
        where: file and line.
        listed_in: the file that lists the classes.

    Raises:
        DataError: no whole number, or not that of a class.
    """
    number = to_number(text, where)
    if not number.is_integer():
        raise DataError(f"{where}: the class number {shown(text)} is not a whole number")
    if not 0 <= number < len(names):
        raise DataError(
            f"{where}: class number {int(number)}, but {printable(listed_in)} lists {len(names)} classes (0 to "
            f"{len(names) - 1}): add the class there, or correct the line"
        )
    return int(number)


def check_class_names(names: Sequence[str], listed_in: str) -> tuple[str, ...]:
    """Class names, as they are.

    Raises:
        DataError: none at all, or an empty one.
    """
    found = tuple(names)
    if not found:
        raise DataError(f"{printable(listed_in)}: lists no classes")
    nameless = next((number for number, name in enumerate(found) if not name.strip()), None)
    if nameless is not None:
        raise DataError(f"{printable(listed_in)}: class {nameless} has no name: give each class a name")
    return found


def class_files(folder: Folder, below: Sequence[str] = ("",)) -> list[str]:
    """Names of the files that list classes, at most one in each of these folders of a data set."""
    paths = ([posixpath.join(place, name) for name in CLASS_FILES] for place in filter(folder.has, below))
    found = (next(filter(folder.has, names), None) for names in paths)
    return [name for name in found if name is not None]


def read_class_file(folder: Folder) -> tuple[tuple[str, ...], str] | None:
    """The classes that a data set's file lists, and the file's location; None where there is none.

    Raises:
        DataError: a class without a name.
    """
    return read_class_files(folder, class_files(folder))


def read_class_files(folder: Folder, names: Sequence[str]) -> tuple[tuple[str, ...], str] | None:
    """The classes that files with one name a line list, and the first file's location; None for no files.

    Raises:
        DataError: a class without a name, or files that list different classes.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        location = folder.location(name)
        lines = [line.strip() for line in folder.text(name).rstrip().splitlines()]
        found[location] = check_class_names(lines, location)
    if len(set(found.values())) > 1:
        raise DataError(
            f"{printable(folder.root)}: {few(list(found))} list different classes, or in another order: keep the one "
            "that the numbers in the label files are of"
        )
    return next(((names, location) for location, names in found.items()), None)


def categories_of(names: Sequence[str]) -> tuple[tuple[int, str], ...]:
    """Categories (id, name) of classes by number: the id is the number, from 0."""
    return tuple(enumerate(names))
