"""Batches that are loaded in the process that trains."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import make_dataset, tiny_config

from detr_ray.data.loader import BatchLoader
from detr_ray.data.sample import SamplePlan
from detr_ray.engine.hooks import JobHooks
from detr_ray.engine.job import prepare_job
from detr_ray.engine.stream.batches import load_ahead
from detr_ray.runtime.launch import run_job


def test_a_run_in_this_process_loads_as_many_batches_ahead_as_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many whole steps as have these batches; the step that is taken is one more."""
    dataset = make_dataset(tmp_path / "data", num_val=1)
    loaded: list[int] = []
    load = BatchLoader.load

    def note(self: BatchLoader, samples: Sequence[SamplePlan]) -> Any:
        batch = load(self, samples)
        loaded.extend(sample.position for sample in samples)
        return batch

    give_up = time.monotonic() + 30

    def wait(step: int) -> None:
        """In the first step, as long as it takes to load them, and longer."""
        while 0 < len(loaded) < 8 * 4 and time.monotonic() < give_up:
            time.sleep(0.05)
        time.sleep(0.1 if loaded else 0)

    monkeypatch.setattr(BatchLoader, "load", note)
    config = tiny_config(dataset, tmp_path / "runs", "data.prefetch_batches=6", "train.micro_batch_size=4")
    run_job(prepare_job(config, lambda line: None), JobHooks(on_step=wait, should_abandon=lambda: True))
    assert loaded == list(range(8 * 4))


def test_batches_that_nobody_waits_for_are_not_loaded() -> None:
    begun: list[int] = []

    def load(number: int) -> int:
        begun.append(number)
        time.sleep(0.05)
        return number

    batches = load_ahead(load, range(20), prefetch=10)
    assert next(batches) == 0
    batches.close()  # type: ignore[attr-defined]
    assert len(begun) < 10
