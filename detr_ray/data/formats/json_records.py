"""Annotations that are written as JSON: the bytes parsed, and the records of a list as typed columns, or an error.

UTF-8 with and without a byte order mark, UTF-16 and UTF-32 are read, as JSON allows. For other files, the message says
what they are and what to do.

JSON has no types for columns: an id may be a number in one record and text in the next. Values that mean the same are
taken (``3.0`` for 3, ``true`` for 1 in a flag). Where the meaning would have to be guessed, the record, the key and the
value are named in an error. Each column is checked by the set of its values' types, which is fast for a million
annotations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from detr_ray.data.errors import DataError, few, shown
from detr_ray.printable import is_encodable

Record = dict[str, Any]

_INT64 = np.iinfo(np.int64)
_EXACT_FLOAT = 2.0**53
"""Larger numbers with a fraction or an exponent may have been rounded when they were read."""
_MOST_FINITE = 1e38
"""Above this a pixel coordinate, or the sum of two, is infinite in the 32 bits that boxes are computed with."""
_ABSENT = object()

# First bytes of what is found in place of a JSON file -> what it is, and what to do.
_OTHER_FORMATS = (
    (b"\x1f\x8b", "a file compressed with gzip: unpack it first (gunzip)"),
    (b"PK\x03\x04", "a ZIP archive: unpack it first (unzip)"),
    (b"PK\x05\x06", "a ZIP archive, an empty one"),
    (b"BZh", "a file compressed with bzip2: unpack it first (bunzip2)"),
    (b"\xfd7zXZ\x00", "a file compressed with xz: unpack it first (unxz)"),
    (b"\x28\xb5\x2f\xfd", "a file compressed with zstd: unpack it first (unzstd)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"PAR1", "a Parquet file: for a folder of shards set data.train.shards (or data.val.shards) instead"),
    (b"\x89HDF", "an HDF5 file, not JSON"),
    (b"\x80\x04\x95", "a Python pickle, which is not read: write it as JSON"),
    (b"\xff\xd8\xff", "a JPEG image, not JSON"),
    (b"\x89PNG", "a PNG image, not JSON"),
    (b"%PDF", "a PDF, not JSON"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself: fetch it (git lfs pull)"),
)
_MARKUP = (
    (b"<!doctype html", "a web page, not the annotations: what a download gives that needs a login; fetch it again"),
    (b"<html", "a web page, not the annotations: what a download gives that needs a login; fetch it again"),
    (b"<", "XML or a web page, not COCO's JSON: convert the annotations, or fetch the right file"),
)
_CUT_OFF = "Was the file copied completely?"


def parse_json(location: str, raw: bytes, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Parses the content of a file.

    Args:
        location: the file, for messages.
        raw: its content.
        object_hook: see `json.loads`.

    Raises:
        DataError: it is not JSON; the message names the actual format, if it is recognised, and what to do.
    """
    _refuse_other_formats(location, raw)
    try:
        return json.loads(raw, object_hook=object_hook)
    except UnicodeDecodeError as error:
        raise _not_text(location, raw, error) from error
    except json.JSONDecodeError as error:
        # A truncated file ends in the middle of a value; an error elsewhere is no sign of an incomplete copy.
        text = error.doc.rstrip()
        whole = text.endswith(("}", "]")) and error.pos < len(text)
        where = f"broken JSON ({len(raw)} bytes): {error}"
        raise DataError(f"{location}: {where}" + ("" if whole else f". {_CUT_OFF}")) from error
    except RecursionError as error:
        raise DataError(f"{location}: not COCO's JSON: its lists are nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{location}: cannot be parsed: {error}") from error


def _refuse_other_formats(location: str, raw: bytes) -> None:
    start = raw[:1000].lstrip()
    if not start and not raw.strip():
        what = "is empty" if not raw else "holds nothing but blanks"
        raise DataError(f"{location}: the annotation file {what}. {_CUT_OFF}")
    if not raw.strip(b"\0"):
        raise DataError(f"{location}: the annotation file holds {len(raw)} zero bytes and nothing else. {_CUT_OFF}")
    for magic, what in _OTHER_FORMATS:
        if raw.startswith(magic):
            raise DataError(f"{location}: this is {what}")
    for magic, what in _MARKUP:
        if start.removeprefix(b"\xef\xbb\xbf").lower().startswith(magic):
            raise DataError(f"{location}: this is {what}")


