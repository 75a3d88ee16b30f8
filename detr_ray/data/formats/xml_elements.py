"""XML files as elements that know their line. Nothing outside of a file is read: document types are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.parsers import expat

from detr_ray.data.errors import DataError
from detr_ray.data.formats.folder import decode_text
from detr_ray.data.formats.values import at_line
from detr_ray.printable import printable

_MOST_DEPTH = 100
_DECLARED = re.compile(rb"""^\s*<\?xml[^>]*encoding\s*=\s*["']([A-Za-z0-9._-]+)["']""")


@dataclass(slots=True)
class Element:
    """An element: its name, its text, the number of its line, and the elements in it."""

    tag: str
    line: int
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str) -> Iterator[Element]:
        """The elements of this name directly in it."""
        return (child for child in self.children if child.tag == tag)

    def first(self, tag: str) -> Element | None:
        """The first of them; None if there is none."""
        return next(self.all(tag), None)

    def value(self, tag: str) -> str:
        """The text of the first of them without blanks around it; empty if there is none."""
        found = self.first(tag)
        return "" if found is None else found.text.strip()


def parse_xml(location: str, raw: bytes) -> Element:
    """Parses a file; gives its outermost element.

    Raises:
        DataError: it is empty, not XML, or declares a document type; names the line.
    """
    if not raw.strip():
        raise DataError(f"{printable(location)}: the file is empty")
    parser = expat.ParserCreate()
    builder = _Builder(location, parser)
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.add_text
    parser.StartDoctypeDeclHandler = builder.refuse_document_type
    parser.buffer_text = True
    try:
        parser.Parse(_decode(location, raw), True)
    except expat.ExpatError as error:
        reason = expat.errors.messages[error.code]
        raise DataError(
            f"{at_line(location, error.lineno)}: not XML: {reason}. Was the file copied completely?"
        ) from error
    assert builder.root is not None, "a document has an element"
    return builder.root


def _decode(location: str, raw: bytes) -> str:
    declared = _DECLARED.match(raw)
    if declared is None or declared[1].lower().startswith(b"utf"):
        return decode_text(location, raw)
    try:
        text = raw.decode(declared[1].decode())
        text.encode()  # Python's own encodings may give halves of surrogate pairs
    except (LookupError, ValueError) as error:
        raise DataError(f"{at_line(location, 1)}: not text in the encoding that it declares: {error}") from error
    return text


class _Builder:
    def __init__(self, location: str, parser: expat.XMLParserType) -> None:
        self._location = location
        self._parser = parser
        self._open: list[Element] = []
        self.root: Element | None = None

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        element = Element(tag, self._parser.CurrentLineNumber)
        if self._open:
            self._open[-1].children.append(element)
        else:
            self.root = element
        self._open.append(element)
        if len(self._open) > _MOST_DEPTH:
            raise DataError(f"{at_line(self._location, element.line)}: elements are nested too deeply")

    def end(self, tag: str) -> None:
        self._open.pop()

    def add_text(self, text: str) -> None:
        self._open[-1].text += text

    def refuse_document_type(self, *declaration: object) -> None:
        raise DataError(
            f"{at_line(self._location, self._parser.CurrentLineNumber)}: declares a document type, which could name "
            "other files: take <!DOCTYPE ...> out; annotations need none"
        )
