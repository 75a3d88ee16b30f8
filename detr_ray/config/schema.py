"""The keys of the configuration, collected from the section classes; and configurations as flat lists of keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from detr_ray.config.fields import Schedule, Section
from detr_ray.config.sections import Config
from detr_ray.config.yaml_format import format_inline

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the configuration.

    Attributes:
        path: dotted name.
        kind: its allowed values, in words.
        default: its default. Keys of a section that is null by default have the default of the section class.
        meaning: its docstring.
        is_section: whether it holds further keys.
    """

    path: str
    kind: str
    default: Any
    meaning: str
    is_section: bool


def nested_section(annotation: Any) -> type[Section] | None:
    """The section class in the type of a field (for a weight: `Schedule`); None for plain values and lists."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) is tuple:
        return None
    found = (nested_section(argument) for argument in get_args(annotation))
    return next((section for section in found if section is not None), None)


def accepts_null(annotation: Any) -> bool:
    """Whether the type allows null."""
    return NoneType in get_args(annotation)


def is_text(annotation: Any) -> bool:
    """Whether the type allows only text, or only text and null."""
    if get_origin(annotation) is Annotated:
        return is_text(get_args(annotation)[0])
    arguments = [argument for argument in get_args(annotation) if argument is not NoneType]
    return annotation is str or (len(arguments) == 1 and accepts_null(annotation) and is_text(arguments[0]))


def field_at(path: tuple[str, ...]) -> FieldInfo | None:
    """The field of a dotted key; None if there is no such key."""
    section: type[Section] | None = Config
    field = None
    for name in path:
        field = None if section is None else section.model_fields.get(name)
        if field is None:
            return None
        section = nested_section(field.annotation)
    return field


@cache
def all_keys() -> tuple[Key, ...]:
    """All keys in the order of the sections; a section comes before its keys."""
    return tuple(keys_of(Config))


def keys_of(section: type[Section], prefix: tuple[str, ...] = ()) -> Iterator[Key]:
    """The keys of a section, and of those in it.

    Args:
        section: its class.
        prefix: names of the sections that it lies in, and its own.
    """
    for name, field in section.model_fields.items():
        path = (*prefix, name)
        nested = nested_section(field.annotation)
        is_section = nested is not None and not issubclass(nested, Schedule)
        meaning = " ".join((field.description or "").split())
        if section is Config and nested is not None:
            meaning = " ".join((nested.__doc__ or "").split())
        kind = _kind(field.annotation, field.metadata)
        yield Key(".".join(path), kind, default_of(field), meaning, is_section)
        if nested is not None and is_section:
            yield from keys_of(nested, path)


def default_of(field: FieldInfo) -> Any:
    """The default of a key; sections in a list as plain values."""
    if isinstance(field.default, tuple):
        return tuple(item.model_dump(mode="json") if isinstance(item, Section) else item for item in field.default)
    return field.default


def _kind(annotation: Any, metadata: Any = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        details = [detail for extra in arguments[1:] for detail in getattr(extra, "metadata", [extra])]
        return _kind(arguments[0], [*details, *metadata])
    if origin is Literal:
        return " or ".join(str(choice) for choice in arguments)
    if origin is tuple:
        if nested_section(arguments[0]) is not None:
            return "list"
        if arguments[-1] is Ellipsis:
            return f"list of {_kind(arguments[0])}"
        return f"list of {len(arguments)}: {_kind(arguments[0])}"
    if origin is dict:
        return "mapping"
    if annotation in (int, float):
        return ("whole number" if annotation is int else "number") + _range(metadata)
    if isinstance(annotation, type):
        if issubclass(annotation, Schedule):
            return "schedule"
        return {bool: "true or false", str: "text", NoneType: "null"}.get(annotation, "section")
    return " or ".join(_kind(argument, metadata) for argument in arguments)


def _range(metadata: Any) -> str:
    lower = [f"at least {m.ge}" for m in metadata if isinstance(m, Ge)]
    lower += [f"more than {m.gt}" for m in metadata if isinstance(m, Gt)]
    upper = [f"at most {m.le}" for m in metadata if isinstance(m, Le)]
    upper = [f"less than {m.lt}" for m in metadata if isinstance(m, Lt)] or upper
    return "".join(f" {bound}" for bound in [" and ".join(lower[:1] + upper[:1])] if bound)


_OF_THE_DATA = frozenset({"num_classes", "class_names", "nc"})


def unknown_key(path: tuple[str, ...]) -> tuple[str, list[str]]:
    """Message for an unknown key, and the known keys that are most similar."""
    if path[-1] in _OF_THE_DATA:
        return f"unknown key '{'.'.join(path)}': the classes, and how many there are, are taken from the data", []
    guesses = _nearest(".".join(path))
    hint = " or ".join(f"'{guess}'" for guess in guesses)
    said = f"; did you mean {hint}?" if guesses else "; --help lists all keys"
    return f"unknown key '{'.'.join(path)}'{said}", guesses


def _names_in(parent: str) -> Iterable[str]:
    if not parent:
        return Config.model_fields
    field = field_at(tuple(parent.split(".")))
    section = None if field is None else nested_section(field.annotation)
    return () if section is None else section.model_fields


def _nearest(path: str) -> list[str]:
    known = [key.path for key in all_keys()]
    parent, _, name = path.rpartition(".")
    siblings = {sibling: f"{parent}.{sibling}".lstrip(".") for sibling in _names_in(parent)}
    by_name = difflib.get_close_matches(name, siblings, n=1, cutoff=0.85)
    if not by_name and len(name) >= 4:
        by_name = [sibling for sibling in siblings if name in sibling][:3]
    by_name = by_name or difflib.get_close_matches(name, siblings, n=1)
    if by_name:
        return [siblings[sibling] for sibling in by_name]
    elsewhere = [key for key in known if key.rpartition(".")[2] == name]
    elsewhere += [key for key in known if len(name) >= 4 and name in key.rpartition(".")[2] and key not in elsewhere]
    return elsewhere[:3] or difflib.get_close_matches(path, known, n=1)


def flatten(config: Config) -> dict[str, Scalar]:
    """Key -> value of every key that is no section, in the order of the sections.

    All configurations have the same keys: where a section is null, its keys are null. Lists and schedules are given as
    the text that sets them on the command line.
    """
    values = config.to_dict()
    return {key.path: _scalar(_lookup(values, key.path)) for key in all_keys() if not key.is_section}


def diff(a: Config, b: Config) -> list[str]:
    """One line ``key: value of a -> value of b`` for each key that differs."""
    flat_a, flat_b = flatten(a), flatten(b)
    shown = {key: [v if isinstance(v, str) else format_inline(v) for v in (flat_a[key], flat_b[key])] for key in flat_a}
    return [f"{key}: {' -> '.join(shown[key])}" for key in flat_a if flat_a[key] != flat_b[key]]


def _lookup(values: Any, path: str) -> Any:
    for name in path.split("."):
        values = None if values is None else values[name]
    return values


def _scalar(value: Any) -> Scalar:
    return format_inline(value) if isinstance(value, list | dict) else value
