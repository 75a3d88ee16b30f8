"""The scorer process, killed and stopped for real under Ray: it costs scores at most, and no step or checkpoint."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from recorded import assert_same_weights, jumps
from tiny import make_dataset, tiny_config

from detr_ray.engine.checkpoints.store import CheckpointStore

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, EVERY = 60, 30


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many validation images that scoring takes a moment."""
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes", num_val=60)


def config_file(dataset: Path, folder: Path, name: str) -> Path:
    """Two workers, evaluated after half of the steps and at the end."""
    config = tiny_config(
        dataset, folder, f"run.name={name}", "train.launcher=ray", "train.num_workers=2", f"train.epochs={STEPS // 5}",
        "train.checkpoint_every_steps=10", f"eval.every_epochs={EVERY // 5}", "model.dropout=0.1", "eval.batch_size=16",
        "train.stall_timeout_s=45",
    )  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(config.to_yaml())
    return path


def scorers(driver: int) -> list[psutil.Process]:
    """Processes below a driver that score."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(driver).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any("scorer_process" in part for part in child.cmdline()):
                    found.append(child)
    return found


def train(
    path: Path, disturb: Callable[[psutil.Process, subprocess.Popen[str]], bool] | None = None
) -> tuple[int, str]:
    """Runs the command to its end; each scorer process is disturbed once, until ``disturb`` says that it is enough."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "detr_ray.train", "--config", str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip

    def watch() -> None:
        seen: set[int] = set()
        while process.poll() is None and disturb is not None:
            for scorer in scorers(process.pid):
                if scorer.pid not in seen:
                    seen.add(scorer.pid)
                    if disturb(scorer, process):
                        return
            time.sleep(0.01)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    text, _ = process.communicate(timeout=600)
    watcher.join(30)
    print(f"\n{text}exit code {process.returncode}")
    return process.returncode, text


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(config_file(dataset, folder, "undisturbed"))[0] == 0
    return folder / "undisturbed"


def scores(run: Path) -> dict[int, float | None]:
    """Step -> AP in the manifests of the checkpoints that were to be evaluated."""
    infos = CheckpointStore(str(run / "checkpoints")).checkpoints()
    return {info.step: (info.metrics or {}).get("val/AP") for info in infos if info.evaluation_due}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_scorer_that_is_lost_once_is_started_again(
    dataset: Path, undisturbed: Path, tmp_path: Path, number: int
) -> None:
    def once(scorer: psutil.Process, driver: subprocess.Popen[str]) -> bool:
        scorer.send_signal(number)
        return True

    code, text = train(config_file(dataset, tmp_path, "once"), once)
    assert code == 0 and f"finished {STEPS} steps" in text and "restart" not in text and "has no scores" not in text
    assert jumps(tmp_path / "once") == []
    assert_same_weights(tmp_path / "once", undisturbed, STEPS)
    assert scores(tmp_path / "once") == scores(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_scorers_that_are_all_lost_cost_the_scores_alone(
    dataset: Path, undisturbed: Path, tmp_path: Path, number: int
) -> None:
    def always(scorer: psutil.Process, driver: subprocess.Popen[str]) -> bool:
        scorer.send_signal(number)
        return False

    path = config_file(dataset, tmp_path, "always")
    code, text = train(path, always)
    assert code == 0 and f"finished {STEPS} steps" in text and "restart" not in text
    said = re.findall(r"WARNING: the evaluation of step (\d+) has no scores", text)
    assert said == [str(EVERY), str(STEPS)]
    assert jumps(tmp_path / "always") == []
    assert_same_weights(tmp_path / "always", undisturbed, STEPS)
    assert "nothing left to do" in train(path)[1], "it is not tried for ever"


def test_a_driver_that_is_terminated_beside_a_stopped_scorer_leaves_a_checkpoint_and_the_scores_are_made_up_for(
    dataset: Path, undisturbed: Path, tmp_path: Path
) -> None:
    terminated: list[float] = []

    def stop_both(scorer: psutil.Process, driver: subprocess.Popen[str]) -> bool:
        scorer.send_signal(signal.SIGSTOP)
        os.kill(driver.pid, signal.SIGTERM)
        terminated.append(time.monotonic())
        return True

    path = config_file(dataset, tmp_path, "stopped")
    code, text = train(path, stop_both)
    assert code == 130 and time.monotonic() - terminated[0] < 40, "it waited for the scorer"
    stopped = re.search(r"stopped after step (\d+); the same command", text)
    latest = CheckpointStore(str(tmp_path / "stopped" / "checkpoints")).latest()
    assert stopped and latest is not None and latest.step == int(stopped.group(1))
    code, text = train(path)
    assert code == 0
    assert jumps(tmp_path / "stopped") == []
    assert_same_weights(tmp_path / "stopped", undisturbed, STEPS)
    assert scores(tmp_path / "stopped") == scores(undisturbed)
