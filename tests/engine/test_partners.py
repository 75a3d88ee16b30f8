"""A size policy that makes each sample of two images: the same pairs whoever asks, and faults under their own ids."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from observing import without_validation
from streams import boxes_and_pixels, plans_by_position
from test_loop import assert_same_weights
from tiny import make_dataset, tiny_config

from detr_ray.data.planner import Planner
from detr_ray.data.sample import Instances, Partner, Picture, SamplePlan
from detr_ray.engine.checkpoints.store import CheckpointStore
from detr_ray.engine.context import LocalContext
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import TrainJob, prepare_job
from detr_ray.engine.loop import FitResult, TrainingLoop
from detr_ray.engine.stream.batches import LocalBatches, WorkerPlan
from detr_ray.tracking import MemoryTracker

WIDTH = 64
"""Pixels that the pictures of a pair are wide."""


@dataclasses.dataclass(frozen=True)
class Below:
    """Puts the picture of the only partner below the sample's own; both are brought to one width."""

    own: tuple[int, int]

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        upper, (lower,) = picture.resize(self.own), partners
        height = lower.instances.size[0]
        moved = lower.instances.boxes_xyxy_px + np.array([0, self.own[0], 0, self.own[0]], np.float32)
        boxes = np.concatenate([upper.instances.boxes_xyxy_px, moved])
        labels = np.concatenate([upper.instances.labels, lower.instances.labels])
        size = (self.own[0] + height, WIDTH)
        return Picture(torch.cat([upper.pixels, lower.pixels]), Instances(boxes, labels, size))


