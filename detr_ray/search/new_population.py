"""The population of a search, as its configuration describes it."""

from __future__ import annotations

import random

from detr_ray.config import Config
from detr_ray.search.guided_changes import guided_change
from detr_ray.search.population import Population, Values
from detr_ray.search.reading import POPULATIONS
from detr_ray.search.space import SearchSpace

CHANGES_TRIED = 20
"""After this many changes that the configuration or a constraint refuses, a moved trial keeps the donor's values."""


def new_population(config: Config, space: SearchSpace) -> Population | None:
    """The population; None for other schedulers.

    Args:
        config: of the search.
        space: its space, with the parameters that change.
    """
    settings = config.tune
    if settings.scheduler not in POPULATIONS:
        return None

    def is_possible(values: Values) -> bool:
        return not space.refusal(config, values)

    def change(values: Values, chance: random.Random) -> Values:
        if settings.scheduler == "pb2":
            changing = {name: space.parameters[name] for name in space.mutated}
            following = population.decided_epoch + 2 * settings.perturb_every_epochs
            guided = guided_change(values, chance, changing, population.gains, following, is_possible)
            if guided is not None:
                return guided
        changes = (space.perturb(values, chance, settings) for _ in range(CHANGES_TRIED))
        return next((changed for changed in changes if is_possible(changed)), values)

    population = Population(
        settings.trials,
        change,
        every_epochs=settings.perturb_every_epochs,
        epochs=config.train.epochs,
        quantile=settings.quantile,
        mode=settings.mode,
        seed=settings.seed,
    )
    return population
