"""Early stopping: the run ends after a step that follows from its scores alone, as a finished one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from observing import small_config
from scripted_scores import script_scores
from tiny import fit_here, make_dataset

from detr_ray.config import Config, ConfigError
from detr_ray.engine.early_stopping import EarlyStopping
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import prepare_job
from detr_ray.tracking import MemoryTracker
from detr_ray.train import main

AP = [0.1, 0.3, 0.2, 0.3, 0.9, 0.9]
"""With a patience of 2, the fourth evaluation is the last."""
END, STEPS = 4, 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes", num_train=4, num_val=2)


def configured(dataset: Path, folder: Path, *overrides: str) -> Config:
    """Epochs of one step."""
    keys = ("run.name=a", f"train.epochs={STEPS}", "train.early_stopping={patience: 2}", "train.log_every_steps=3")
    return small_config(dataset, folder, *keys, *overrides)


@pytest.mark.parametrize(
    ("values", "patience", "min_delta", "ends_at"),
    [
        ([0.1, 0.3, 0.2, 0.3, 0.9], 2, 0.0, 4),
        ([0.0, 0.0, 0.0], 2, 0.0, 3),
        ([0.1, 0.2, 0.3, 0.4], 1, 0.0, None),
        ([0.10, 0.14, 0.16, 0.20], 2, 0.05, None),
        ([0.10, 0.14, 0.15, 0.90], 2, 0.05, 3),
        ([0.5], 1, 0.0, None),
    ],
)
def test_it_ends_after_so_many_evaluations_without_a_better_score(
    values: list[float], patience: int, min_delta: float, ends_at: int | None
) -> None:
    rule = EarlyStopping(patience, min_delta, "val/AP", {})
    for number, value in enumerate(values, 1):
        assert not rule.verdict(1)
        may_end = rule.next_may_be_last
        rule.note(number, {"val/AP": value, "val/AP50": 1.0 - value})
        if rule.verdict(1):
            assert may_end and number == ends_at
            return
    assert ends_at is None


def test_only_scores_that_may_end_the_run_are_worth_waiting_for() -> None:
    rule, waits = EarlyStopping(2, 0.0, "val/AP", {}), []
    for number, value in enumerate(AP[:END]):
        waits.append(rule.next_may_be_last)
        rule.note(number, {"val/AP": value})
    assert waits == [False, False, False, True]


def test_an_evaluation_without_the_score_does_not_count() -> None:
    rule = EarlyStopping(1, 0.0, "val/AP", {10: {"val/AP": 0.25}})
    rule.note(20, {"val/seconds": 1.0})
    assert not rule.verdict(10) and rule.next_may_be_last
    rule.note(30, {"val/AP": 0.25})
    assert rule.verdict(10) == (
        "val/AP has not risen above 0.2500, which it had at epoch 1, in 1 validation (train.early_stopping)"
    )


def test_a_run_that_ends_early_is_finished_and_stays_so(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_scores(monkeypatch, {"AP": AP})
    tracker = MemoryTracker()
    result = fit_here(configured(dataset, tmp_path), tracker)
    assert (result.status, result.step, result.leave) == ("finished", END, None)
    assert "val/AP has not risen above 0.3000, which it had at epoch 2" in result.ended_early
    assert tracker.tags["run.ended_early"] == result.ended_early
    assert [step for step, _ in tracker.history("val/AP")] == [1, 2, 3, 4]
    assert [step for step, _ in tracker.history("train/loss")] == [1, 3, 4], "the steps before the end are logged too"
    assert result.best_checkpoint is not None and result.best_checkpoint.endswith("step_00000002")
    again = fit_here(configured(dataset, tmp_path))
    assert (again.status, again.step, again.ended_early) == ("nothing to do", END, result.ended_early)
    script_scores(monkeypatch, {"AP": AP[END:]})
    longer = fit_here(configured(dataset, tmp_path, "train.early_stopping={patience: 3}"))
    assert (longer.status, longer.step, longer.ended_early) == ("finished", STEPS, "")


def test_the_command_says_why_and_exits_as_after_a_whole_run(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script_scores(monkeypatch, {"AP": AP})
    config = tmp_path / "config.yaml"
    config.write_text(configured(dataset, tmp_path, "train.early_stopping={patience: 1}").to_yaml())
    reason = "val/AP has not risen above 0.3000, which it had at epoch 2, in 1 validation (train.early_stopping)"
    assert main(["--config", str(config)]) == 0
    printed = capsys.readouterr().out
    assert f"ending after step 3: {reason}" in printed and "finished 3 steps" in printed
    assert main(["--config", str(config)]) == 0
    printed = capsys.readouterr().out
    assert "nothing left to do: run a finished after step 3 before" in printed and f"ended early: {reason}" in printed


@pytest.mark.parametrize("stop_after", [2, 4])
def test_stopping_and_going_on_changes_nothing(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    """Where the run is stopped at its very end, the evaluation that decides is made up for.

    One checkpoint is kept, so that most of the scores are of checkpoints that are gone. Scores of later steps, which an
    earlier process came to before its checkpoints were lost, do not count.
    """
    config = configured(dataset, tmp_path, "train.keep_last=1")
    script_scores(monkeypatch, {"AP": AP})
    stopped = fit_here(config, stop_after=stop_after)
    assert (stopped.status, stopped.step) == ("stopped", stop_after)
    kept = tmp_path / "a" / "evaluations.json"
    content = json.loads(kept.read_text())
    content["scores"]["6"] = {"val/AP": 0.99}
    kept.write_text(json.dumps(content))
    script_scores(monkeypatch, {"AP": AP[stop_after - 1 :]})
    tracker = MemoryTracker()
    result = fit_here(config, tracker)
    assert (result.status, result.step) == ("finished", END)
    assert tracker.tags["run.ended_early"] == result.ended_early != ""


def test_scores_of_other_validation_data_do_not_count(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_scores(monkeypatch, {"AP": [0.9, 0.8]})
    fit_here(configured(dataset, tmp_path), stop_after=2)
    script_scores(monkeypatch, {"AP": [0.1, 0.2, 0.3, 0.4, 0.5]})
    result = fit_here(configured(dataset, tmp_path, "eval.size=64"))
    assert (result.step, result.ended_early) == (STEPS, "")


def test_a_damaged_file_of_scores_is_named(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script_scores(monkeypatch, {"AP": AP})
    fit_here(configured(dataset, tmp_path), stop_after=2)
    scores = tmp_path / "a" / "evaluations.json"
    assert list(json.loads(scores.read_text())["scores"]) == ["1"]
    scores.write_text("{")
    with pytest.raises(RunFailed, match=r"evaluations.json is damaged .* remove it"):
        fit_here(configured(dataset, tmp_path))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.early_stopping={metric: val/loss}",), "validations give no val/loss; there are val/AP, val/AP50"),
        (("train.early_stopping={metric: val/AP/horse}",), "or a class"),
        (("eval.every_epochs=0",), "needs eval.every_epochs of at least 1"),
        (("data.root=null", "data.train={annotations: a, images: b}"), "needs validation images: set data.val"),
    ],
)
def test_what_cannot_be_is_refused(dataset: Path, tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.early_stopping") as refused:
        prepare_job(configured(dataset, tmp_path, *overrides), lambda line: None)
    assert message.replace("or a class", "val/AP/NAME for a class (") in str(refused.value)
    prepare_job(configured(dataset, tmp_path, "train.early_stopping={metric: val/AP/ring}"), lambda line: None)
