"""Configurations as flat lists of keys: for records of runs, and to say how two runs differ."""

from __future__ import annotations

from typing import Any

from detr_ray.config.schema import all_keys
from detr_ray.config.sections import Config
from detr_ray.config.yaml_format import format_inline

Scalar = str | int | float | bool | None


def flatten(config: Config) -> dict[str, Scalar]:
    """Value of every key that is no section, in the order of the sections.

    The keys are the same for all configurations: those of a section that is null are null. Lists and schedules are
    given as the text that sets them on the command line.
    """
    values = config.to_dict()
    return {key.path: _scalar(_lookup(values, key.path)) for key in all_keys() if not key.is_section}


def diff(a: Config, b: Config) -> list[str]:
    """One line ``key: value of a -> value of b`` for each key that differs."""
    flat_a, flat_b = flatten(a), flatten(b)
    return [f"{key}: {_shown(value)} -> {_shown(flat_b[key])}" for key, value in flat_a.items() if value != flat_b[key]]


def _lookup(values: Any, path: str) -> Any:
    for name in path.split("."):
        values = None if values is None else values[name]
    return values


def _shown(value: Scalar) -> str:
    return value if isinstance(value, str) else format_inline(value)


def _scalar(value: Any) -> Scalar:
    return format_inline(value) if isinstance(value, list | dict) else value
