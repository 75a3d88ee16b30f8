"""Scoring beside training: nothing waits for it, nothing depends on when it is done, and nothing of it is lost."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from recorded import assert_same_weights
from tiny import fit_here, make_dataset, tiny_config

from detr_ray.engine.checkpoints.store import CheckpointStore
from detr_ray.engine.context import LocalContext, Phase
from detr_ray.engine.job import prepare_job
from detr_ray.engine.loop import FitResult, TrainingLoop
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.engine.validation import scoring
from detr_ray.evaluation import scorer_process
from detr_ray.tracking import MemoryTracker

ROOT = Path(__file__).parents[2]


class Witness(LocalContext):
    """Notes what the loop does, says and reports, in its order; lets scoring go on when a line is said."""

    def __init__(self, go_on_at: str = "") -> None:
        self.reports: list[dict[str, float]] = []
        super().__init__(say=self._heard, on_report=lambda evaluated: self.reports.append(dict(evaluated.metrics)))
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
    scoring = "from detr_ray.evaluation.scorer_process import main; main()"
    monkeypatch.setattr(scorer_process, "COMMAND", (sys.executable, "-c", f"{first}\n{scoring}"))


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


def test_no_checkpoint_waits_for_the_scores_and_theirs_is_kept_meanwhile(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = Witness(go_on_at="step 9/10")
    hold_scores(monkeypatch, witness, tmp_path)
    kept: dict[int, list[str]] = {}

    def look(phase: Phase, step: int) -> None:
        if phase == "forward pass":
            kept[step] = sorted(path.name for path in (tmp_path / "a" / "checkpoints").glob("*"))

    monkeypatch.setattr(witness, "enter", look)
    result, tracker = train(dataset, tmp_path, witness, "train.checkpoint_every_steps=2", "train.keep_last=1")
    assert kept[8] == ["step_00000005", "step_00000008"], "the one that is scored, and the last"
    (_, first), (_, last) = tracker.history("val/AP")
    best = 5 if first >= last else 10
    assert result.best_checkpoint is not None and result.best_checkpoint.endswith(f"step_{best:08d}")
    assert manifest_metrics(tmp_path, best)["val/AP"] == max(first, last)


def scorer_pid(folder: Path) -> int:
    deadline = time.monotonic() + 60
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int((folder / "pid").read_text())


def frozen(folder: Path) -> str:
    """A scorer that writes its process id down and stops itself."""
    pid = folder / "pid"
    return f"import os, signal\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\nos.kill(os.getpid(), signal.SIGSTOP)"


def test_scores_are_dropped_on_leaving_and_made_up_for_with_the_weights_of_their_checkpoint(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = MemoryTracker()
    fit_here(tiny_config(dataset, tmp_path, "run.name=straight", "optim.ema_decay=0.5", "optim.lr=1e-3"), straight)
    config = tiny_config(
        dataset, tmp_path, "run.name=a", "optim.ema_decay=0.5", "optim.lr=1e-3", "train.checkpoint_every_steps=3",
        "train.keep_last=1",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        scorer(patch, frozen(tmp_path))
        began = time.monotonic()
        assert fit_here(config, stop_after=7).status == "stopped"
        assert time.monotonic() - began < scoring.LIMIT_S
    assert not psutil.pid_exists(scorer_pid(tmp_path)), "a process that is stopped is ended too"
    assert sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir()) == [
        "step_00000005",
        "step_00000007",
    ]
    assert manifest_metrics(tmp_path, 5) is None
    tracker = MemoryTracker()
    assert fit_here(config, tracker).status == "finished"
    assert tracker.history("val/AP") == straight.history("val/AP") and len(tracker.history("val/AP")) == 2
    assert tracker.history("val/AR100") == straight.history("val/AR100")
    assert_same_weights(tmp_path / "a", tmp_path / "straight", 10)


@pytest.mark.parametrize(("epochs", "scored"), [(1, [5]), (2, [5, 10])])
def test_who_is_asked_to_stop_while_scores_are_awaited_leaves_at_once(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, scored: list[int]
) -> None:
    """At the end of the run, where the last scores are awaited, or those before the last."""
    monkeypatch.setattr(scoring, "QUIET_S", 0.0)
    settings = (f"train.epochs={epochs}", "train.log_every_steps=100")
    with monkeypatch.context() as patch:
        scorer(patch, "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)")
        witness = Witness()
        patch.setattr(witness, "leave_reason", lambda: "asked" if ("scoring", 5 * epochs) in witness.phases else None)
        result, _ = train(dataset, tmp_path, witness, *settings)
    assert (result.status, result.step, result.leave) == ("stopped", 5 * epochs, "asked")
    resumed, tracker = train(dataset, tmp_path, Witness(), *settings)
    assert resumed.status == "finished" and [step for step, _ in tracker.history("val/AP")] == scored
    assert tracker.history("train/loss") == []


UNTIL_KILLED = """
import sys
from detr_ray.evaluation import scorer_process
from detr_ray.train import main
scorer_process.COMMAND = (sys.executable, "-c", "import time; time.sleep(10)")
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


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MemoryTracker]:
    folder = tmp_path_factory.mktemp("undisturbed")
    _, tracker = train(dataset, folder, Witness())
    return folder / "a", tracker


