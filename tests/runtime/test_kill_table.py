"""Each kind of process of a job, killed and stopped: the run ends as an undisturbed one, and says what happened."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from disturbing import (
    STEPS,
    assert_as_if_nothing_had_happened,
    at_work,
    config_file,
    continued_after,
    processes,
    restarts,
    train,
)
from recorded import jumps

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

# Long enough for a busy machine to take a step, short enough to wait for.
STALL_S = 25


@dataclass(frozen=True)
class Case:
    """A process that something happens to.

    Attributes:
        name: what Ray calls the process.
        number: the signal.
        said: what the user is told, as a pattern.
        restarts: how often the workers are started again.
        at: the line of output at which it happens.
    """

    name: str
    number: signal.Signals
    said: str
    restarts: int
    at: str = "step 20/"


CASES = {
    "worker killed": Case("RayTrainWorker", signal.SIGKILL, r"rank \d: its process died", 1),
    "worker stopped": Case("RayTrainWorker", signal.SIGSTOP, r"rank \d hangs: nothing heard of it for \d+ s, last ", 1),
    "data task killed": Case("PlannedBatches", signal.SIGKILL, "", 0, "starting 2 CPU workers"),
    "data task stopped": Case(
        "PlannedBatches",
        signal.SIGSTOP,
        r"rank \d hangs: (waiting for data|detecting on validation images) at step",
        1,
        "starting 2 CPU workers",
    ),
    "status killed": Case("JobStatus", signal.SIGKILL, "", 0),
    "status stopped": Case("JobStatus", signal.SIGSTOP, "keeps the job's status does not answer; it is started", 0),
    "controller killed": Case("TrainController", signal.SIGKILL, "the controller died; starting the workers", 1),
    "controller stopped": Case(
        "TrainController", signal.SIGSTOP, r"the controller hangs: nothing heard of it for \d+ s, last RUNNING", 1
    ),
    "controller stopped while it starts": Case(
        "TrainController", signal.SIGSTOP, "the controller hangs: nothing heard of it", 1, "starting 2 CPU workers"
    ),
    "Ray Train's barrier killed": Case("SynchronizationActor", signal.SIGKILL, r"rank \d", 1),
    "Ray Train's barrier stopped": Case("SynchronizationActor", signal.SIGSTOP, r"rank \d", 1),
    "Ray Data's statistics stopped": Case("_StatsActor", signal.SIGSTOP, "", 0),
    "Ray Data's coordinator stopped": Case("_AutoscalingCoordinatorActor", signal.SIGSTOP, "", 0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=[name.replace(" ", "-") for name in CASES])
def test_the_run_ends_as_if_nothing_had_happened(
    dataset: Path, undisturbed_run: Path, tmp_path: Path, case: Case
) -> None:
    path = config_file(dataset, tmp_path, "disturbed", f"train.stall_timeout_s={STALL_S}")
    seen: list[psutil.Process] = []

    def disturb(driver: subprocess.Popen[str]) -> None:
        victim = next(at_work(driver, case.name.encode()))
        seen.extend([victim, *psutil.Process(driver.pid).children(recursive=True)])
        victim.send_signal(case.number)

    code, text = train(path, disturb, case.at)
    # Workers that are started again after the last step find nothing left to do.
    assert code == 0 and re.search(rf"finished (all )?{STEPS} steps", text)
    assert re.search(case.said, text) and restarts(text) == case.restarts
    if case is not CASES["status stopped"]:  # the run may be over before its status is found to be silent
        assert f"step {STEPS}/{STEPS}" in text, "progress is shown again"
    assert len(jumps(tmp_path / "disturbed")) <= case.restarts
    assert_as_if_nothing_had_happened(tmp_path / "disturbed", undisturbed_run)
    assert nothing_left_of(seen)


def nothing_left_of(seen: list[psutil.Process], within_s: float = 30) -> bool:
    """Whether the processes of a job are all gone soon after it."""
    _, alive = psutil.wait_procs(seen, timeout=within_s)
    print("left:", [(process.pid, process.status(), process.cmdline()[:1]) for process in alive])
    return not alive


def test_a_killed_driver_is_started_again(dataset: Path, undisturbed_run: Path, tmp_path: Path) -> None:
    path = config_file(dataset, tmp_path, "killed")
    code, first = train(path, lambda process: os.kill(process.pid, signal.SIGKILL))
    assert code == -signal.SIGKILL and "finished" not in first
    code, second = train(path)
    assert code == 0 and "going on from step" in second and f"finished {STEPS} steps" in second
    assert_as_if_nothing_had_happened(tmp_path / "killed", undisturbed_run)
    assert "nothing left to do" in train(path)[1]


def test_a_stopped_driver_goes_on_when_it_is_continued(dataset: Path, undisturbed_run: Path, tmp_path: Path) -> None:
    path = config_file(dataset, tmp_path, "stopped", f"train.stall_timeout_s={STALL_S}")
    code, text = train(path, continued_after(1.5 * STALL_S))
    assert code == 0 and f"finished {STEPS} steps" in text and restarts(text) == 0
    assert "does not answer" not in text and jumps(tmp_path / "stopped") == []
    assert_as_if_nothing_had_happened(tmp_path / "stopped", undisturbed_run)


def test_a_controller_that_dies_too_often_ends_the_run_in_one_line(dataset: Path, tmp_path: Path) -> None:
    path = config_file(dataset, tmp_path, "often", "train.max_failures=0")
    code, text = train(path, kill_controller)
    assert code == 1
    assert "error: the controller died, and no restart is left (train.max_failures=0)\n" in text
    assert "Traceback" not in text


def test_stopping_a_job_whose_controller_hangs(dataset: Path, undisturbed_run: Path, tmp_path: Path) -> None:
    path = config_file(dataset, tmp_path, "asked", f"train.stall_timeout_s={STALL_S}")

    def disturb(driver: subprocess.Popen[str]) -> None:
        processes(driver, "TrainController")[-1].send_signal(signal.SIGSTOP)
        time.sleep(1)
        os.kill(driver.pid, signal.SIGTERM)

    code, text = train(path, disturb)
    assert code == 130 and "it was to stop anyway" in text
    code, text = train(path)
    assert code == 0 and f"finished {STEPS} steps" in text and jumps(tmp_path / "asked") == []
    assert_as_if_nothing_had_happened(tmp_path / "asked", undisturbed_run)


def kill_controller(driver: subprocess.Popen[str]) -> None:
    """Ends the controller's process."""
    processes(driver, "TrainController")[-1].kill()
