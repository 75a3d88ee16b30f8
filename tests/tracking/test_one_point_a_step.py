"""However often a run is killed and resumed, MLflow holds one point a step of each metric, and none is missing."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow_reading import history, the_only_run

from detr_ray.tracking import MlflowTracker, send_pending

OpenTracker = Callable[..., MlflowTracker]

LAST, CHECKPOINT_EVERY = 200, 25

TRAINS = """
import random, sys, time
from pathlib import Path
from detr_ray.tracking import MlflowTracker, Timing
folder, uri, last, every = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
timing = Timing(batch_interval=0.01, first_retry=0.05, longest_retry=0.2, finish=60.0)
tracker = MlflowTracker(folder / "tracking", uri=uri, experiment="detr", run_name="killed", timing=timing)
checkpoint = folder / "checkpoint"
begin = int(checkpoint.read_text()) if checkpoint.exists() else 0
while sys.argv[5] == "connected" and tracker.run_id is None:
    time.sleep(0.01)
print("at work", begin, flush=True)
for step in range(begin + 1, last + 1):
    tracker.log_metrics({"train/loss": 1 / step, "perf/images_per_s": random.random()}, step)
    if step % every == 0:
        tracker.log_metrics({"val/AP": step / last}, step)
        tracker.sync()
        draft = checkpoint.with_suffix(".tmp")
        draft.write_text(str(step))
        draft.replace(checkpoint)
    time.sleep(0.01)
tracker.finish("FINISHED")
assert not tracker.pending(), tracker.pending()
"""


def train(folder: Path, uri: str, kill_after_s: float | None, connected: bool = True) -> int:
    """Trains on from the checkpoint, killed so long after its first step or to the end; gives the exit status.

    Args:
        folder: of the run.
        uri: of the store.
        kill_after_s: None for never.
        connected: whether the first step waits until the sender has reached MLflow, which takes it seconds of imports.
    """
    numbers = [str(LAST), str(CHECKPOINT_EVERY), "connected" if connected else "at once"]
    command = [sys.executable, "-c", TRAINS, str(folder), uri, *numbers]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("at work"), process.stderr.read()
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            process.kill()
        process.wait(timeout=240)
        return process.returncode


def assert_one_point_a_step(uri: str) -> None:
    run = the_only_run(uri)
    assert run.info.status == "FINISHED"
    losses = history(uri, run.info.run_id, "train/loss")
    assert losses == [(step, 1 / step) for step in range(1, LAST + 1)]
    speeds = history(uri, run.info.run_id, "perf/images_per_s")
    assert [step for step, _ in speeds] == list(range(1, LAST + 1))
    scored = range(CHECKPOINT_EVERY, LAST + 1, CHECKPOINT_EVERY)
    assert history(uri, run.info.run_id, "val/AP") == [(step, step / LAST) for step in scored]


def kill_and_resume(folder: Path, uri: str, kills: int, seed: int) -> None:
    """Kills a run at random times, damages what its sender noted at some, and lets it end."""
    folder.mkdir()
    draw = random.Random(seed)
    state, older = folder / "tracking" / "sent.json", folder / "older.json"
    for kill in range(kills):
        status = train(folder, uri, kill_after_s=draw.uniform(0.0, 1.2), connected=kill % 4 != 3)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if kill % 3 == 1 and older.exists():
            shutil.copy(older, state)  # as if the sender had died before it noted what it had sent since
        elif kill % 3 == 2:
            state.write_text(json.dumps({"offset": "7", "left_out": []}))
        elif state.exists():
            shutil.copy(state, older)
    assert train(folder, uri, kill_after_s=None) == 0
    assert_one_point_a_step(uri)


@pytest.mark.timeout(300)
def test_kills_leave_one_point_a_step(store_uri: str, tmp_path: Path) -> None:
    kill_and_resume(tmp_path / "run", store_uri, kills=1, seed=5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, 2])
def test_many_kills_leave_one_point_a_step(store_uri: str, tmp_path: Path, seed: int) -> None:
    kill_and_resume(tmp_path / "run", store_uri, kills=12, seed=seed)


def test_the_first_point_of_a_step_stays(open_tracker: OpenTracker, store_uri: str) -> None:
    first = open_tracker()
    for step in range(1, 11):
        first.log_metrics({"train/loss": 1 / step, "perf/images_per_s": 100.0}, step)
    first.log_metrics({"val/AP": 0.5}, step=10)
    first.finish("KILLED")
    time.sleep(0.002)  # the clock has another millisecond when the steps are logged again

    second = open_tracker()
    for step in range(6, 16):
        second.log_metrics({"train/loss": 1 / step, "perf/images_per_s": 7.0, "new": 0.0}, step)
    second.log_metrics({"val/AP": 0.5}, step=10)
    second.finish("FINISHED")
    run_id = the_only_run(store_uri).info.run_id
    assert history(store_uri, run_id, "train/loss") == [(step, 1 / step) for step in range(1, 16)]
    assert history(store_uri, run_id, "perf/images_per_s") == [
        (step, 100.0 if step <= 10 else 7.0) for step in range(1, 16)
    ]
    assert history(store_uri, run_id, "val/AP") == [(10, 0.5)]
    assert [step for step, _ in history(store_uri, run_id, "new")] == list(range(6, 16))


def test_a_resume_on_another_machine_sends_no_point_again(open_tracker: OpenTracker, store_uri: str) -> None:
    for begin, folder in ((0, "machine-a"), (5, "machine-b"), (0, "machine-c")):
        tracker = open_tracker(folder, run_uid="bucket/run")
        for step in range(begin, begin + 10):
            tracker.log_metrics({"train/loss": 1.0}, step)
        tracker.finish("KILLED")
        time.sleep(0.002)
    steps = [step for step, _ in history(store_uri, the_only_run(store_uri).info.run_id, "train/loss")]
    assert steps == list(range(15))


def test_a_damaged_note_of_what_was_sent_sends_nothing_twice(
    open_tracker: OpenTracker, store_uri: str, tmp_path: Path
) -> None:
    for content in (None, "", "{", '{"offset": "3"}', "[]"):
        tracker = open_tracker()
        for step in range(10):
            tracker.log_metrics({"train/loss": 1.0}, step)
        tracker.finish("FINISHED")
        if content is not None:
            (tmp_path / "run" / "sent.json").write_text(content)
            assert not send_pending(tmp_path / "run", store_uri)
    assert history(store_uri, the_only_run(store_uri).info.run_id, "train/loss") == [(step, 1.0) for step in range(10)]