@pytest.mark.parametrize(
    ("times", "what", "reason"),
    [
        ("always", "raise ValueError('not finite numbers')", "ValueError: not finite numbers"),
        ("once", "os.kill(os.getpid(), signal.SIGKILL)", ""),
        ("always", "os.kill(os.getpid(), signal.SIGKILL)", "its process was ended by signal 9"),
        ("once", "os.kill(os.getpid(), signal.SIGSTOP)", ""),
        ("always", "os.kill(os.getpid(), signal.SIGSTOP)", r"it takes more than \d+ seconds"),
        ("always", "print('no numbers'); sys.exit(0)", "JSONDecodeError"),
    ],
    ids=["error", "SIGKILL-once", "SIGKILL", "SIGSTOP-once", "SIGSTOP", "nonsense"],
)
def test_a_scoring_that_fails_is_tried_once_more_and_then_left_empty(
    dataset: Path, undisturbed: tuple[Path, MemoryTracker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    times: str, what: str, reason: str,
) -> None:  # fmt: skip
    run, expected = undisturbed
    tried = tmp_path / "tried"
    condition = "True" if times == "always" else f"not os.path.exists({str(tried)!r})"
    scorer(
        monkeypatch,
        f"import os, signal, sys\nif {condition}:\n    open({str(tried)!r}, 'a').write('x')\n    {what}",
    )
    # Where the first attempt alone is stopped, the second one has to be in time on a busy machine.
    monkeypatch.setattr(scoring, "LIMIT_S", 60.0 if "STOP" not in what else 8.0 if times == "once" else 1.0)
    witness = Witness()
    result, tracker = train(dataset, tmp_path, witness)
    assert result.status == "finished"
    assert_same_weights(tmp_path / "a", run, 10)
    warnings = [line for line in witness.lines if "WARNING" in line]
    if times == "once":
        assert tried.read_text() == "x" and warnings == []
        assert tracker.history("val/AP") == expected.history("val/AP")
        return
    assert tried.read_text() == "xxxx", "two evaluations, two attempts each"
    assert [re.search(r"evaluation of step (\d+) has no scores", line).group(1) for line in warnings] == ["5", "10"]  # type: ignore[union-attr]
    assert all(re.search(reason, line) and "\n" not in line for line in warnings)
    assert tracker.history("val/AP") == [] and result.metrics == {} and result.best_checkpoint is None
    monkeypatch.undo()
    again, tracker = train(dataset, tmp_path, Witness())
    assert again.status == "nothing to do" and tracker.metrics == [], "it is not tried for ever"


def scorer_of(process: subprocess.Popen[str]) -> psutil.Process:
    """The scorer, once it runs its own program: until then its parent waits for it, and would stop with it."""
    deadline = time.monotonic() + 240
    parent = psutil.Process(process.pid)
    while time.monotonic() < deadline:
        for child in parent.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                command = child.cmdline()
                if command != parent.cmdline() and any("scorer_process" in part for part in command):
                    return child
        time.sleep(0.01)
    raise AssertionError("no scorer process was seen")


SLOW_SCORER = """
import sys
from detr_ray.evaluation import scorer_process
from detr_ray.train import main
start = "import time; time.sleep(2); from detr_ray.evaluation.scorer_process import main; main()"
scorer_process.COMMAND = (sys.executable, "-c", start)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.timeout(600)
def test_a_driver_that_is_terminated_beside_a_stopped_scorer_leaves_a_checkpoint_at_once(
    dataset: Path, undisturbed: tuple[Path, MemoryTracker], tmp_path: Path
) -> None:
    run, expected = undisturbed
    config = tiny_config(dataset, tmp_path, "run.name=a", "train.epochs=2")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_SCORER, "--config", str(tmp_path / "config.yaml")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    scorer = scorer_of(process)
    scorer.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130, output
    assert time.monotonic() - began < scoring.LIMIT_S, output
    assert not scorer.is_running()
    stopped = int(re.search(r"stopped after step (\d+)", output).group(1))  # type: ignore[union-attr]
    latest = CheckpointStore(str(tmp_path / "a" / "checkpoints")).latest()
    assert latest is not None and latest.step == stopped
    tracker = MemoryTracker()
    assert fit_here(config, tracker).status == "finished"
    assert tracker.history("val/AP") == expected.history("val/AP")
    assert_same_weights(tmp_path / "a", run, 10)


def test_validation_images_without_boxes_are_said_to_give_no_scores(tmp_path: Path) -> None:
    witness = Witness()
    empty = make_dataset(tmp_path / "data", num_train=8, num_val=2)
    annotations = empty / "annotations" / "instances_val2017.json"
    annotations.write_text(json.dumps(json.loads(annotations.read_text()) | {"annotations": []}))
    result, _ = train(empty, tmp_path / "runs", witness, "train.epochs=1")
    assert "no annotated boxes, no scores" in witness.lines[-1]
    assert result.metrics.keys() == {"val/seconds"} and "n/a" in result.table
