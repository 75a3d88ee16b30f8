"""Checks a search before anything starts: contradictions between its settings, and between space and keys."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from detr_ray.coco_numbers import COCO_METRICS
from detr_ray.config import Config, ConfigError, TuneConfig
from detr_ray.config.messages import shown
from detr_ray.search.distributions import Distribution, is_number
from detr_ray.search.reading import POPULATIONS
from detr_ray.search.searchable import is_changeable

if TYPE_CHECKING:
    from detr_ray.search.space import SearchSpace

DRAWS_TRIED = 200
"""If constraints refuse all of this many draws, almost nothing is left to search."""


def check_search(config: Config, space: SearchSpace, *, is_whole: bool) -> tuple[list[str], list[str]]:
    """Checks a search.

    Args:
        config: the base configuration.
        space: what could be read of the space.
        is_whole: whether all of it could be read; if not, checks that need the whole space are left out.

    Returns:
        One line for each error, and one for each warning.
    """
    errors = [*_settings(config), *_searcher(config.tune, space, is_whole), *_population(config, space)]
    try:
        config.check_training()
    except ConfigError as error:
        return [*errors, *error.errors], []  # each trial would be refused for the same reason
    refused, warnings = _refused_values(config, space)
    errors += refused
    if is_whole and not errors and space.constraints:
        tried = _combinations(space)
        if not any(_fulfils(space, values) for values in tried):
            errors.append(
                f"tune.constraints: none of {len(tried)} combinations fulfils all of them; widen the ranges or "
                "remove a constraint"
            )
    return errors, warnings


def _settings(config: Config) -> Iterator[str]:
    """Memory, the metric, and the scheduler."""
    tune = config.tune
    if config.run.fork_from is not None:
        yield (
            "run.fork_from: must be null in a search: its trials, and the trainings of --confirm, start anew, each "
            "with values or a seed of its own; to start them from another run's weights, set model.init_from"
        )
    if config.train.micro_batch_size == "auto" and not config.train.use_gpu and tune.max_concurrent != 1:
        yield (
            "train.micro_batch_size: auto would count the same free memory for each of the trials that train at the "
            "same time on one machine's CPUs; give a number, or set tune.max_concurrent=1, or train.use_gpu=true "
            "(each worker has a GPU of its own)"
        )
    known = tune.metric in COCO_METRICS or (tune.metric.startswith("val/AP/") and len(tune.metric) > len("val/AP/"))
    if not known:
        yield (
            f"tune.metric: {tune.metric} is never reported; there are {', '.join(COCO_METRICS)}, and val/AP/NAME for a "
            "category"
        )
    elif not config.data.has_val and config.data.has_train:
        yield f"tune.metric: {tune.metric} needs validation images: set data.val"
    if tune.scheduler != "none":
        yield from _scheduler(config)


def _scheduler(config: Config) -> Iterator[str]:
    """Epochs and trials of a scheduler that compares trials while they train."""
    tune, epochs, every = config.tune, config.train.epochs, config.eval.every_epochs
    if every == 0:
        yield f"eval.every_epochs: must not be 0 with tune.scheduler={tune.scheduler}, which compares running trials"
    if tune.scheduler in POPULATIONS:
        if tune.perturb_every_epochs >= epochs:
            yield (
                f"tune.perturb_every_epochs: must be less than train.epochs ({epochs}), or nothing ever changes "
                f"(got {tune.perturb_every_epochs})"
            )
        if every and tune.perturb_every_epochs % every:
            yield (
                f"tune.perturb_every_epochs: must be a multiple of eval.every_epochs ({every}): trials are compared by "
                f"their validation (got {tune.perturb_every_epochs})"
            )
        if config.train.max_steps is not None:
            yield (
                f"train.max_steps: must be null with tune.scheduler={tune.scheduler}, which counts epochs; set "
                "train.epochs"
            )
        if config.train.early_stopping is not None:
            yield f"train.early_stopping: must be null with tune.scheduler={tune.scheduler}, which compares all trials"
        if tune.trials < 2:
            yield f"tune.trials: must be at least 2 with tune.scheduler={tune.scheduler}: trials copy each other"
        if tune.max_concurrent is not None and tune.max_concurrent < tune.trials:
            yield (
                f"tune.max_concurrent: must not be less than tune.trials ({tune.trials}) with tune.scheduler="
                f"{tune.scheduler}, whose trials train at the same time; leave it out, or ask for fewer trials "
                f"(got {tune.max_concurrent})"
            )
    elif tune.grace_epochs > epochs:
        yield f"tune.grace_epochs: must not exceed train.epochs ({epochs}) (got {tune.grace_epochs})"
    if "train.epochs" in tune.space:
        yield (
            f"tune.space: train.epochs: cannot be searched with tune.scheduler={tune.scheduler}, which compares trials "
            "after the same number of epochs"
        )


def _searcher(tune: TuneConfig, space: SearchSpace, is_whole: bool) -> Iterator[str]:
    grids = [name for name, found in space.parameters.items() if found.kind == "grid"]
    others = [name for name in space.parameters if name not in grids]
    if tune.searcher == "grid":
        if others:
            yield f"tune.searcher: grid needs grids alone, but {', '.join(others)} would be drawn; use grid or random"
        elif is_whole and tune.trials < (points := len(space.grid_points())):
            yield f"tune.trials: the grid has {points} points; set tune.trials={points} (got {tune.trials})"
    elif grids:
        yield f"tune.searcher: {', '.join(grids)} is a grid, which needs tune.searcher=grid; or write choice"
    if tune.searcher == "tpe":
        if tune.scheduler in POPULATIONS:
            yield f"tune.searcher: must be random or grid with tune.scheduler={tune.scheduler}, which chooses itself"
        if importlib.util.find_spec("optuna") is None:
            yield "tune.searcher: tpe needs the package optuna: pip install 'detr_ray[tune]'"
    if tune.scheduler == "pb2" and importlib.util.find_spec("sklearn") is None:
        yield "tune.scheduler: pb2 needs the package scikit-learn: pip install scikit-learn"


def _population(config: Config, space: SearchSpace) -> Iterator[str]:
    """Whether what a population changes can change while a trial trains."""
    scheduler = config.tune.scheduler
    if scheduler not in POPULATIONS:
        return
    if not space.mutated and space.parameters and not config.tune.mutate:
        yield f"tune.mutate: names nothing, so tune.scheduler={scheduler} would change nothing"
    remedy = "name in tune.mutate only what can: optim.lr, optim.lr_backbone"
    for name in space.mutated:
        for key in space.keys_that_follow_from((name,)):
            subject = key if key == name else f"{key} (through {name})"
            if not is_changeable(key):
                yield f"tune.space: {subject} cannot change while a trial trains; {remedy} and loss weights"
            elif name.startswith(f"{key}."):
                yield (
                    f"tune.space: {name} is a part of a schedule, which cannot change while a trial trains; search "
                    f"{key} as a number, or leave {name} out of tune.mutate"
                )
        distribution = space.parameters[name]
        if not distribution.is_numeric:
            yield f"tune.space: {name} has values that are no numbers, and cannot change while a trial trains"
        elif scheduler == "pb2" and distribution.kind not in ("uniform", "loguniform"):
            yield f"tune.space: {name}: pb2 needs uniform or loguniform, not {distribution.kind}"
        elif _can_freeze(space, name):
            yield (
                f"tune.space: {name}: optim.lr_backbone must not become 0 while a trial trains: 0 freezes the backbone"
            )


def _can_freeze(space: SearchSpace, name: str) -> bool:
    """Whether the backbone's rate becomes 0 at an end of a parameter's range, with other parameters in their middle."""
    if "optim.lr_backbone" not in space.keys_that_follow_from((name,)):
        return False
    for end in space.parameters[name].ends():
        try:
            found = space.resolve({**_middle(space), name: end})
        except ConfigError:
            continue  # reported with the values that are refused
        if found["optim.lr_backbone"] == 0:
            return True
    return False


def _middle(space: SearchSpace) -> dict[str, Any]:
    return {name: distribution.middle() for name, distribution in space.parameters.items()}


def _refused_values(config: Config, space: SearchSpace) -> tuple[list[str], list[str]]:
    """Errors for parameters whose values are all refused, and warnings for those with some."""
    middle = _middle(space)
    errors, warnings = [], []
    for name, distribution in space.parameters.items():
        ends = distribution.ends()
        faults = [_refusal(config, space, {**middle, name: value}, name) for value in ends]
        refused = [(value, fault) for value, fault in zip(ends, faults, strict=True) if fault is not None]
        lines = [f"tune.space: {name}: {shown(value)} is refused: {fault}" for value, fault in refused]
        if len(refused) == len(ends):
            errors += [f"{line}{_hint(distribution, line)}" for line in lines]
        else:
            warnings += lines
    return errors, warnings


def _refusal(config: Config, space: SearchSpace, drawn: Mapping[str, Any], name: str) -> str | None:
    """Why the configuration refuses a value, both alone and together with middle values of all others.

    Args:
        config: the base configuration.
        space: the space.
        drawn: the value, and the others'.
        name: of the parameter.
    """
    from detr_ray.search.space import with_values

    try:
        resolved = space.resolve(drawn)
    except ConfigError as error:
        return "; ".join(error.errors)
    own = space.keys_that_follow_from((name,))
    reasons = []
    for keys in ({key: resolved[key] for key in own}, resolved):
        try:
            with_values(config, keys)
        except ConfigError as error:
            reasons.append("; ".join(error.errors))
        else:
            return None
    return reasons[0]


def _hint(distribution: Distribution, line: str) -> str:
    is_whole = all(is_number(end) and float(end).is_integer() for end in distribution.ends())
    return "; use randint" if "whole number" in line and distribution.kind == "uniform" and is_whole else ""


def _combinations(space: SearchSpace) -> list[dict[str, Any]]:
    """All points of a grid; of other spaces, random values."""
    if all(distribution.kind == "grid" for distribution in space.parameters.values()):
        return space.grid_points()
    rng = random.Random(0)
    return [space.draw(rng) for _ in range(DRAWS_TRIED)]


def _fulfils(space: SearchSpace, values: Mapping[str, Any]) -> bool:
    """Whether values fulfil the constraints."""
    try:
        return not space.broken_constraints(values)
    except ConfigError:  # an expression that cannot be computed for these values
        return False
