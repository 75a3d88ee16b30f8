"""Values of a search space: a distribution, an expression, or a YAML structure with some of them inside."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from detr_ray.config.messages import shown
from detr_ray.search.distributions import KINDS, Distribution, is_distribution, parse_distribution
from detr_ray.search.expressions import Expression, parse_expression

EXPRESSION = "expression"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A place in a template that is drawn.

    Attributes:
        name: the key, then the path inside of the template: ``loss.giou.points.1.1``.
        distribution: its distribution.
    """

    name: str
    distribution: Distribution


@dataclass(frozen=True, slots=True)
class Template:
    """The value of one name of the space.

    Attributes:
        name: a dotted key, or a variable.
        root: nested mappings and lists; their leaves are constants, `Parameter` or `Expression`.
    """

    name: str
    root: Any

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters in it."""
        return [leaf for leaf in _leaves(self.root) if isinstance(leaf, Parameter)]

    @property
    def expressions(self) -> list[Expression]:
        """All expressions in it."""
        return [leaf for leaf in _leaves(self.root) if isinstance(leaf, Expression)]

    @property
    def is_key(self) -> bool:
        """Whether it is a key of the configuration, not a variable."""
        return "." in self.name

    def filled(self, drawn: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
        """The value with everything drawn and computed in its place.

        Args:
            drawn: name of a parameter -> its value.
            values: name -> value, for the expressions.

        Raises:
            ValueError: an expression cannot be computed.
        """

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, Parameter):
                return drawn[leaf.name]
            return leaf.value(values) if isinstance(leaf, Expression) else leaf

        return _mapped(self.root, fill)


def parse_template(name: str, value: Any) -> Template:
    """Reads one value of ``tune.space``.

    Raises:
        ValueError: a distribution or an expression in it is wrong, or there is none. One line for each fault.
    """
    faults: list[str] = []
    template = Template(name, _parsed(name, value, faults))
    if not faults and not template.parameters and not template.expressions:
        faults.append(_no_distribution(name, value))
    if faults:
        raise ValueError("\n".join(faults))
    return template


def _parsed(path: str, value: Any, faults: list[str]) -> Any:
    try:
        if is_distribution(value):
            return Parameter(path, parse_distribution(value))
        if isinstance(value, Mapping) and EXPRESSION in value:
            if len(value) > 1 or not isinstance(value[EXPRESSION], str | int | float):
                raise ValueError(f"must be {{expression: TEXT}} (got {shown(value)})")
            return parse_expression(str(value[EXPRESSION]))
    except ValueError as error:
        faults.append(f"{path}: {error}")
        return None
    if isinstance(value, Mapping):
        return {key: _parsed(f"{path}.{key}", part, faults) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_parsed(f"{path}.{number}", part, faults) for number, part in enumerate(value)]
    return value


def _no_distribution(name: str, value: Any) -> str:
    guesses = []
    if isinstance(value, Mapping):
        guesses = [guess for key in value for guess in difflib.get_close_matches(str(key), (*KINDS, EXPRESSION), n=1)]
    if guesses:
        return f"{name}: there is no distribution '{next(iter(value))}'; did you mean '{guesses[0]}'?"
    return (
        f"{name}: holds nothing to search (got {shown(value)}): give {', '.join(KINDS)} or expression, or set a fixed "
        "value outside of tune.space"
    )


def _leaves(part: Any) -> Iterator[Any]:
    if isinstance(part, Mapping):
        for inner in part.values():
            yield from _leaves(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _leaves(inner)
    else:
        yield part


def _mapped(part: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(part, Mapping):
        return {key: _mapped(inner, change) for key, inner in part.items()}
    if isinstance(part, list):
        return [_mapped(inner, change) for inner in part]
    return change(part)
