"""Reads ``tune.space`` and ``tune.constraints``: names, distributions, expressions and what they use."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from detr_ray.config import Config, TuneConfig
from detr_ray.config.schema import all_keys, unknown_key
from detr_ray.search.distributions import is_number
from detr_ray.search.expressions import Expression, parse_expression
from detr_ray.search.searchable import fault_of_key, fault_of_variable
from detr_ray.search.templates import Template, parse_template

POPULATIONS = ("pbt", "pb2")
"""The schedulers that change values while trials train."""


@dataclass
class ReadSpace:
    """The space as it was read, and all faults that were found.

    Attributes:
        templates: those without faults; each one after those that its expressions use.
        constraints: those without faults.
        base_numbers: key -> number in the base configuration, of all keys that expressions use.
        mutated: names of the parameters that change during training.
        errors: one line for each fault.
    """

    templates: dict[str, Template] = field(default_factory=dict)
    constraints: tuple[Expression, ...] = ()
    base_numbers: dict[str, int | float] = field(default_factory=dict)
    mutated: tuple[str, ...] = ()
    errors: list[str] = field(default_factory=list)


def read_space(config: Config) -> ReadSpace:
    """Reads the section ``tune`` of a configuration. Nothing is compared with other keys yet."""
    tune, read = config.tune, ReadSpace()
    if not tune.space:
        read.errors.append("tune.space: is empty: name what is to be searched, as in {optim.lr: {loguniform: [a, b]}}")
    parsed: dict[str, Template] = {}
    for name, value in tune.space.items():
        fault = fault_of_key(name) if "." in name else fault_of_variable(name)
        if fault is not None:
            read.errors.append(f"tune.space: {name}: {fault}")
            continue
        try:
            parsed[name] = parse_template(name, value)
        except ValueError as error:
            read.errors += [f"tune.space: {line}" for line in str(error).splitlines()]
    constraints = []
    for text in tune.constraints:
        try:
            constraints.append(parse_expression(text))
        except ValueError as error:
            read.errors.append(f"tune.constraints: {error}")
    names = _Names(config, tune.space, parsed, read)
    read.constraints = tuple(one for one in constraints if names.are_numbers(one, "tune.constraints"))
    read.templates = _ordered(names.sound_templates(), read.errors)
    _refuse_unused(tune.space, parsed, constraints, read.errors)
    read.mutated = _mutated(tune, read)
    return read


class _Names:
    """The meaning of names in expressions.

    Args:
        config: the base configuration.
        given: the space as written, including faulty entries.
        parsed: the entries without a fault.
        read: takes numbers of the base configuration, and errors.
    """

    def __init__(self, config: Config, given: Iterable[str], parsed: Mapping[str, Template], read: ReadSpace) -> None:
        self._values = config.to_dict()
        self._given, self._parsed, self._read = set(given), parsed, read
        self._keys = {key.path for key in all_keys() if not key.is_section}

    def are_numbers(self, expression: Expression, place: str) -> bool:
        """Whether every name has a number; otherwise the reason is added to the errors, if it is not there yet."""
        faulty = [name for name in expression.names if not self._is_number(name, expression, place)]
        return not faulty

    def sound_templates(self) -> dict[str, Template]:
        """The templates whose expressions can be computed."""
        found = {}
        for name, template in self._parsed.items():
            place = f"tune.space: {name}"
            faulty = [expression for expression in template.expressions if not self.are_numbers(expression, place)]
            if not faulty:
                found[name] = template
        return found

    def _is_number(self, name: str, expression: Expression, place: str) -> bool:
        fault = None
        if name in self._parsed:
            root = self._parsed[name]
            drawn = {parameter.name: parameter.distribution for parameter in root.parameters}
            is_plain = name in drawn or (len(root.expressions) == 1 and root.root is root.expressions[0])
            if not is_plain or not all(distribution.is_numeric for distribution in drawn.values()):
                fault = f"{name} is not always a number"
        elif name in self._given:
            return False  # its own fault is reported
        elif name in self._keys:
            value: Any = self._values
            for part in name.split("."):
                value = None if value is None else value[part]
            if is_number(value):
                self._read.base_numbers[name] = value
            else:
                fault = f"{name} is no number in the base configuration"
        else:
            hint = difflib.get_close_matches(name, self._given, n=1)
            fault = (
                f"unknown name '{name}'; did you mean '{hint[0]}'?" if hint else unknown_key(tuple(name.split(".")))[0]
            )
        if fault is not None:
            self._read.errors.append(f"{place}: '{expression.text}': {fault}")
        return fault is None


def _ordered(templates: Mapping[str, Template], errors: list[str]) -> dict[str, Template]:
    """The templates, each after those that its expressions use. Those that use themselves are errors."""
    left, done = dict(templates), dict[str, Template]()
    while left:
        ready = [
            name
            for name, template in left.items()
            if not any(used in left for expression in template.expressions for used in expression.names)
        ]
        if not ready:
            errors.append(f"tune.space: {', '.join(left)}: the expressions depend on each other in a circle")
            return done
        # In the order of the file, as far as that is possible.
        done[ready[0]] = left.pop(ready[0])
    return done


def _refuse_unused(
    given: Iterable[str], parsed: Mapping[str, Template], constraints: Iterable[Expression], errors: list[str]
) -> None:
    expressions = [expression for template in parsed.values() for expression in template.expressions]
    used = {name for expression in (*expressions, *constraints) for name in expression.names}
    for name in given:
        if name in parsed and not parsed[name].is_key and name not in used:
            guess = unknown_key((name,))[0].partition("; did you mean ")[2]
            hint = f"; did you mean {guess}" if guess else ""
            errors.append(f"tune.space: {name}: is no key, and no expression uses it as a variable{hint}")


def _mutated(tune: TuneConfig, read: ReadSpace) -> tuple[str, ...]:
    """The parameters that change during training; names in ``tune.mutate`` that do not exist are errors."""
    if tune.scheduler not in POPULATIONS:
        return ()
    parameters = [parameter.name for template in read.templates.values() for parameter in template.parameters]
    if tune.mutate is None:
        return tuple(parameters)
    for name in tune.mutate:
        # An entry with a fault of its own is reported already.
        if name not in parameters and name not in tune.space:
            known = difflib.get_close_matches(name, parameters, n=1)
            hint = f"; did you mean '{known[0]}'?" if known else f"; there are {', '.join(parameters)}"
            read.errors.append(f"tune.mutate: there is no parameter '{name}'{hint}")
        elif name in read.templates and name not in parameters:
            inner = [parameter.name for parameter in read.templates[name].parameters]
            read.errors.append(f"tune.mutate: {name} is not drawn itself; name {' or '.join(inner) or 'what it uses'}")
    return tuple(name for name in parameters if name in tune.mutate)
