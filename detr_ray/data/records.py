"""The records of one list of an annotation file as typed columns: each value exactly as the file has it, or an error.

JSON has no types for columns: an id may be a number in one record and text in the next. What means the same is taken
(``3.0`` for 3, ``true`` for 1 in a flag); what would have to be guessed is refused, with the record, the key and the
value. Whole columns are looked at by the set of their types, so that a file of a million annotations costs no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from detr_ray.data.errors import DataError, few, shown

Record = dict[str, Any]

_INT64 = np.iinfo(np.int64)
_EXACT_FLOAT = 2.0**53
"""From here on a number with a fraction or an exponent may have been another one before it was read."""
_MOST_FINITE = 1e38
"""Above this a pixel coordinate, or the sum of two, is infinite in the 32 bits that boxes are computed with."""
_ABSENT = object()


class Records:
    """The objects of one list of an annotation file, and the way to name the wrong ones among them.

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
        # Half of a surrogate pair is what is left of a name whose bytes were not UTF-8; no file or terminal takes it.
        if not all(map(_is_encodable, values)):
            self.blame(
                f"has a {key!r} with half of a surrogate pair in it",
                lambda record: _is_encodable(record[key]),
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
        """A key as bool, from 0, 1, false or true; false where a record lacks it or has null, and how many do."""
        values = [record.get(key) for record in self.records]
        if not _are_flags(values):
            self.blame(f"has a {key!r} that is neither 0 nor 1", lambda r: _are_flags([r.get(key)]), "", key)
        flags = np.array([bool(value) for value in values], dtype=bool)
        return flags, sum(value is None for value in values)

    def blame(self, what: str, fine: Callable[[Record], Any], advice: str = "", key: str | None = None) -> NoReturn:
        """Raises a DataError that names the records which are not fine, and the first one's value of a key."""
        wrong = [(place, record) for place, record in enumerate(self.records) if not fine(record)]
        names = [_name(place, record) for place, record in wrong]
        value = wrong[0][1].get(key, _ABSENT) if wrong and key is not None else _ABSENT
        text = "" if value is _ABSENT else f": {shown(value)}"
        raise DataError(f"{self.location}: {self.noun} {few(names)} {what}{text}. {advice}".rstrip(" "))


def _name(place: int, record: Record) -> str:
    """What to call a record: its id where that can name it, else its place in the list."""
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


def _is_encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
