"""Distributions of a search space, as they are written in YAML: ``{uniform: [0, 1]}``."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, cast, get_args

from detr_ray.config.messages import shown

Kind = Literal["uniform", "loguniform", "quniform", "randint", "choice", "grid"]
KINDS: tuple[str, ...] = get_args(Kind)

_FORMS = {
    "uniform": "[smallest, largest]",
    "loguniform": "[smallest, largest]",
    "quniform": "[smallest, largest, step]",
    "randint": "[smallest, largest]",
    "choice": "[value, value, ...]",
    "grid": "[value, value, ...]",
}


@dataclass(frozen=True, slots=True)
class Distribution:
    """What one parameter is drawn from.

    Attributes:
        kind: as in YAML.
        low: smallest value; None for ``choice`` and ``grid``.
        high: largest value. It can be drawn, with ``quniform`` only if steps from ``low`` reach it.
        step: distance of two values for ``quniform``, 1 for ``randint``, otherwise None.
        values: those of ``choice`` and ``grid``; otherwise None.
    """

    kind: Kind
    low: int | float | None = None
    high: int | float | None = None
    step: int | float | None = None
    values: tuple[Any, ...] | None = None

    @property
    def log(self) -> bool:
        """Whether the logarithm is drawn uniformly."""
        return self.kind == "loguniform"

    @property
    def is_numeric(self) -> bool:
        """Whether all values are numbers."""
        return self.values is None or all(is_number(value) for value in self.values)

    def draw(self, rng: random.Random) -> Any:
        """One value."""
        if self.values is not None:
            return rng.choice(self.values)
        low, high = self._range()
        if self.step is not None:
            return self._at_step(rng.randint(0, self._last_step()))
        if self.log:
            # The exponential may be off by a rounding error at the ends.
            return min(max(math.exp(rng.uniform(math.log(low), math.log(high))), low), high)
        return rng.uniform(low, high)

    def ends(self) -> tuple[Any, ...]:
        """The smallest and the largest value; for ``choice`` and ``grid``, all values."""
        if self.values is not None:
            return self.values
        if self.step is not None:
            return self._at_step(0), self._at_step(self._last_step())
        return self._range()

    def middle(self) -> Any:
        """A value in the middle: of the logarithms for ``loguniform``, of the list for ``choice`` and ``grid``."""
        if self.values is not None:
            return self.values[len(self.values) // 2]
        if self.step is not None:
            return self._at_step(self._last_step() // 2)
        low, high = self._range()
        return math.sqrt(low) * math.sqrt(high) if self.log else low + (high - low) / 2

    def nearest(self, value: float) -> Any:
        """The possible value that is nearest to a number: inside of the range, and on a step where there are steps.

        Raises:
            ValueError: there are values that are no numbers.
        """
        if self.values is not None:
            if not self.is_numeric:
                raise ValueError(f"{self.values} are not all numbers")
            return min(self.values, key=lambda known: abs(known - value))
        low, high = self._range()
        if self.step is not None:
            steps = round((value - low) / self.step)
            return self._at_step(min(max(steps, 0), self._last_step()))
        return min(max(float(value), low), high)

    def _range(self) -> tuple[float, float]:
        assert self.low is not None and self.high is not None
        return float(self.low), float(self.high)

    def _last_step(self) -> int:
        return int((_exact(self.high) - _exact(self.low)) / _exact(self.step))

    def _at_step(self, number: int) -> int | float:
        # Decimal numbers: 0.1 + 2 * 0.1 is to be 0.3, as a reader expects.
        value = _exact(self.low) + number * _exact(self.step)
        whole = all(isinstance(part, int) for part in (self.low, self.step))
        return int(value) if whole else float(value)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # false for nan, too; whole numbers may be larger than any float


def is_distribution(value: Any) -> bool:
    """Whether a part of a space is written as a distribution."""
    return isinstance(value, Mapping) and any(key in KINDS for key in value)


def parse_distribution(value: Mapping[str, Any]) -> Distribution:
    """Reads a distribution.

    Args:
        value: one with `is_distribution`.

    Raises:
        ValueError: it is none, in one line that says what to write.
    """
    if len(value) > 1:
        raise ValueError(f"a distribution has one key, one of {', '.join(KINDS)} (got {shown(value)})")
    kind, arguments = next(iter(value.items()))
    form = f"{{{kind}: {_FORMS[kind]}}}"
    if not isinstance(arguments, list | tuple):
        raise ValueError(f"must be {form} (got {shown(value)})")
    if kind in ("choice", "grid"):
        return _of_values(kind, arguments)
    if len(arguments) != (3 if kind == "quniform" else 2) or not all(is_number(number) for number in arguments):
        raise ValueError(f"must be {form} of finite numbers (got {shown(value)})")
    low, high, *rest = arguments
    if low >= high:
        raise ValueError(f"the range of {kind} is {'empty' if low == high else 'reversed'}: {low!r} to {high!r}")
    if kind == "loguniform" and low <= 0:
        raise ValueError(f"loguniform needs a range above 0, and begins at {low!r}")
    if kind == "randint":
        if not all(isinstance(number, int) for number in arguments):
            raise ValueError(f"randint needs whole numbers (got {shown(value)})")
        return Distribution("randint", low, high, step=1)
    if kind == "quniform":
        if not 0 < rest[0] <= high - low:
            raise ValueError(f"the step of quniform must be more than 0 and at most {high - low!r} (got {rest[0]!r})")
        return Distribution("quniform", low, high, step=rest[0])
    return Distribution(cast(Kind, kind), low, high)


def _of_values(kind: str, values: Any) -> Distribution:
    if not values:
        raise ValueError(f"{kind} needs at least one value")
    texts = [shown(value) for value in values]
    again = [text for number, text in enumerate(texts) if text in texts[:number]]
    if again:
        raise ValueError(f"{kind} names {again[0]} twice")
    return Distribution(cast(Kind, kind), values=tuple(values))


def _exact(number: int | float | None) -> Decimal:
    return Decimal(str(number))
