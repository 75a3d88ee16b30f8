"""Translates pydantic's errors into messages for users: which key, and what it must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from detr_ray.config.fields import AUTO_BRANCH, COUNT_BRANCH, IMAGES_BRANCH, NUMBER_BRANCH, RULE_ERROR
from detr_ray.config.yaml_format import format_inline
from detr_ray.printable import shortened

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
    "extra_forbidden": "is not known here",
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
        path: the parts of the key, then the indices in lists.
        message: what the value must be.
        keys: the dotted keys concerned; several if a rule over several keys is broken.
        may_follow: whether another fault may be the cause: true for broken rules and missing keys.
    """

    path: Path
    message: str
    keys: tuple[str, ...]
    may_follow: bool = False

    @property
    def place(self) -> str:
        """The key as users write it, with indices in brackets."""
        return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path).removeprefix(".")


def findings(error: ValidationError) -> Iterator[Finding]:
    """Translates all errors of a validation."""
    for detail in error.errors(include_url=False, include_input=False):
        raw = detail["loc"]
        # Names in angle brackets are forms of a weight or a range, not keys.
        path = tuple(part for part in raw if not (isinstance(part, str) and part.startswith("<")))
        if detail["type"] == RULE_ERROR:
            for violation in detail["ctx"]["violations"]:
                full = [(*path, *key.split(".")) for key in violation.keys]
                yield Finding(full[0], violation.message, tuple(".".join(map(str, key)) for key in full), True)
            continue
        message = _message(detail)
        if NUMBER_BRANCH in raw and message == _NUMBER:
            message += f" or a schedule such as {_SCHEDULE_FORM}"
        if COUNT_BRANCH in raw and message == _WHOLE:
            message += " or a range such as [2, 8]"
        if IMAGES_BRANCH in raw and message == _WHOLE:
            message += " or auto"
        if AUTO_BRANCH in raw:
            message += " or a whole number"
        names = [part for part in path if isinstance(part, str)]
        is_missing = detail["type"] == "missing"
        # For a missing key, the faulty key is its section.
        yield Finding(path, message, (".".join(names[:-1] if is_missing else names),), is_missing)


def _message(detail: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "string_pattern_mismatch":
        return "must begin with a letter or digit, and hold only letters, digits, '.', '_' and '-'"
    if kind in _MESSAGES:
        return _MESSAGES[kind]
    if kind in _TEMPLATES:
        return _TEMPLATES[kind].format(**{**context, "expected": str(context.get("expected", "")).replace("'", "")})
    return detail["msg"]


def shown(value: Any) -> str:
    """A value for a message: as YAML on one line, shortened."""
    try:
        text = " ".join(format_inline(value).split())
    except Exception:  # values from Python code may have any type
        text = repr(value)
    return shortened(text, 80)
