"""Neither the number of workers nor accumulation changes the gradient: real process groups, frozen batch norm."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_dataset, tiny_config
from torchvision.models import resnet18

WORKER = Path(__file__).parent / "one_worker.py"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one size, no dropout, frozen batch norm; one of the images of a batch may have no box."""
    folder = tmp_path_factory.mktemp("workers")
    dataset = make_dataset(folder / "data", image_size=(64, 64), empty_fraction=0.3)
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), folder / "resnet18.pt")
    config = tiny_config(
        dataset,
        folder,
        "data.augment.scales=[64]",
        "eval.size=64",
        "model.dropout=0",
        "model.backbone_norm=frozen",
        f"model.backbone_weights={folder / 'resnet18.pt'}",
    )
    path = folder / "config.yaml"
    path.write_text(config.to_yaml())
    return path


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start_workers(
    config_file: Path, world_size: int, out: Path, *overrides: str, steps: int, poisoned: str | None = None
) -> None:
    from detr_ray.config import load_config

    own = out.with_suffix(".yaml")
    own.write_text(load_config(config_file, overrides).to_yaml())
    port = free_port()
    after = [str(world_size), str(port), str(steps), str(out), *([] if poisoned is None else [poisoned])]
    processes = [
        subprocess.Popen([sys.executable, str(WORKER), str(own), str(rank), *after], stderr=subprocess.PIPE, text=True)
        for rank in range(world_size)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, errors


def run_workers(config_file: Path, world_size: int, out: Path, *overrides: str, steps: int) -> dict[str, Any]:
    start_workers(config_file, world_size, out, *overrides, steps=steps)
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def alone(config_file: Path) -> dict[str, Any]:
    return run_workers(config_file, 1, config_file.parent / "alone.pt", steps=2)


@pytest.mark.parametrize(
    ("world_size", "overrides", "bound"),
    [
        (2, (), 1e-5),
        (3, (), 1e-5),  # shares of 3, 3 and 2 images
        (1, ("train.micro_batch_size=3",), 1e-5),
        (2, ("train.micro_batch_size=2",), 1e-5),
        # Convolutions of one image round differently, which can put an activation on the other side of a ReLU's kink.
        (2, ("train.micro_batch_size=1",), 1e-4),
    ],
)
def test_the_gradient_is_that_of_one_worker(
    config_file: Path, alone: dict[str, Any], tmp_path: Path, world_size: int, overrides: tuple[str, ...], bound: float
) -> None:
    found = run_workers(config_file, world_size, tmp_path / "workers.pt", *overrides, steps=2)
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    assert found["logged"]["train/loss"] == pytest.approx(sum(alone["losses"]) / 2, rel=1e-5)
    for name, value in alone["logged"].items():
        if name.startswith("train/loss"):
            assert found["logged"][name] == pytest.approx(value, rel=1e-4), name
    for rank in range(1, world_size):
        others = torch.load(tmp_path / f"workers.pt.{rank}", weights_only=True)["logged"]
        assert others == found["logged"], "all workers know the same"
    for gradient, expected in zip(found["gradients"], alone["gradients"], strict=True):
        assert float((gradient - expected).norm() / expected.norm()) < bound


def test_a_step_that_is_not_finite_on_one_worker_is_left_out_on_all(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    start_workers(config_file, 2, out, "train.on_nonfinite=skip", steps=3, poisoned="1")
    first, second = (torch.load(f"{out}.{rank}", weights_only=True) for rank in (0, 1))
    assert first["skipped"] == second["skipped"] == [False, True, False]
    assert all(torch.equal(value, second["moved"][name]) for name, value in first["moved"].items())
    assert all(torch.isfinite(value).all() for value in first["moved"].values())


def test_a_step_that_is_not_finite_on_one_worker_ends_all_with_the_same_message(
    config_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    start_workers(config_file, 2, out, steps=3, poisoned="1")
    first, second = (Path(f"{out}.{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith("True\nstep 1: not finite")
    assert "image ids [" in first and "transformer" in first and "learning rates 0.0001" in first
