"""Scoring beside training: nothing waits for it, nothing depends on when it is done, and nothing of it is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import fit_here, make_dataset, tiny_config

from detr_ray.engine.batches import LocalBatches
from detr_ray.engine.context import LocalContext, Phase
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import prepare_job
from detr_ray.engine.loop import FitResult, TrainingLoop
from detr_ray.evaluation import apart
from detr_ray.tracking import MemoryTracker

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes")


class Witness(LocalContext):
    """Notes what the loop does, says and reports, in its order; lets scoring go on when a line is said."""

    def __init__(self, go_on_at: str = "") -> None:
        self.reports: list[dict[str, float]] = []
        super().__init__(say=self._heard, on_report=self.reports.append)
        self.go_on_at = go_on_at
        self.go_on: Path | None = None
        self.lines: list[str] = []
        self.phases: list[tuple[Phase, int]] = []

    def _heard(self, line: str) -> None:
        self.lines.append(line)
        if self.go_on_at and self.go_on_at in line:
            assert self.go_on is not None
            self.go_on.touch()

    def enter(self, phase: Phase, step: int) -> None:
        self.phases.append((phase, step))

    def line_with(self, part: str) -> int:
        (number,) = [number for number, line in enumerate(self.lines) if part in line]
        return number


def train(config_dataset: Path, storage: Path, witness: Witness, *overrides: str) -> tuple[FitResult, MemoryTracker]:
    job = prepare_job(tiny_config(config_dataset, storage, "run.name=a", *overrides), lambda line: None)
    tracker = MemoryTracker()
    batches = LocalBatches(job.data.plan(1, 0), *job.data.loaders())
    return TrainingLoop(job, witness, batches, tracker).run(), tracker


def scorer(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """The process that scores does something else first."""
    scoring = "from detr_ray.evaluation.apart import main; main()"
    monkeypatch.setattr(apart, "COMMAND", (sys.executable, "-c", f"{first}\n{scoring}"))


def hold_scores(monkeypatch: pytest.MonkeyPatch, witness: Witness, folder: Path) -> None:
    """Scoring begins, and ends when the witness lets it."""
    witness.go_on = folder / "go_on"
    scorer(monkeypatch, f"import os, time\nwhile not os.path.exists({str(witness.go_on)!r}): time.sleep(0.05)")


def manifest_metrics(storage: Path, step: int) -> dict[str, float]:
    return json.loads((storage / "a" / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())["metrics"]


def test_training_goes_on_while_scoring_takes_long(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = Witness()
    _, expected = train(dataset, tmp_path / "at_once", at_once)
    late = Witness(go_on_at="step 8/10")
    hold_scores(monkeypatch, late, tmp_path)
    result, tracker = train(dataset, tmp_path / "late", late)
    assert late.line_with("step 8/10") < late.line_with("epoch   1.00  evaluated in")

    assert result.status == "finished"
    scores = [name for name in result.metrics if name != "val/seconds"]
    assert scores and all(tracker.history(name) == expected.history(name) for name in scores)
    assert [step for step, _ in tracker.history("val/AP")] == [5, 10]
    for step in (5, 10):
        noted, other = manifest_metrics(tmp_path / "late", step), manifest_metrics(tmp_path / "at_once", step)
        assert noted | {"val/seconds": 0} == other | {"val/seconds": 0}
    assert [report["val/AP"] for report in late.reports] == [value for _, value in tracker.history("val/AP")]
    assert len(at_once.reports) == 2
    assert result.table == tracker.texts["evaluation/epoch_0002.00.txt"].split("\n\n")[0]


def test_the_next_checkpoint_waits_for_the_scores(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer(monkeypatch, "import time; time.sleep(1)")
    witness = Witness()
    result, _ = train(dataset, tmp_path, witness, "train.checkpoint_every_steps=2", "train.keep_last=1")
    phases = witness.phases
    assert ("scoring", 5) not in phases, "nothing waits while there is no checkpoint to write"
    assert phases.index(("scoring", 6)) < phases.index(("writing a checkpoint", 6))
    assert result.best_checkpoint is not None and Path(result.best_checkpoint, "model.pt").exists()
    assert manifest_metrics(tmp_path, result.step)["val/AP"] == result.metrics["val/AP"]


def test_who_is_stopped_waits_for_the_scores(dataset: Path, tmp_path: Path) -> None:
    tracker = MemoryTracker()
    config = tiny_config(dataset, tmp_path, "run.name=a", "train.log_every_steps=10")
    assert fit_here(config, tracker, stop_after=6).status == "stopped"
    assert [step for step, _ in tracker.history("val/AP")] == [5]
    assert manifest_metrics(tmp_path, 5)["val/AP"] == tracker.history("val/AP")[0][1]


UNTIL_KILLED = """
import sys
from detr_ray.evaluation import apart
from detr_ray.train import main
apart.COMMAND = (sys.executable, "-c", "import time; time.sleep(10)")
sys.exit(main(sys.argv[1:]))
"""


def test_scores_that_died_with_the_process_are_made_up_for(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(dataset, tmp_path, "run.name=a")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    process = subprocess.Popen(
        [sys.executable, "-c", UNTIL_KILLED, "--config", str(tmp_path / "config.yaml")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "step 8/10" in line:
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert manifest_metrics(tmp_path, 5) is None
    tracker = MemoryTracker()
    assert fit_here(config, tracker).status == "finished"
    straight = MemoryTracker()
    fit_here(tiny_config(dataset, tmp_path, "run.name=straight"), straight)
    assert tracker.history("val/AP") == straight.history("val/AP")
    assert [step for step, _ in tracker.history("train/loss")] == list(range(6, 11))


def test_scoring_that_fails_ends_the_run_and_says_so(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer(monkeypatch, "raise ValueError('3 detections are not finite numbers')")
    expected = "evaluation of step 5 could not be scored: ValueError: 3 detections are not finite"
    with pytest.raises(RunFailed, match=expected) as failure:
        train(dataset, tmp_path, Witness())
    assert failure.value.agreed


def test_scoring_that_hangs_ends_the_run_in_time(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = Witness()
    hold_scores(monkeypatch, witness, tmp_path)
    with pytest.raises(RunFailed, match=r"step 5 could not be scored: .* train\.stall_timeout_s=1 "):
        train(dataset, tmp_path, witness, "train.stall_timeout_s=1")


def test_validation_images_without_boxes_are_said_to_give_no_scores(tmp_path: Path) -> None:
    witness = Witness()
    empty = make_dataset(tmp_path / "data", num_train=8, num_val=2)
    annotations = empty / "annotations" / "instances_val2017.json"
    annotations.write_text(json.dumps(json.loads(annotations.read_text()) | {"annotations": []}))
    result, _ = train(empty, tmp_path / "runs", witness, "train.epochs=1")
    assert "no annotated boxes, no scores" in witness.lines[-1]
    assert result.metrics.keys() == {"val/seconds"} and "n/a" in result.table
