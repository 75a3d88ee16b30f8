"""The population of a search, as its configuration describes it."""

from __future__ import annotations

import random

from detr_ray.config import Config
from detr_ray.search.guided_changes import guided_change
from detr_ray.search.population import Population, Values
from detr_ray.search.reading import POPULATIONS
from detr_ray.search.space import SearchSpace


def new_population(config: Config, space: SearchSpace) -> Population | None:
    """The population; None for other schedulers.

    Args:
        config: of the search.
        space: its space, with the parameters that change.
    """
    settings = config.tune
    if settings.scheduler not in POPULATIONS:
        return None

    def change(values: Values, chance: random.Random) -> Values:
        guided = None
        if settings.scheduler == "pb2":
            changing = {name: space.parameters[name] for name in space.mutated}
            following = population.decided_epoch + 2 * settings.perturb_every_epochs
            guided = guided_change(values, chance, changing, population.gains, following)
        return guided or space.perturb(values, chance, settings)

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
