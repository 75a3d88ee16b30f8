"""Types of configuration values: checked numbers, rules over several keys, schedules.

Whole numbers are strict (``3.0``, ``"3"`` and ``true`` are refused). Other numbers may be given as text, because YAML
reads some spellings of numbers as text; they must be finite, and booleans are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from detr_ray.schedules import Curve, Interpolation

RULE_ERROR = "rules"
"""Type of pydantic errors for broken rules; the error's context holds the list of `Violation`."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule over one or several keys.

    Attributes:
        keys: dotted keys that the rule uses, relative to its section; the first is named in the message.
        message: the rule, for example "must ascend".
    """

    keys: tuple[str, ...]
    message: str


class Section(BaseModel):
    """Base of all sections: frozen, without unknown keys; the docstring under a field is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, hide_input_in_errors=True
    )

    def own_defaults(self) -> Mapping[str, Any]:
        """Defaults that depend on other keys of the section."""
        return {}

    def fill(self) -> None:
        """Gives keys that were not given, or are null, their `own_defaults`; they still count as not given."""
        for name, value in self.own_defaults().items():
            if name not in self.model_fields_set or getattr(self, name) is None:
                self.__dict__[name] = value  # the section is frozen once it is made

    def with_defaults(self, values: Mapping[str, Any]) -> Self:
        """The same section with other defaults; the keys that have them still count as not given."""
        section = self.model_copy()
        section.__dict__.update({name: value for name, value in values.items() if name not in self.model_fields_set})
        section.fill()
        return section

    def rules(self) -> Iterator[Violation]:
        """Yields the broken rules of this section."""
        yield from ()

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        self.fill()
        broken = list(self.rules())
        if broken:
            text = "; ".join(f"{violation.keys[0]} {violation.message}" for violation in broken)
            raise PydanticCustomError(RULE_ERROR, "{text}", {"text": text, "violations": broken})
        return self


def _refuse_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "must be a number")
    return value


def _refuse_empty(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise PydanticCustomError("empty", "must not be empty")
    return values


# Runs after the entries were checked. Pydantic's own minimum length would add an error to each faulty entry.
NonEmpty = AfterValidator(_refuse_empty)

Whole = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
CountOrZero = Annotated[int, Field(strict=True, ge=0)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
Number = Annotated[float, BeforeValidator(_refuse_boolean), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Counts = Annotated[tuple[Count, ...], NonEmpty]


class Schedule(Section):
    """A weight or a learning rate that changes over the epochs."""

    points: Annotated[tuple[tuple[NonNegative, NonNegative], ...], NonEmpty]
    """``[epoch, value]`` pairs with ascending epochs. The first value also holds before, the last value also after."""
    interpolation: Interpolation = "linear"
    """Values between two points: ``constant`` (the earlier value), ``linear`` or ``cosine`` (half a cosine wave)."""

    def rules(self) -> Iterator[Violation]:
        """The epochs must ascend."""
        epochs = [epoch for epoch, _ in self.points]
        if any(later <= earlier for earlier, later in pairwise(epochs)):
            yield Violation(("points",), "must have ascending epochs")

    def at(self, epoch: float) -> float:
        """The value at an epoch; 2.5 is the middle of the third epoch."""
        return Curve(self.points, self.interpolation).at(epoch)

    @property
    def is_zero(self) -> bool:
        """Whether it is 0 at all epochs."""
        return not any(value for _, value in self.points)


NUMBER_BRANCH, SCHEDULE_BRANCH = "<number>", "<schedule>"
"""Names of the two forms of a weight or a rate in the locations of pydantic's errors. The brackets distinguish them
from keys."""


def _branch(types: tuple[type, ...], of_these: str, of_others: str) -> Discriminator:
    """Selects the form of a value by its type, before validation: a faulty value then has the errors of one form."""
    return Discriminator(lambda value: of_these if isinstance(value, types) else of_others)


_NUMBER_OR_SCHEDULE = _branch((Mapping, Schedule), SCHEDULE_BRANCH, NUMBER_BRANCH)
Weight = Annotated[
    Annotated[NonNegative, Tag(NUMBER_BRANCH)] | Annotated[Schedule, Tag(SCHEDULE_BRANCH)],
    _NUMBER_OR_SCHEDULE,
]


def _zero_as_number(value: float | Schedule) -> float | Schedule:
    return 0.0 if isinstance(value, Schedule) and value.is_zero else value


# A rate that is 0 at all epochs becomes the number 0, so that the value alone tells what is frozen.
RateOrZero = Annotated[Weight, AfterValidator(_zero_as_number)]
Rate = Annotated[
    Annotated[Positive, Tag(NUMBER_BRANCH)] | Annotated[Schedule, Tag(SCHEDULE_BRANCH)],
    _NUMBER_OR_SCHEDULE,
]


COUNT_BRANCH, RANGE_BRANCH = "<count>", "<range>"


_COUNT_OR_RANGE = _branch((list, tuple), RANGE_BRANCH, COUNT_BRANCH)

# A number, or the smallest and the largest number: ``4`` or ``[2, 8]``.
CountOrRange = Annotated[
    Annotated[Count, Tag(COUNT_BRANCH)] | Annotated[tuple[Count, Count], Tag(RANGE_BRANCH)],
    _COUNT_OR_RANGE,
]


AUTO_BRANCH, IMAGES_BRANCH = "<auto>", "<images>"


_AUTO_OR_COUNT = _branch((str,), AUTO_BRANCH, IMAGES_BRANCH)

# A number, or the word auto.
CountOrAuto = Annotated[
    Annotated[Literal["auto"], Tag(AUTO_BRANCH)] | Annotated[Count, Tag(IMAGES_BRANCH)],
    _AUTO_OR_COUNT,
]
