"""What a process of data tasks keeps from one task to the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from tiny import make_dataset, tiny_config

from detr_ray.data.planner import Planner
from detr_ray.engine.job import prepare_job
from detr_ray.runtime.datasets import EVALUATION, TRAIN, PlannedBatches, RayBatches

RANKS, STEPS = 16, 3


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("shared_ray")
def test_a_process_that_serves_many_workers_plans_each_window_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(tmp_path / "shapes", num_train=48, num_val=20)
    settings = (f"train.global_batch_size={RANKS}", "eval.batch_size=1", "train.epochs=1")
    data = prepare_job(tiny_config(dataset, tmp_path, *settings), lambda line: None).data

    planned: list[Any] = []
    plan_window = Planner._plan_window

    def counted(planner: Planner, epoch: int, number: int, **options: bool) -> Any:
        planned.append((epoch, number))
        return plan_window(planner, epoch, number, **options)

    monkeypatch.setattr(Planner, "_plan_window", counted)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # that of this process stays
    reference = ray.put(data)

    def images(split: str, rank: int, row: int) -> list[int]:
        tables = PlannedBatches(reference, split, RANKS, rank, 1, 0)(pa.table({"id": [row]}))
        return [number for table in tables for number in table["image_ids"][0].as_py()]

    train = [[i for rank in range(RANKS) for i in images(TRAIN, rank, step)] for step in range(STEPS)]
    evaluation = [images(EVALUATION, rank, 0) for rank in range(RANKS)]
    assert planned == [(0, 0)], "the epoch is one window, and is planned once for all workers"
    plan = data.plan(1, 0)
    assert train == [[sample.image_id for batch in plan.step(step) for sample in batch] for step in range(STEPS)]
    first = [batches[0] for rank in range(RANKS) if (batches := data.plan(RANKS, rank).evaluation)]
    assert evaluation == [[sample.image_id for sample in batch] for batch in first]
    # What is found out about memory only when the workers are there (`train.micro_batch_size=auto`).
    source = RayBatches(data, reference, world_size=2, rank=1)
    source.limit_micro_batches(3)
    found = [[batch.image_ids.tolist() for batch in step] for step in source.train_batches(1, 2)]
    assert found == [[[sample.image_id for sample in batch] for batch in data.plan(2, 1, 3).step(1)]]
    assert [len(batch) for batch in found[0]] == [3, 3, 2]
