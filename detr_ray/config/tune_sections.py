"""The ``tune`` section: what a search varies, how it chooses, and how long it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from detr_ray.config.fields import Count, CountOrZero, Name, Positive, Section, Seed, Share, Text, Violation, Whole


class TuneConfig(Section):
    """A search over settings: `python -m detr_ray.tune`. Each trial is a whole training with the rest of this
    configuration. A training alone does not use this section.
    """

    name: Name | None = None
    """Name of the search, and of its folder in `run.storage`. An existing search is continued with `--resume` only.
    null: a new, unique name."""
    space: dict[str, Any] = Field(default={})
    """What is searched: key -> distribution. `{uniform: [a, b]}`, `{loguniform: [a, b]}`, `{quniform: [a, b, step]}`,
    `{randint: [a, b]}` (b included), `{choice: [...]}`, `{grid: [...]}`, or `{expression: "optim.lr * factor"}`. A
    distribution may stand inside of a schedule or a list: `loss.giou: {points: [[0, 2], [20, {uniform: [1, 4]}]]}`.
    A name without a dot is a variable of its own, for expressions."""
    constraints: tuple[Text, ...] = ()
    """Expressions that must hold for every trial, such as `optim.lr_backbone <= optim.lr`."""
    trials: Count = 8
    """Number of trials. With `tune.searcher=grid` each point of the grid is one trial, and this number must not be
    smaller than that of the points."""
    searcher: Literal["random", "grid", "tpe"] = "random"
    """How values are chosen. `random`: independently. `grid`: every combination of the grids once. `tpe`: near those
    that were good so far (Optuna's TPE; needs the package optuna)."""
    scheduler: Literal["none", "asha", "median", "pbt", "pb2"] = "none"
    """What happens with trials while they train. `none`: all train to the end. `asha`: at a few stages, only the best
    share goes on. `median`: a trial that is worse than the median of the others is stopped. `pbt`: bad trials go on
    from a copy of a good one, with changed values. `pb2`: the same, with new values from a model of what was good
    (needs the package scikit-learn)."""
    metric: Text = "val/AP"
    """The metric of the validation by which trials are compared. The best checkpoint of each
    trial is the one with the highest AP all the same, as in every training."""
    mode: Literal["max", "min"] = "max"
    """Whether a larger or a smaller metric is better."""
    grace_epochs: Count = 1
    """With `asha` and `median`: epochs before a trial may be stopped."""
    reduction_factor: Annotated[Whole, Field(ge=2)] = 3
    """With `asha`: one of so many trials goes on at each stage, and each stage is so many times longer."""
    perturb_every_epochs: Count = 1
    """With `pbt` and `pb2`: epochs between two comparisons of the trials."""
    mutate: tuple[Text, ...] | None = None
    """With `pbt` and `pb2`: the parameters that change during training. Only learning rates and loss weights can; a
    moved trial takes the other parameters from the trial from which it goes on. null: all parameters of the space."""
    perturb_factors: tuple[Positive, Positive] = (0.8, 1.25)
    """With `pbt`: a number changes by one of these two factors."""
    resample_probability: Share = 0.25
    """With `pbt`: probability that a value is drawn anew instead."""
    quantile: Annotated[Positive, Field(le=0.5)] = 0.25
    """With `pbt` and `pb2`: share of the trials that count as bad, and share that count as good."""
    max_concurrent: Count | None = None
    """Largest number of trials at the same time. null: as many as the cluster has room for."""
    time_budget_s: Positive | None = None
    """Seconds after which the search starts no more trials and stops those that run. null: no limit."""
    seed: Seed = 0
    """Seed of the draws. The same seed gives the same trials."""
    max_trial_failures: CountOrZero = 1
    """Number of times that a failed trial is started again before it counts as failed."""

    def rules(self) -> Iterator[Violation]:
        """One factor makes smaller, the other larger; a key is named once."""
        smaller, larger = self.perturb_factors
        if not smaller < 1 < larger:
            yield Violation(("perturb_factors",), "must be one number below 1, then one above 1")
        if self.mutate is not None and len(set(self.mutate)) < len(self.mutate):
            yield Violation(("mutate",), "must name each parameter once")
