"""Pydantic's findings in the words of the configuration: which key, what it must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from detr_ray.config.fields import COUNT_BRANCH, NUMBER_BRANCH, RULE_ERROR
from detr_ray.config.yaml_format import format_inline

Path = tuple[str | int, ...]

_NUMBER = "must be a number"
_WHOLE = "must be a whole number"
_BOOLEAN = "must be true or false"
_MESSAGES = {
    "int_type": _WHOLE,
    "int_from_float": _WHOLE,
    "int_parsing": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "must be a finite number",
    "bool_type": _BOOLEAN,
    "bool_parsing": _BOOLEAN,
    "string_type": "must be text; put it in quotes if it is meant to be",
    "string_too_short": "must not be empty",
    "tuple_type": "must be a list, such as [1, 2]",
    "model_type": "must hold keys, not a value",
    "model_attributes_type": "must hold keys, not a value",
    "dict_type": "must hold keys, not a value",
    "missing": "is missing",
}
_TEMPLATES = {
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_long": "must have at most {max_length} characters",
    "too_long": "must have at most {max_length} entries, not {actual_length}",
    "literal_error": "must be {expected}",
}
_SCHEDULE_FORM = "{points: [[epoch, value], ...], interpolation: linear}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault.

    Attributes:
        path: the key, and places in lists after it.
        message: what must hold.
        keys: all dotted keys that play a part; several where a rule over several keys is broken.
        follows: whether it may only follow from another fault: a broken rule, or a key that is missing.
    """

    path: Path
    message: str
    keys: tuple[str, ...]
    follows: bool = False

    @property
    def place(self) -> str:
        """The key as a user writes it, with places in lists in brackets."""
        text = ".".join(part for part in self.path if isinstance(part, str))
        return text + "".join(f"[{part}]" for part in self.path if isinstance(part, int))


def findings(error: ValidationError) -> Iterator[Finding]:
    """Translates everything that a validation found."""
    for detail in error.errors(include_url=False, include_input=False):
        raw = detail["loc"]
        # Names in angle brackets say which form of a weight was tried; they are no keys.
        path = tuple(part for part in raw if not (isinstance(part, str) and part.startswith("<")))
        if detail["type"] == RULE_ERROR:
            for violation in detail["ctx"]["violations"]:
                full = [(*path, *key.split(".")) for key in violation.keys]
                yield Finding(full[0], violation.message, tuple(".".join(map(str, key)) for key in full), follows=True)
            continue
        message = _message(detail)
        if NUMBER_BRANCH in raw and message == _NUMBER:
            message += f" or a schedule such as {_SCHEDULE_FORM}"
        if COUNT_BRANCH in raw and message == _WHOLE:
            message += " or a range such as [2, 8]"
        names = [part for part in path if isinstance(part, str)]
        is_missing = detail["type"] == "missing"
        # What is faulty about a missing key is the section that lacks it.
        yield Finding(path, message, (".".join(names[:-1] if is_missing else names),), follows=is_missing)


def _message(detail: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "string_pattern_mismatch":
        return "must begin with a letter or digit, and hold only letters, digits, '.', '_' and '-'"
    if kind in _MESSAGES:
        return _MESSAGES[kind]
    if kind in _TEMPLATES:
        return _TEMPLATES[kind].format(**{**context, "expected": str(context.get("expected", "")).replace("'", "")})
    return detail["msg"]


def shown(value: Any, most: int = 80) -> str:
    """A value for a message: as YAML on one line, not too long."""
    try:
        text = " ".join(format_inline(value).split())
    except Exception:  # values from Python code may be anything
        text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
