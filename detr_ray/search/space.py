"""The space of a search: the values that are drawn for a trial, and the resulting configuration."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from detr_ray.config import Config, ConfigError, TuneConfig, config_from_dict
from detr_ray.config.messages import shown
from detr_ray.search.checks import check_search
from detr_ray.search.distributions import Distribution, is_number
from detr_ray.search.expressions import Expression
from detr_ray.search.reading import read_space
from detr_ray.search.templates import Template


@dataclass(frozen=True)
class SearchSpace:
    """A checked space.

    Attributes:
        templates: name (a key or a variable) -> its value, in an order in which expressions can be computed.
        constraints: expressions that must hold.
        base_numbers: key -> value in the base configuration, for the expressions that use it.
        mutated: names of the parameters that change while trials train; empty without a population.
        warnings: lines to show: parts of the space that the configuration would refuse.
    """

    templates: Mapping[str, Template]
    constraints: tuple[Expression, ...] = ()
    base_numbers: Mapping[str, int | float] = field(default_factory=dict)
    mutated: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Config) -> SearchSpace:
        """Reads and checks ``tune.space`` and all that depends on it.

        Args:
            config: the base configuration of the search.

        Raises:
            ConfigError: with all faults.
        """
        read = read_space(config)
        space = cls(read.templates, read.constraints, read.base_numbers, read.mutated)
        errors, warnings = check_search(config, space, is_whole=not read.errors)
        if read.errors or errors:
            raise ConfigError([*read.errors, *errors])
        return cls(read.templates, read.constraints, read.base_numbers, read.mutated, tuple(warnings))

    @cached_property
    def parameters(self) -> Mapping[str, Distribution]:
        """Name -> distribution of all parameters."""
        found = [parameter for template in self.templates.values() for parameter in template.parameters]
        return {parameter.name: parameter.distribution for parameter in found}

    @cached_property
    def mutated_keys(self) -> tuple[str, ...]:
        """The keys of the configuration that change while trials train, with their expressions."""
        return self.keys_that_follow_from(self.mutated)

    def keys_that_follow_from(self, parameters: tuple[str, ...]) -> tuple[str, ...]:
        """The keys of the configuration whose values depend on parameters, directly or through expressions."""
        names: set[str] = set()
        for name, template in self.templates.items():
            used = {used for expression in template.expressions for used in expression.names}
            if used & names or any(parameter.name in parameters for parameter in template.parameters):
                names.add(name)
        return tuple(name for name in self.templates if name in names and self.templates[name].is_key)

    def draw(self, rng: random.Random) -> dict[str, Any]:
        """Random values for all parameters.

        Args:
            rng: the same state gives the same values.
        """
        return {name: distribution.draw(rng) for name, distribution in self.parameters.items()}

    def grid_points(self) -> list[dict[str, Any]]:
        """Every combination of the values of all ``grid`` parameters; the last parameter changes fastest."""
        grids = {name: found.values or () for name, found in self.parameters.items() if found.kind == "grid"}
        return [dict(zip(grids, point, strict=True)) for point in itertools.product(*grids.values())]

    def proposal(self, number: int, tune: TuneConfig) -> dict[str, Any] | None:
        """The values of a trial in a search without feedback. They depend only on its number and the seed.

        Args:
            number: of the trial, from 0.
            tune: searcher and seed.

        Returns:
            Name -> value of all parameters; None after the last point of a grid.

        Raises:
            ValueError: ``tune.searcher`` chooses from results.
        """
        if tune.searcher == "grid":
            points = self.grid_points()
            return points[number] if number < len(points) else None
        if tune.searcher == "random":
            return self.draw(random.Random(f"{tune.seed} {number}"))
        raise ValueError(f"tune.searcher={tune.searcher} needs the results of earlier trials")

    def perturb(self, drawn: Mapping[str, Any], rng: random.Random, tune: TuneConfig) -> dict[str, Any]:
        """The next values of a trial in a population: near those of the trial that it copies.

        A mutated parameter is drawn anew with ``tune.resample_probability``. Otherwise a number is multiplied with one
        of ``tune.perturb_factors`` and kept in its range; for ``choice``, a neighbour in the list is taken.

        Args:
            drawn: values of the trial that is copied.
            rng: the same state gives the same values.
            tune: probability and factors.
        """
        changed = dict(drawn)
        for name in self.mutated:
            distribution, value = self.parameters[name], drawn[name]
            if rng.random() < tune.resample_probability:
                changed[name] = distribution.draw(rng)
            elif distribution.values is None:
                changed[name] = _moved(distribution, value, rng.choice(tune.perturb_factors))
            else:
                place = distribution.values.index(value) + rng.choice((-1, 1))
                changed[name] = distribution.values[min(max(place, 0), len(distribution.values) - 1)]
        return changed

    def values(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """The final value of every name of the space: keys and variables.

        Args:
            drawn: name -> value of all parameters.

        Raises:
            ConfigError: an expression cannot be computed.
            ValueError: a parameter has no value.
        """
        missing = sorted(self.parameters.keys() - drawn.keys())
        if missing:
            raise ValueError(f"no value is given for {', '.join(missing)}")
        found: dict[str, Any] = {}
        for name, template in self.templates.items():
            try:
                found[name] = template.filled(drawn, {**self.base_numbers, **found})
            except ValueError as error:
                raise ConfigError(f"tune.space: {name}: {error}") from error
        return found

    def resolve(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Dotted key -> final value: expressions are computed, templates filled.

        Args:
            drawn: name -> value of all parameters.

        Raises:
            ConfigError: an expression cannot be computed.
        """
        return {name: value for name, value in self.values(drawn).items() if self.templates[name].is_key}

    def trial_config(self, base: Config, drawn: Mapping[str, Any], run: Mapping[str, Any] | None = None) -> Config:
        """The configuration of a trial: the base with the trial's values, and ``tune`` at its defaults.

        Args:
            base: the configuration of the search.
            drawn: name -> value of all parameters.
            run: values of the section ``run`` that the search sets, such as ``{"name": "t000"}``.

        Raises:
            ConfigError: the configuration or a constraint refuses the values; all reasons.
        """
        broken = self.broken_constraints(drawn)
        if broken:
            raise ConfigError(broken)
        keys = {**self.resolve(drawn), **{f"run.{name}": value for name, value in (run or {}).items()}}
        return with_values(base, keys)

    def refusal(self, base: Config, drawn: Mapping[str, Any]) -> str:
        """Why no trial can have these values, all reasons on one line; empty if one can.

        Args:
            base: the configuration of the search.
            drawn: name -> value of all parameters.
        """
        try:
            self.trial_config(base, drawn)
        except ConfigError as error:
            return "; ".join(error.errors)
        return ""

    def broken_constraints(self, drawn: Mapping[str, Any]) -> list[str]:
        """One line for each constraint that does not hold.

        Raises:
            ConfigError: an expression cannot be computed.
        """
        found = {**self.base_numbers, **self.values(drawn)}
        lines = []
        for constraint in self.constraints:
            try:
                holds = constraint.value(found)
            except ValueError as error:
                raise ConfigError(f"tune.constraints: {error}") from error
            if not holds:
                given = ", ".join(f"{name}={shown(found[name])}" for name in constraint.names)
                lines.append(f"tune.constraints: '{constraint.text}' does not hold ({given})")
        return lines


def with_values(base: Config, keys: Mapping[str, Any]) -> Config:
    """The configuration of a trial with some values.

    Args:
        base: the configuration of the search.
        keys: dotted key -> value. A value replaces the one of the base as a whole: a number may take the place of a
            schedule. Defaults that follow from it, such as those of an architecture, follow from the new value.

    Raises:
        ConfigError: the configuration refuses them, or a training with them could not start.
    """
    values = base.model_dump(mode="json", exclude_unset=True)
    values.pop("tune", None)
    for key, value in keys.items():
        *above, name = key.split(".")
        section = values
        for part in above:
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
        section[name] = value
    config = config_from_dict(values, "this trial")
    config.check_training()
    return config


def _moved(distribution: Distribution, value: float, factor: float) -> int | float:
    moved = distribution.nearest(value * factor)
    if moved == value and distribution.step is not None:  # the change is smaller than a step
        moved = distribution.nearest(value + (distribution.step if factor > 1 else -distribution.step))
    assert is_number(moved)
    return moved
