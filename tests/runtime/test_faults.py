"""Processes killed for real: the driver, a training worker. Each run ends with the weights of an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from tiny import make_dataset, tiny_config

from detr_ray.engine.checkpoint import CheckpointStore

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 15


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes")


def config_file(dataset: Path, folder: Path, name: str) -> Path:
    """Two workers, a checkpoint every second step, five steps an epoch, dropout on."""
    config = tiny_config(
        dataset, folder, f"run.name={name}", "train.launcher=ray", "train.num_workers=2", "train.epochs=3",
        "train.checkpoint_every_steps=2", "model.dropout=0.1",
    )  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(config.to_yaml())
    return path


def train(path: Path, disturb: Callable[[str, subprocess.Popen[str]], bool] = lambda line, process: True) -> list[str]:
    """Runs the command; ``disturb`` sees each line until it says that it is done."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "detr_ray.train", "--config", str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    disturbed = False
    for line in process.stdout:
        lines.append(line)
        disturbed = disturbed or disturb(line, process)
    process.wait(timeout=60)
    return lines


def weights(run: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(str(run / "checkpoints"))
    latest = store.latest()
    assert latest is not None and latest.step == STEPS
    return store.load(latest, "model.pt")["model"]


def records(run: Path, rank: int) -> list[tuple[int, list[int]]]:
    lines = (run / "stream" / f"rank-{rank:05d}.jsonl").read_text().splitlines()
    return [(json.loads(line)["step"], json.loads(line)["positions"]) for line in lines]


@pytest.fixture(scope="module")
def straight(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("straight")
    lines = train(config_file(dataset, folder, "straight"))
    assert any("finished 15 steps" in line for line in lines), "".join(lines)
    yield folder / "straight"


def assert_as_if_nothing_had_happened(run: Path, straight: Path) -> None:
    expected, found = weights(straight), weights(run)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    for rank in (0, 1):
        undisturbed = dict(records(straight, rank))
        steps = [step for step, _ in records(run, rank)]
        assert all(positions == undisturbed[step] for step, positions in records(run, rank))
        # Steps go up one by one, but for one jump back to the last checkpoint.
        jumps = [(a, b) for a, b in pairwise(steps) if b != a + 1]
        assert len(jumps) <= 1 and sorted(set(steps)) == list(range(STEPS))
        assert all(b <= a for a, b in jumps)


def test_a_killed_driver_is_started_again(dataset: Path, straight: Path, tmp_path: Path) -> None:
    path = config_file(dataset, tmp_path, "killed")

    def kill_driver(line: str, process: subprocess.Popen[str]) -> bool:
        if "step 8/15" in line:
            os.kill(process.pid, signal.SIGKILL)
            return True
        return False

    first = train(path, kill_driver)
    assert not any("finished" in line for line in first)
    second = train(path)
    text = "".join(second)
    assert "going on from step" in text and "finished 15 steps" in text, text
    assert_as_if_nothing_had_happened(tmp_path / "killed", straight)
    third = "".join(train(path))
    assert "nothing left to do" in third


def test_a_killed_training_worker_is_replaced(dataset: Path, straight: Path, tmp_path: Path) -> None:
    path = config_file(dataset, tmp_path, "worker")

    def kill_worker(line: str, process: subprocess.Popen[str]) -> bool:
        if "step 8/15" not in line:
            return False
        os.kill(max(train_workers(process.pid)), signal.SIGKILL)
        return True

    text = "".join(train(path, kill_worker))
    assert "going on from step" in text and "finished 15 steps" in text, text
    assert_as_if_nothing_had_happened(tmp_path / "worker", straight)


def test_ctrl_c_says_how_to_go_on(dataset: Path, tmp_path: Path) -> None:
    path = config_file(dataset, tmp_path, "interrupted")
    stopped: list[subprocess.Popen[str]] = []

    def interrupt(line: str, process: subprocess.Popen[str]) -> bool:
        if "step 4/15" not in line:
            return False
        os.kill(process.pid, signal.SIGINT)
        stopped.append(process)
        return True

    text = "".join(train(path, interrupt))
    assert "stopped; the same command with run.name=interrupted goes on from the last checkpoint" in text
    assert stopped[0].returncode == 130
    latest = CheckpointStore(str(tmp_path / "interrupted" / "checkpoints")).latest()
    assert latest is not None and latest.step >= 2


def train_workers(driver: int) -> list[int]:
    """Process ids of the training workers that a driver's Ray has started."""
    processes = psutil.Process(driver).children(recursive=True)
    # Ray names its workers' processes after what they run.
    found = [process.pid for process in processes if "RayTrainWorker" in " ".join(process.cmdline())]
    assert len(found) == 2, [process.cmdline() for process in processes]
    return found
