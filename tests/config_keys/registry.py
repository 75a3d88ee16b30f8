"""Which case shows what a configuration key does. A case sets the key to a value that is not its default, and sees the
difference where the key is used; that it is stored is not enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from observing import Observed, observe, prepare, small_config, without_validation

from detr_ray.config import Config
from detr_ray.data.sample import SamplePlan
from detr_ray.engine.job import TrainJob, prepare_job
from detr_ray.model.detr import Detr


@dataclass(frozen=True)
class Place:
    """What a case works with.

    Attributes:
        data: a data set of 16 training and 4 validation images of 40 to 90 pixels, in COCO's layout.
        folder: an empty folder.
    """

    data: Path
    folder: Path

    def config(self, *overrides: str) -> Config:
        """The smallest training, with changes."""
        return small_config(self.data, self.folder / "runs", *overrides)

    def job(self, *overrides: str) -> TrainJob:
        return prepare_job(self.config(*overrides), lambda line: None)

    def model(self, *overrides: str) -> Detr:
        return self.job(*overrides).build_detector().model

    def samples(self, *overrides: str, steps: int = 4) -> list[SamplePlan]:
        """What is planned for the first steps."""
        plan = self.job(*overrides).data.plan(1, 0)
        return [sample for step in range(steps) for batch in plan.step(step) for sample in batch]

    def train(self, *overrides: str, stop_after: int | None = None) -> Observed:
        """Trains without validation, and notes what happens."""
        roots = [item.partition("=")[2] for item in overrides if item.startswith("data.root=")]
        data = without_validation(Path(roots[-1]) if roots else self.data)
        rest = [item for item in overrides if not item.startswith("data.root=")]
        return observe(self.config(*data, *rest), stop_after)

    def train_and_validate(self, *overrides: str) -> Observed:
        """Trains with a validation at the end of each epoch, and notes what happens."""
        return observe(self.config(*overrides))

    def start(self, *overrides: str) -> Observed:
        """A loop before its first step."""
        return prepare(self.config(*overrides))


Case = Callable[..., None]
CASES: dict[str, Case] = {}
"""Key -> the case that shows what it does."""
RAY_CASES: dict[str, Case] = {}
"""The same for keys that mean something on Ray alone; these cases find a Ray running."""


def shows(*keys: str, on_ray: bool = False) -> Callable[[Case], Case]:
    """Says which keys a case shows; it is called once for each."""

    def register(case: Case) -> Case:
        for key in keys:
            assert key not in CASES and key not in RAY_CASES, f"{key} has two cases"
            (RAY_CASES if on_ray else CASES)[key] = case
        return case

    return register


def same_weights(a: Any, b: Any) -> bool:
    """Whether two models, or their states, are equal to the last bit."""
    first, second = (x.state_dict() if hasattr(x, "state_dict") else x for x in (a, b))
    return first.keys() == second.keys() and all(bool((value == second[name]).all()) for name, value in first.items())
