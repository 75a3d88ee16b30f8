"""The values of a trial in a population over its training, as a configuration that replays them in one training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from detr_ray.config import Schedule
from detr_ray.config.yaml_format import format_yaml
from detr_ray.search.distributions import is_number
from detr_ray.search.searchable import is_changeable

Lived = Sequence[tuple[int, Mapping[str, Any]]]


def lived_values(lived: Lived, steps_per_epoch: int) -> dict[str, Any]:
    """Key -> schedule with the same values at the same steps; a number for a key whose value never changed.

    A training looks values up at ``step / steps_per_epoch``. The points are the same quotients, so that each value
    holds from its step on, to the bit.

    Args:
        lived: (first step, key -> value) of each part of the trial's training, from its oldest ancestor on. A key that
            is missing in a part keeps its value.
        steps_per_epoch: optimizer steps of one epoch.

    Raises:
        ValueError: the first part does not begin at step 0, steps do not ascend, or a key cannot change during
            training.
    """
    steps = [step for step, _ in lived]
    if not steps or steps[0] != 0:
        raise ValueError(f"a life begins at step 0, not at {steps[:1]}")
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise ValueError(f"the steps must ascend, got {steps}")
    points: dict[str, list[list[float]]] = {}
    for step, values in lived:
        for key, value in values.items():
            if not is_changeable(key) or not is_number(value):
                raise ValueError(f"{key}={value!r} cannot change while a trial trains")
            if key not in points and step:
                raise ValueError(f"{key} has no value before step {step}")
            known = points.setdefault(key, [])
            if not known or known[-1][1] != value:
                known.append([step / steps_per_epoch, float(value)])
    return {
        key: found[0][1] if len(found) == 1 else {"points": found, "interpolation": "constant"}
        for key, found in points.items()
    }


def schedule_file(values: Mapping[str, Any], header: str = "") -> str:
    """Text of a ``schedule.yaml``, a configuration file.

    Args:
        values: dotted key -> value.
        header: lines that become a comment at the top.
    """
    sections: dict[str, Any] = {}
    for key, value in values.items():
        *above, name = key.split(".")
        section = sections
        for part in above:
            section = section.setdefault(part, {})
        section[name] = whole_value(value)
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    return comment + format_yaml(sections)


def whole_value(value: Any) -> Any:
    """A schedule with all of its keys, because files and overrides are merged into it key by key; others unchanged."""
    is_schedule = isinstance(value, Mapping) and "points" in value
    return Schedule.model_validate(value).model_dump(mode="json") if is_schedule else value
