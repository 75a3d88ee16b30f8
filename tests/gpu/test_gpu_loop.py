"""The training loop on a device, without Ray, MLflow and files: it ends, goes on, evaluates and resumes."""

from __future__ import annotations

import pytest
import torch
from drawn import DrawnJob, deviation

from detr_ray.engine.context import LocalContext
from detr_ray.engine.loop import TrainingLoop
from detr_ray.engine.reporting.progress import FitResult


class Metrics:
    """Keeps the metrics of a run; those who keep more need more packages."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics.append((step, metrics))

    def log_text(self, text: str, name: str) -> None:
        pass

    def log_file(self, path: str, folder: str) -> None:
        pass

    def sync(self) -> None:
        pass


def train(job: DrawnJob, device: torch.device, stop_after: int | None = None) -> tuple[FitResult, Metrics]:
    steps = 0

    def should_stop() -> bool:
        nonlocal steps
        steps += 1
        return steps == stop_after

    tracker = Metrics()
    loop = TrainingLoop(job, LocalContext(device, should_stop=should_stop), job, tracker)  # type: ignore[arg-type]
    return loop.run(), tracker


def weights(job: DrawnJob) -> dict[str, torch.Tensor]:
    store = job.run.checkpoints
    return store.load(store.latest(), "model.pt")["model"]


def losses(tracker: Metrics) -> dict[int, float]:
    return {step: values["train/loss"] for step, values in tracker.metrics if "train/loss" in values}


def test_a_run_ends_with_its_scores(
    placed: tuple[torch.device, str],
) -> None:
    device, precision = placed
    job = DrawnJob("train.epochs=2", f"train.precision={precision}", "optim.ema_decay=0.9", validates=True)
    result, tracker = train(job, device)
    assert (result.status, result.step) == ("finished", 4)
    assert losses(tracker).keys() == {1, 2, 3, 4}
    assert [step for step, values in tracker.metrics if "val/AP" in values] == [2, 4]
    assert "val/AP" in result.metrics
    model_file = job.run.checkpoints.load(job.run.checkpoints.latest(), "model.pt")
    assert all(torch.isfinite(value).all() for value in model_file["ema"].values())


def test_losses_are_those_of_the_cpu(device: torch.device) -> None:
    found = [losses(train(DrawnJob("train.epochs=2"), place)[1]) for place in (torch.device("cpu"), device)]
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(device: torch.device) -> None:
    check_resume(device, "fp32")


def test_a_run_in_fp16_goes_on_with_its_scale(gpu: torch.device) -> None:
    check_resume(gpu, "fp16")


def check_resume(device: torch.device, precision: str) -> None:
    settings = ("train.epochs=2", f"train.precision={precision}", "model.dropout=0.1", "optim.ema_decay=0.9")
    whole, parts = DrawnJob(*settings), DrawnJob(*settings)
    _, undisturbed = train(whole, device)
    stopped, _ = train(parts, device, stop_after=1)
    assert (stopped.status, stopped.step) == ("stopped", 1)
    result, rest = train(parts, device)
    assert (result.status, result.step) == ("finished", 4)
    expected = {step: loss for step, loss in losses(undisturbed).items() if step > 1}
    assert losses(rest) == pytest.approx(expected, rel=1e-3)  # sums on GPUs have no fixed order
    assert deviation(weights(parts), weights(whole)) < 1e-3
