"""Searches for tests, without data."""

from __future__ import annotations

from typing import Any

from detr_ray.config import Config, ConfigError, load_config
from detr_ray.config.yaml_format import format_inline
from detr_ray.search import SearchSpace


def searching(space: dict[str, Any], *overrides: str) -> Config:
    """A configuration that searches."""
    return load_config(None, ["data.root=/data", f"tune.space={format_inline(space)}", *overrides])


def space_of(space: dict[str, Any], *overrides: str) -> SearchSpace:
    return SearchSpace.from_config(searching(space, *overrides))


def faults(space: dict[str, Any], *overrides: str) -> list[str]:
    """What is refused; none if nothing is."""
    config = searching(space, *overrides)
    try:
        SearchSpace.from_config(config)
    except ConfigError as error:
        return error.errors
    return []