def _not_text(location: str, raw: bytes, error: UnicodeDecodeError) -> DataError:
    if error.reason in ("unexpected end of data", "truncated data"):
        return DataError(f"{location}: broken JSON ({len(raw)} bytes): it ends inside of a character. {_CUT_OFF}")
    byte, line = raw[error.start], raw.count(b"\n", 0, error.start) + 1
    return DataError(
        f"{location}: not {error.encoding.upper()} text: byte 0x{byte:02x} at place {error.start} (line {line}). JSON "
        "is UTF-8: convert the file, for example by iconv -f CP1252 -t UTF-8, or from whatever encoding it was written "
        "in"
    )


class Records:
    """The objects of one list of an annotation file.

    Args:
        location: the file.
        noun: what one record is called in messages.
        records: the list as parsed.

    Raises:
        DataError: one of them is not an object.
    """

    def __init__(self, location: str, noun: str, records: list[Any]) -> None:
        self.location = location
        self.noun = noun
        self.records: list[Record] = records
        strays = [place for place, record in enumerate(records) if not isinstance(record, dict)]
        if strays:
            raise DataError(f"{location}: not a COCO file: {noun} no. {few(strays)} is not an object with keys")

    def __len__(self) -> int:
        return len(self.records)

    def values(self, key: str, advice: str = "") -> list[Any]:
        """The values of a required key."""
        try:
            return [record[key] for record in self.records]
        except KeyError:
            self.blame(f"has no {key!r}", lambda record: key in record, advice)

    def integers(self, key: str, advice: str = "") -> np.ndarray:
        """A required key as int64."""
        values = self.values(key, advice)
        column = _whole_numbers(values)
        if column is None:
            self.blame(
                f"has a {key!r} that is not a whole number of 64 bits",
                lambda record: _whole_numbers([record[key]]) is not None,
                advice,
                key,
            )
        return column

    def ids(self) -> np.ndarray:
        """The key ``id`` as int64, each used once."""
        ids = self.integers("id")
        unique, counts = np.unique(ids, return_counts=True)
        if len(unique) < len(ids):
            raise DataError(
                f"{self.location}: {self.noun} ids used more than once: {few(unique[counts > 1].tolist())}. Were two "
                "files put together? Renumber one of them"
            )
        return ids

    def optional_integers(self, key: str, advice: str = "") -> np.ndarray | None:
        """A key as int64; None where a record lacks it or has null."""
        values = [record.get(key) for record in self.records]
        given = [value for value in values if value is not None]
        column = _whole_numbers(given)
        if column is None:
            self.blame(
                f"has a {key!r} that is not a whole number of 64 bits",
                lambda record: record.get(key) is None or _whole_numbers([record[key]]) is not None,
                advice,
                key,
            )
        return column if len(given) == len(values) else None

    def texts(self, key: str, advice: str = "") -> list[str]:
        """A required key as text that is not empty and is made of characters."""
        values = self.values(key, advice)
        if not set(map(type, values)) <= {str}:
            self.blame(f"has a {key!r} that is not text", lambda record: isinstance(record[key], str), advice, key)
        if not all(map(str.strip, values)):
            self.blame(f"has no {key!r}: it is empty", lambda record: record[key].strip(), advice)
        # Single surrogates come from names whose bytes were not UTF-8; files and terminals do not accept them.
        if not all(map(is_encodable, values)):
            self.blame(
                f"has a {key!r} with half of a surrogate pair in it",
                lambda record: is_encodable(record[key]),
                "It was not UTF-8 when the file was written: correct the name (and the image file's)",
                key,
            )
        return values

    def boxes(self, key: str) -> np.ndarray:
        """A required key as ``[A, 4]`` float64; null, infinity and what is near it become NaN."""
        values = self.values(key, "Is this an instance file (not panoptic, not captions)?")
        if not (set(map(type, values)) <= {list} and set(map(len, values)) <= {4}) or not _are_numbers(
            value for box in values for value in box
        ):
            self.blame(
                f"has a {key!r} that is not 4 numbers (left, top, width, height)", lambda r: _is_box(r[key]), "", key
            )
        column = _floats([value for box in values for value in box]).reshape(-1, 4)
        column[~(np.abs(column) < _MOST_FINITE)] = np.nan
        return column

    def optional_floats(self, key: str) -> np.ndarray:
        """A key as float64; NaN where a record lacks it or has null, infinity or what is near it."""
        values = [record.get(key) for record in self.records]
        if not _are_numbers(values):
            self.blame(f"has a {key!r} that is not a number", lambda r: _are_numbers([r.get(key)]), "", key)
        column = _floats(values)
        column[~(np.abs(column) < _MOST_FINITE)] = np.nan
        return column

    def optional_flags(self, key: str) -> tuple[np.ndarray, int]:
        """A key as bool, from 0, 1, false or true; false if it is missing or null; and the number of such records."""
        values = [record.get(key) for record in self.records]
        if not _are_flags(values):
            self.blame(f"has a {key!r} that is neither 0 nor 1", lambda r: _are_flags([r.get(key)]), "", key)
        flags = np.array([bool(value) for value in values], dtype=bool)
        return flags, sum(value is None for value in values)

    def blame(self, what: str, fine: Callable[[Record], Any], advice: str = "", key: str | None = None) -> NoReturn:
        """Raises a DataError that names the faulty records, and the value of the key in the first of them."""
        wrong = [(place, record) for place, record in enumerate(self.records) if not fine(record)]
        names = [_name(place, record) for place, record in wrong]
        value = wrong[0][1].get(key, _ABSENT) if wrong and key is not None else _ABSENT
        text = "" if value is _ABSENT else f": {shown(value)}"
        raise DataError(f"{self.location}: {self.noun} {few(names)} {what}{text}. {advice}".rstrip(" "))


