"""What is logged of the loss: what was optimised, layer by layer, for any number of layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import fit_here, tiny_config

from detr_ray.engine.context import LocalContext
from detr_ray.engine.job import TrainJob, prepare_job
from detr_ray.engine.reporting.meters import Meters
from detr_ray.engine.reporting.progress import step_line
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.engine.training_step.step import StepOutcome, StepTimes
from detr_ray.structures import IMAGENET_PIXELS, to_device
from detr_ray.tracking import MemoryTracker


def loss_of_first_step(job: TrainJob) -> float:
    """The weighted total of the first global batch in one piece, from the criterion alone."""
    model, criterion = job.build_detector().model.train(), job.build_detector().criterion
    (padded,) = next(LocalBatches(job.data.plan(1, 0), *job.data.loaders()).train_batches(0, 1))
    batch = to_device(padded, torch.device("cpu"), IMAGENET_PIXELS)
    with torch.no_grad():
        return float(criterion.total(criterion(model(batch.images, batch.mask), batch.targets)))


@pytest.mark.parametrize(
    ("layers", "overrides"),
    [(1, ()), (3, ()), (6, ()), (8, ()), (3, ("model.aux_loss=false",)), (8, ("train.micro_batch_size=3",))],
)
def test_the_loss_that_is_logged_is_the_one_that_was_optimised(
    dataset: Path, tmp_path: Path, layers: int, overrides: tuple[str, ...]
) -> None:
    tracker = MemoryTracker()
    schedule = "loss.bbox={points: [[0, 5], [0.2, 10]], interpolation: constant}"
    size = ("data.augment.scales=[48]", "data.augment.max_size=72", "model.dropout=0", "train.max_steps=1")
    settings = (*size, schedule, f"model.decoder_layers={layers}")
    fit_here(tiny_config(dataset, tmp_path, *settings, *overrides), tracker)
    job = prepare_job(tiny_config(dataset, tmp_path, *settings, *overrides, "train.micro_batch_size=8"), print)
    logged = tracker.metrics[0][1]
    # Batch norm sees parts of the batch where it is accumulated.
    assert logged["train/loss"] == pytest.approx(loss_of_first_step(job), rel=0.02 if overrides else 1e-5)
    layers = 1 if "model.aux_loss=false" in overrides else layers
    suffixes = ["", *(f"_{layer}" for layer in range(layers - 1))]
    kinds = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    series = {f"train/{kind}{suffix}": weight for kind, weight in kinds.items() for suffix in suffixes}
    assert {name for name in logged if name.startswith("train/loss_")} == series.keys()
    total = sum(weight * logged[name] for name, weight in series.items())
    assert logged["train/loss"] == pytest.approx(total, rel=1e-5)
    phases = [logged[f"perf/{phase}_s"] for phase in ("data_wait", "forward", "loss", "backward", "update")]
    assert min(phases[1:]) > 0 and sum(phases) <= logged["perf/step_s"], "parts of the step's seconds"


def test_a_loss_schedule_counts_as_it_was_at_each_step(dataset: Path, tmp_path: Path) -> None:
    """The mean over an interval is that of what was optimised, not the last weights times the mean losses."""
    schedule = "loss.bbox={points: [[0, 5], [0.4, 100]], interpolation: constant}"
    settings = (schedule, "train.max_steps=3", "model.dropout=0")
    single, both = MemoryTracker(), MemoryTracker()
    fit_here(tiny_config(dataset, tmp_path, *settings), single)
    steps = [value for _, value in single.history("train/loss")]
    assert steps[2] > 3 * steps[1]
    fit_here(tiny_config(dataset, tmp_path, *settings, "train.log_every_steps=100"), both)
    assert [step for step, _ in both.history("train/loss")] == [1, 3]
    assert both.history("train/loss")[1][1] == pytest.approx((steps[1] + steps[2]) / 2, rel=1e-6)


def test_a_line_of_progress_counts_what_was_left_out() -> None:
    numbers = {"perf/step_s": 0.5, "perf/images_per_s": 32.0, "perf/data_wait_frac": 0.03, "optim/lr": 1e-4}
    lines = [
        step_line(numbers | {"train/skipped_steps": count, "train/bad_images": 3 - count}, 5, 10, 5)
        for count in (0.0, 1.0, 2.0)
    ]
    assert lines[0].endswith("left 2 s  (3 unreadable images left out)")
    assert lines[1].endswith("(1 update left out: not finite)  (2 unreadable images left out)")
    assert lines[2].endswith("(2 updates left out: not finite)  (1 unreadable image left out)")


def test_steps_without_losses_do_not_lower_their_means() -> None:
    meters = Meters(LocalContext(), 8)
    measured = StepOutcome(losses={"loss": torch.tensor(12.0), "class_error": torch.tensor(50.0)}, num_micro_batches=1)
    for outcome in (measured, StepOutcome(skipped=True, num_micro_batches=1)):
        meters.add(outcome)
    found = meters.metrics(meters.totals(StepTimes()))
    assert (found["train/loss"], found["train/class_error"], found["train/skipped_steps"]) == (12, 50, 1)
    before = {name: value for name, value in meters.totals(StepTimes()).items() if name != "measured"}
    meters.restart(before)  # of a checkpoint from before steps with losses were counted
    assert meters.metrics(meters.totals(StepTimes()))["train/loss"] == 6


def test_an_interval_without_losses_says_none(dataset: Path, tmp_path: Path) -> None:
    settings = ("optim.lr=1e18", "optim.lr_backbone=1e18", "optim.clip_max_norm=0", "train.on_nonfinite=skip")
    tracker = MemoryTracker()
    fit_here(tiny_config(dataset, tmp_path, *settings, "train.log_every_steps=3"), tracker, stop_after=4)
    logged = [step for step, values in tracker.metrics if "train/skipped_steps" in values]
    assert logged == [1, 3] and [step for step, _ in tracker.history("train/loss")] == [1]
