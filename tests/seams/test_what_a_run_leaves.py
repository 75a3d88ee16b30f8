"""What a run leaves: checkpoints at their steps, the best and the last, and what the tracker and Ray are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from observing import Observed, observe, prepare, run, small_config, without_validation
from tiny import make_dataset

from detr_ray.engine import loop as loop_module


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes", num_train=16, num_val=4)


@pytest.fixture(scope="module")
def validated(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """Three epochs of four steps with a validation each, of which one is kept beside the best."""
    settings = ("train.epochs=3", "optim.lr=1e-3", "optim.lr_backbone=1e-3", "train.keep_last=1", "run.name=a")
    return observe(small_config(dataset, tmp_path_factory.mktemp("runs"), *settings))


def test_each_validation_is_tracked_reported_and_noted_in_its_checkpoint(validated: Observed) -> None:
    assert [step for step, _ in validated.tracker.history("val/AP")] == [4, 8, 12]
    assert [report["val/AP"] for report in validated.reports] == validated.metric("val/AP")
    for info in validated.store.checkpoints():
        place = [4, 8, 12].index(info.step)
        assert info.metrics is not None and info.metrics["val/AP"] == validated.metric("val/AP")[place]
        assert info.metrics["val/AR100"] == validated.metric("val/AR100")[place]
        assert info.metrics["val/AP/rectangle"] == validated.metric("val/AP/rectangle")[place], (
            "what a search may compare"
        )
    names = {path for path in validated.tracker.texts if path.startswith("evaluation/")}
    assert names == {f"evaluation/epoch_{epoch:07.2f}.txt" for epoch in (1, 2, 3)}
    assert all(
        "AP50" in validated.tracker.texts[name] and "rectangle" in validated.tracker.texts[name] for name in names
    )


def test_the_best_and_the_last_checkpoint_stay_and_are_tracked(validated: Observed) -> None:
    scores = validated.metric("val/AP")
    best = 4 * (scores.index(max(scores)) + 1)
    kept = [info.step for info in validated.store.checkpoints()]
    assert kept == sorted({best, 12})
    result = validated.result
    assert result is not None and result.best_checkpoint is not None
    assert result.best_checkpoint.endswith(f"step_{best:08d}") and result.best_metrics["val/AP"] == max(scores)
    assert result.metrics["val/AP"] == scores[-1] and result.table.startswith("AP ")
    files = [(Path(path).parent.name, folder) for path, folder in validated.tracker.files]
    assert [name for name, folder in files if folder == "checkpoints/best"][-1] == f"step_{best:08d}"
    assert files[-1] == ("step_00000012", "checkpoints/last")
    tracked = json.loads(validated.tracker.texts["checkpoints/best/manifest.json"])
    (info,) = [info for info in validated.store.checkpoints() if info.step == best]
    assert tracked["files"] == {"model.pt": info.files["model.pt"]} and tracked["metrics"] == info.metrics
    assert tracked["details"]["origin"]["run_id"] == validated.job.run.run_id
    assert sum("(best so far)" in line for line in validated.lines) == sum(
        all(score > earlier for earlier in scores[:place]) for place, score in enumerate(scores)
    )


def test_short_epochs_without_a_validation_share_a_checkpoint(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of the first epoch that is at least so many steps behind the last checkpoint, and at the end."""
    assert loop_module.MIN_STEPS_BETWEEN_CHECKPOINTS == 100
    monkeypatch.setattr(loop_module, "MIN_STEPS_BETWEEN_CHECKPOINTS", 8)
    settings = ("train.epochs=5", "train.keep_last=9", *without_validation(dataset))
    seen = observe(small_config(dataset, tmp_path, *settings))
    assert [info.step for info in seen.store.checkpoints()] == [8, 16, 20]


def test_a_run_that_is_asked_to_stop_leaves_a_checkpoint_of_that_step(dataset: Path, tmp_path: Path) -> None:
    seen = run(prepare(small_config(dataset, tmp_path, "run.name=a", *without_validation(dataset))), stop_after=3)
    assert seen.result is not None and (seen.result.status, seen.result.leave, seen.result.step) == (
        "stopped",
        "asked",
        3,
    )
    assert [info.step for info in seen.store.checkpoints()] == [3]
    assert not [folder for _, folder in seen.tracker.files if folder == "checkpoints/last"], "there is more to come"
    again = run(prepare(small_config(dataset, tmp_path, "run.name=a", *without_validation(dataset))), stop_after=1)
    assert again.result is not None and again.result.status == "finished", "asked at the last step, it is the end"


def test_progress_is_said(validated: Observed) -> None:
    said = [line for line in validated.lines if "step " in line]
    assert len(said) == 12 and "step 12/12" in said[-1]
    for line, loss, rate in zip(said, validated.metric("train/loss"), validated.metric("optim/lr"), strict=True):
        assert f"loss {loss:.3f}" in line and f"lr {rate:.1e}" in line
    images = validated.metric("perf/images_per_s")
    assert [4 / value for value in images] == pytest.approx(validated.metric("perf/step_s"))
