"""What two workers do together besides the gradient: running statistics, shares of data, metrics, one validation.

Each is a loop in a thread of this process; they exchange what they exchange over a barrier. That gradients are averaged
and that it works between processes is shown in ``tests/engine/test_workers.py`` and ``tests/runtime``.
"""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from observing import small_config
from tiny import make_dataset
from torch import Tensor

from detr_ray.engine.context import LocalContext
from detr_ray.engine.job import TrainJob, prepare_job
from detr_ray.engine.loop import TrainingLoop
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.tracking import MemoryTracker


class Exchange:
    """Where two threads leave what the other one is to get."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=120)
        self.items: list[Any] = [None, None]

    def all(self, rank: int, item: Any) -> list[Any]:
        self.items[rank] = copy.deepcopy(item)
        self.barrier.wait()
        found = list(self.items)
        self.barrier.wait()
        return found


class OneOfTwo(LocalContext):
    """A worker's context; notes its running statistics as each step's images left them."""

    world_size = 2

    def __init__(self, exchange: Exchange, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.exchange = exchange
        self.loop: TrainingLoop | None = None
        self.before: dict[str, Tensor] = {}

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        one, two = self.exchange.all(self.rank, values)
        return values.copy_(one + two)

    def gather(self, item: Any) -> list[Any]:
        return self.exchange.all(self.rank, item)

    def gather_to_first(self, item: Any) -> list[Any] | None:
        items = self.exchange.all(self.rank, item)
        return items if self.rank == 0 else None

    def broadcast(self, item: Any) -> Any:
        return self.exchange.all(self.rank, item)[0]

    def enter(self, phase: Any, step: int) -> None:
        if phase == "update" and self.loop is not None:
            self.before = statistics(self.loop)


def statistics(loop: TrainingLoop) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in loop.model.named_buffers() if "running" in name}


class Pair:
    """Two loops of one run, at their end."""

    def __init__(self, job: TrainJob) -> None:
        exchange = Exchange()
        self.job, self.errors = job, []
        self.contexts = [OneOfTwo(exchange, rank) for rank in (0, 1)]
        self.trackers = [MemoryTracker(), MemoryTracker()]
        self.loops: list[TrainingLoop] = [None, None]  # type: ignore[list-item]
        threads = [threading.Thread(target=self._train, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not self.errors, self.errors

    def _train(self, rank: int) -> None:
        try:
            batches = LocalBatches(self.job.data.plan(2, rank), *self.job.data.loaders())
            loop = TrainingLoop(self.job, self.contexts[rank], batches, self.trackers[rank])
            self.loops[rank] = self.contexts[rank].loop = loop
            loop.run()
        except BaseException as error:
            self.errors.append(error)
            self.contexts[rank].exchange.barrier.abort()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("two")
    data = make_dataset(folder / "shapes", num_train=16, num_val=5, image_size=(40, 90))
    settings = ("optim.ema_decay=0.5", "optim.lr=1e-2", "optim.lr_backbone=1e-2", "train.num_workers=null")
    job = prepare_job(small_config(data, folder, *settings), lambda line: None)
    (Path(job.run.path) / "stream").mkdir(exist_ok=True)
    return Pair(job)


def test_a_checkpoint_has_the_mean_of_both_workers_running_statistics(pair: Pair) -> None:
    one, two = (context.before for context in pair.contexts)
    assert one and any(not torch.equal(value, two[name]) for name, value in one.items())
    info = pair.job.run.checkpoints.latest()
    assert info is not None
    saved = pair.job.run.checkpoints.load(info, "model.pt")
    for name, value in one.items():
        torch.testing.assert_close(saved["model"][name], (value + two[name]) / 2)
        assert torch.equal(saved["ema"][name], saved["model"][name]), "the average has those of training"
    for loop, own in zip(pair.loops, (one, two), strict=True):
        assert all(torch.equal(value, own[name]) for name, value in statistics(loop).items()), (
            "which go on as they were"
        )


def test_only_the_first_worker_tracks_and_its_numbers_are_of_both(pair: Pair) -> None:
    first, second = pair.trackers
    assert not second.metrics and not second.files and not second.texts
    assert len(first.history("train/loss")) == 4
    plans = [pair.job.data.plan(2, rank) for rank in (0, 1)]
    for step in range(4):
        shares = [plan.step(step) for plan in plans]
        assert [[len(batch) for batch in share] for share in shares] == [[2], [2]]
        padded = sum(
            len(batch) * max(s.size[0] for s in batch) * max(s.size[1] for s in batch)
            for share in shares for batch in share
        )  # fmt: skip
        images = sum(s.size[0] * s.size[1] for share in shares for batch in share for s in batch)
        assert first.history("perf/padding_frac")[step][1] == pytest.approx(1 - images / padded)


def test_every_validation_image_is_seen_once_by_one_of_them(pair: Pair) -> None:
    seen = [s.image_id for rank in (0, 1) for batch in pair.job.data.plan(2, rank).evaluation for s in batch]
    val = pair.job.data.val
    assert val is not None and sorted(seen) == sorted(val.image_ids.tolist())
    assert [step for step, _ in pair.trackers[0].history("val/seconds")] == [4]
    assert [loop.step for loop in pair.loops] == [4, 4]