def read_categories(categories: Records) -> tuple[tuple[int, str], ...]:
    """The categories (id, name) by rising id.

    Raises:
        DataError: ids that are not whole or used twice, names that are not text.
    """
    ids = categories.ids()
    if (ids < 0).any():
        categories.blame("has a negative 'id'", lambda record: record["id"] >= 0, "Number categories from 0 or 1")
    names = categories.texts("name", "Give each category a name, in quotes")
    return tuple(sorted(zip(ids.tolist(), names, strict=True)))


def _name(place: int, record: Record) -> str:
    """A name for a record in messages: its id if that is usable, otherwise its place in the list."""
    given = record.get("id")
    return shown(given, quoted=False) if isinstance(given, int | str) and given != "" else f"no. {place}"


def _whole_numbers(values: Sequence[Any]) -> np.ndarray | None:
    """Values as int64, exactly; None if one of them is no whole number, or one that may have been rounded."""
    types = set(map(type, values))
    if not types <= {int, float}:
        return None
    if float in types:
        if not all(
            isinstance(value, int) or (abs(value) <= _EXACT_FLOAT and value.is_integer())  # NaN is neither
            for value in values
        ):
            return None
        values = list(map(int, values))
    if values and not (_INT64.min <= min(values) and max(values) <= _INT64.max):
        return None
    return np.array(values, dtype=np.int64)


def _are_numbers(values: Any) -> bool:
    """Whether all are numbers or null."""
    return set(map(type, values)) <= {int, float, type(None)}


def _are_flags(values: Sequence[Any]) -> bool:
    if not set(map(type, values)) <= {int, float, bool, type(None)}:
        return False
    return all(value is None or value == 0 or value == 1 for value in values)


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and _are_numbers(value)


def _floats(values: list[Any]) -> np.ndarray:
    """Numbers and nulls as float64; a whole number beyond its range is infinite."""
    try:
        return np.array(values, dtype=np.float64)  # null becomes NaN
    except OverflowError:
        return np.array([_float(value) for value in values], dtype=np.float64)


def _float(value: int | float | None) -> float:
    try:
        return math.nan if value is None else float(value)
    except OverflowError:
        return math.inf
