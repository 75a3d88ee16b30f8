"""`data.augment.transforms`: each name and each parameter does something, and the samples are the same whoever asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from observing import without_validation
from streams import boxes_and_pixels, plans_by_position
from test_loop import assert_same_weights
from tiny import make_dataset, tiny_config

from detr_ray.config import AugmentConfig
from detr_ray.config.transform_sections import TRANSFORMS
from detr_ray.data.planner import Planner
from detr_ray.data.sample import SamplePlan
from detr_ray.engine.context import LocalContext
from detr_ray.engine.job import TrainJob, prepare_job
from detr_ray.engine.loop import FitResult, TrainingLoop
from detr_ray.engine.stream.augmentation import augmentation_of
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.tracking import MemoryTracker

OTHER_VALUES = {
    "photometric": {"brightness": 0.9, "contrast": 0.1, "saturation": 0.1, "hue": 0.5, "channel_order": 1.0},
    "grayscale": {},
    "blur": {"sigma": (3.0, 4.0)},
    "jpeg": {"quality": (1, 2)},
    "horizontal_flip": {},
    "vertical_flip": {},
    "rotate90": {"turns": (2,)},
    "zoom_out": {"scale": (1.5, 1.6), "fill_value": 7},
    "iou_crop": {"scale": (0.5, 0.6), "aspect": (0.9, 1.1), "min_iou": (0.4,)},
    "scale_jitter": {"size": 99, "scale": (0.9, 1.1), "fill_value": 7},
    "cutout": {"holes": (4, 4), "size": (0.5, 0.6), "fill_value": 7, "min_visible": 0.9},
    "mosaic": {"centre": (0.5, 0.5), "zoom": (2.0, 2.0), "min_visible": 0.9},
    "mixup": {"weight": (0.1, 0.2)},
    "copy_paste": {"max_objects": 9, "min_visible": 0.1},
}
NAMES = [transform.name for transform in TRANSFORMS if transform.name != "detr"]
SIZES = np.random.default_rng(0).integers(40, 160, (32, 2))


def plans_of(name: str, parameters: dict) -> list[SamplePlan]:
    chance = {} if name == "scale_jitter" else {"p": 1.0}
    last = [] if name == "scale_jitter" else ["detr"]
    augment = AugmentConfig(transforms=[{name: chance | parameters}, *last])
    planner = Planner(
        SIZES[:, 0], SIZES[:, 1], np.arange(32), seed=1, global_batch_size=32, size_policy=augmentation_of(augment)
    )  # fmt: skip
    return sorted(planner.global_batch(0), key=lambda sample: sample.index)


def done(sample: SamplePlan) -> tuple:
    return sample.size, sample.steps, tuple((p.index, p.size, p.steps) for p in sample.partners)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_does_something(name: str) -> None:
    section = next(transform for transform in TRANSFORMS if transform.name == name)
    parameters = set(section.model_fields) - {"p", "until_epoch"}
    assert parameters == set(OTHER_VALUES[name]), "a parameter without another value to try"
    plain = [done(sample) for sample in plans_of(name, {})]
    original = plans_of("horizontal_flip", {"p": 0.0})
    assert sum(a != done(b) for a, b in zip(plain, original, strict=True)) >= 30
    for parameter, value in OTHER_VALUES[name].items():
        changed = [done(sample) for sample in plans_of(name, {parameter: value})]
        assert sum(a != b for a, b in zip(plain, changed, strict=True)) >= 10, parameter


SEVERAL = "data.augment.transforms=[mosaic: {p: 0.7}, mixup: {p: 0.5, until_epoch: 1}, copy_paste, photometric, detr]"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes", num_train=24)


def job_of(dataset: Path, storage: Path, *overrides: str) -> TrainJob:
    return prepare_job(
        tiny_config(dataset, storage, SEVERAL, *overrides, *without_validation(dataset)), lambda line: None
    )


def test_samples_of_several_images_are_the_same_for_1_2_and_4_workers_and_wherever_one_begins(
    dataset: Path, tmp_path: Path
) -> None:
    def plans(world_size: int, steps: Sequence[int]) -> dict[int, SamplePlan]:
        data = job_of(dataset, tmp_path).data
        return plans_by_position([data.plan(world_size, rank) for rank in range(world_size)], steps)

    alone = plans(1, range(9))
    assert sorted(alone) == list(range(72)) and {len(plan.partners) for plan in alone.values()} >= {0, 1, 3, 4, 5}
    assert plans(2, range(9)) == alone == plans(4, range(8, -1, -1))
    assert plans(2, range(7, 9)) == {position: plan for position, plan in alone.items() if position >= 56}

    def batches(world_size: int) -> Iterator[LocalBatches]:
        for rank in range(world_size):
            data = job_of(dataset, tmp_path).data
            yield LocalBatches(data.plan(world_size, rank), *data.loaders())

    assert boxes_and_pixels(batches(1), 2) == boxes_and_pixels(batches(2), 2) == boxes_and_pixels(batches(4), 2)


def test_going_on_with_mosaics_is_never_having_stopped(dataset: Path, tmp_path: Path) -> None:
    def train(name: str, stop_after: int | None = None) -> FitResult:
        job = job_of(dataset, tmp_path, f"run.name={name}")
        context = LocalContext(should_stop=lambda: stop_after is not None and loop.step + 1 >= stop_after)
        loop = TrainingLoop(job, context, LocalBatches(job.data.plan(1, 0), *job.data.loaders()), MemoryTracker())
        return loop.run()

    assert train("straight").status == "finished"
    assert train("stopped", stop_after=4).step == 4
    assert train("stopped").status == "finished"
    assert_same_weights(tmp_path / "straight", tmp_path / "stopped")
