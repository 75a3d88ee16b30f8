"""One XML file of Pascal VOC."""

from __future__ import annotations

from dataclasses import dataclass

from detr_ray.data.errors import DataError, shown
from detr_ray.data.formats.values import at_line, to_number, to_size
from detr_ray.data.formats.xml_elements import Element, parse_xml
from detr_ray.printable import printable

_OTHER_XML = {"annotations": ", and is CVAT's own XML: export as COCO 1.0, Pascal VOC 1.1 or YOLO 1.1"}


@dataclass(frozen=True, slots=True)
class VocObject:
    """An object: class, box (left, top, right, bottom in pixels, from 0), and the line that it begins in."""

    name: str
    corners: tuple[float, float, float, float]
    is_difficult: bool
    line: int


@dataclass(frozen=True, slots=True)
class VocImage:
    """The content of a file.

    Attributes:
        file: its name below the data set's folder.
        stated_name: the image that it names; empty if it names none.
        size: (height, width) of the image; None where it is not stated.
        objects: those in it.
    """

    file: str
    stated_name: str
    size: tuple[int, int] | None
    objects: tuple[VocObject, ...]


def read_annotation(file: str, location: str, raw: bytes) -> VocImage:
    """Reads a file.

    Args:
        file: its name.
        location: its path or URI, for messages.
        raw: its content.

    Raises:
        DataError: it is not an annotation of Pascal VOC; names the line.
    """
    content = parse_xml(location, raw)
    if content.tag != "annotation":
        raise DataError(
            f"{at_line(location, content.line)}: not an annotation of Pascal VOC: it begins with "
            f"<{printable(content.tag)}>, not <annotation>" + _OTHER_XML.get(content.tag, "")
        )
    first_pixel = _first_pixel(content)
    objects = tuple(_object(entry, location, first_pixel) for entry in content.all("object"))
    return VocImage(file, content.value("filename"), _size(content, location), objects)


def _object(entry: Element, location: str, first_pixel: int) -> VocObject:
    where = at_line(location, entry.line)
    name, box = entry.value("name"), entry.first("bndbox")
    if not name:
        raise DataError(f"{where}: the object has no <name>: give it one, or take it out")
    if box is None:
        raise DataError(f"{where}: the object {shown(name)} has no <bndbox>: add it, or take the object out")
    left, top, right, bottom = (_number(box, tag, name, location) for tag in ("xmin", "ymin", "xmax", "ymax"))
    corners = (left - first_pixel, top - first_pixel, right, bottom)
    return VocObject(name, corners, _is_set(entry.value("difficult")), entry.line)


def _number(box: Element, tag: str, name: str, location: str) -> float:
    side = box.first(tag)
    if side is None or not side.text.strip():
        raise DataError(f"{at_line(location, box.line)}: the box of {shown(name)} has no <{tag}>: add it")
    return to_number(side.text.strip(), at_line(location, side.line))


def _size(content: Element, location: str) -> tuple[int, int] | None:
    """(height, width) where the file states it."""
    size = content.first("size")
    if size is None:
        return None
    return to_size(size.value("height"), size.value("width"), at_line(location, size.line))


def _first_pixel(content: Element) -> int:
    """The number of the first pixel of a row: 1 in the original data sets, 0 in files written by tools."""
    source = content.first("source")
    return 1 if source is not None and source.value("database").startswith("The VOC") else 0


def _is_set(text: str) -> bool:
    return text.lower() not in ("", "0", "false", "no", "unspecified")