class Pairs:
    """A size policy: each sample with another image of its window below it."""

    draws_per_sample = 1

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, epoch: int) -> PlannedPairs:
        count = len(sizes)
        others = (np.arange(count) + 1 + (uniform[:, 0] * (count - 1)).astype(int)) % count
        return PlannedPairs(WIDTH * sizes[:, 0] // sizes[:, 1], others)


class PlannedPairs:
    def __init__(self, heights: np.ndarray, others: np.ndarray) -> None:
        self.heights, self.others = heights, others
        self.size = np.stack([heights + heights[others], np.full(len(heights), WIDTH)], axis=1).astype(np.int32)

    def steps_before_resize(self, places: np.ndarray) -> list[tuple[Below, ...]]:
        return [(Below((height, WIDTH)),) for height in self.heights[places].tolist()]

    def partners(self, places: np.ndarray) -> list[tuple[Partner, ...]]:
        return [(Partner(other, (int(self.heights[other]), WIDTH)),) for other in self.others[places].tolist()]


def planner_of(job: TrainJob, window: int = 4096) -> Planner:
    train = job.data.train
    assert train is not None
    return Planner(
        train.heights, train.widths, train.image_ids, seed=job.config.run.seed, size_policy=Pairs(), window=window,
        global_batch_size=job.config.train.global_batch_size,
    )  # fmt: skip


def batches_of(job: TrainJob, world_size: int = 1, rank: int = 0) -> LocalBatches:
    return LocalBatches(WorkerPlan(planner_of(job), lambda: [], world_size, rank, None), *job.data.loaders())


def train(job: TrainJob, stop_after: int | None = None) -> tuple[FitResult, TrainingLoop]:
    context = LocalContext(should_stop=lambda: stop_after is not None and loop.step + 1 >= stop_after)
    loop = TrainingLoop(job, context, batches_of(job), MemoryTracker())
    return loop.run(), loop


def job_of(dataset: Path, storage: Path, *overrides: str) -> TrainJob:
    config = tiny_config(dataset, storage, *overrides, *without_validation(dataset))
    return prepare_job(config, lambda line: None)


def test_partners_are_other_images_of_the_window(dataset: Path, tmp_path: Path) -> None:
    job = job_of(dataset, tmp_path)
    planner = planner_of(job, window=16)
    assert planner.window_bounds(0) == (0, 2, 4, 5)
    train = job.data.train
    assert train is not None
    pairs = set()
    for epoch in (0, 1):
        for start, end in ((0, 2), (2, 4), (4, 5)):
            steps = range(epoch * 5 + start, epoch * 5 + end)
            window = list(chain.from_iterable(planner.global_batch(step) for step in steps))
            members = {sample.index for sample in window}
            for sample in window:
                (partner,) = sample.partners
                assert partner.index in members - {sample.index}
                assert partner.image_id == train.image_ids[partner.index] and partner.position == sample.position
                assert sample.size[0] == sample.steps[0].own[0] + partner.size[0]
                pairs.add((epoch, sample.index, partner.index))
    assert {pair[1:] for pair in pairs if pair[0] == 0} != {pair[1:] for pair in pairs if pair[0] == 1}


def test_pairs_are_the_same_for_1_2_and_4_workers_and_wherever_one_begins(dataset: Path, tmp_path: Path) -> None:
    job = job_of(dataset, tmp_path)

    def plans(world_size: int, steps: Sequence[int]) -> dict[int, SamplePlan]:
        shares = [WorkerPlan(planner_of(job), lambda: [], world_size, rank, None) for rank in range(world_size)]
        return plans_by_position(shares, steps)

    alone = plans(1, range(10))
    assert sorted(alone) == list(range(80))
    assert plans(2, range(10)) == alone == plans(4, range(9, -1, -1))
    assert plans(2, range(7, 10)) == {position: plan for position, plan in alone.items() if position >= 56}

    def found(world_size: int) -> dict[int, tuple]:
        return boxes_and_pixels((batches_of(job, world_size, rank) for rank in range(world_size)), 6)

    assert found(1) == found(2) == found(4)


def test_going_on_with_pairs_is_never_having_stopped(dataset: Path, tmp_path: Path) -> None:
    assert train(job_of(dataset, tmp_path, "run.name=straight"))[0].status == "finished"
    assert train(job_of(dataset, tmp_path, "run.name=stopped"), stop_after=7)[0].step == 7
    assert train(job_of(dataset, tmp_path, "run.name=stopped"))[0].status == "finished"
    assert_same_weights(tmp_path / "straight", tmp_path / "stopped")


def test_an_unreadable_partner_is_counted_under_its_own_id(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data")
    job = job_of(dataset, tmp_path, "data.on_bad_image=skip", "run.name=a")
    plans = list(chain.from_iterable(planner_of(job).global_batch(step) for step in range(10)))
    own, partner = plans[0], plans[0].partners[0]
    files = job.data.train.file_names.to_pylist()
    (dataset / "train2017" / files[partner.index]).write_bytes(b"")

    (batch,) = next(iter(batches_of(job).train_batches(0, 1)))
    black = [plan.image_id for plan in plans[:8] if partner.index in plan.images]
    assert own.image_id in black and batch.image_ids.tolist() == [plan.image_id for plan in plans[:8]]
    assert batch.bad_image_ids.tolist() == [partner.image_id] * len(black)
    assert all(files[partner.index] in line for line in batch.bad_images)
    is_black = [not image.any() for image in batch.images]
    assert is_black == [partner.index in plan.images for plan in plans[:8]] and not batch.counts[is_black].any()

    (dataset / "train2017" / files[own.index]).write_bytes(b"")
    (batch,) = next(iter(batches_of(job).train_batches(0, 1)))
    assert batch.bad_image_ids[:2].tolist() == [own.image_id, partner.image_id], "both, if both cannot be read"

    result, loop = train(job)
    assert result.status == "finished" and loop.state.bad_image_ids == {own.image_id, partner.image_id}
    store = CheckpointStore(str(tmp_path / "a" / "checkpoints"))
    kept = store.load(store.latest(), "training.pt")["bad_image_ids"]
    assert kept == sorted([own.image_id, partner.image_id])
    with pytest.raises(RunFailed, match=r"2 different images could not be read"):
        train(job_of(dataset, tmp_path, "data.on_bad_image=skip", "data.max_bad_images=1", "run.name=b"))
    assert json.loads((tmp_path / "a" / "stream" / "rank-00000.jsonl").read_text().splitlines()[0])["image_ids"]
