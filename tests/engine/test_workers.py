"""Neither the number of workers nor accumulation changes the gradient: real process groups, frozen batch norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loop_worker
import one_worker
import pytest
import torch
from forked_workers import start_workers
from recorded import assert_same_weights, final_weights
from tiny import make_dataset, tiny_config
from torchvision.models import resnet18

from detr_ray.config import Config


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
        "model.backbone_stride=16",
        "model.dropout=0",
        "model.backbone_norm=frozen",
        f"model.backbone_weights={folder / 'resnet18.pt'}",
    )
    path = folder / "config.yaml"
    path.write_text(config.to_yaml())
    return path


def take_steps(
    config_file: Path, world_size: int, out: Path, *overrides: str, steps: int, poisoned: str | None = None
) -> None:
    from detr_ray.config import load_config

    own = out.with_suffix(".yaml")
    own.write_text(load_config(config_file, overrides).to_yaml())
    start_workers(one_worker.main, own, world_size, str(steps), str(out), *([] if poisoned is None else [poisoned]))


def run_loops(config: Config, world_size: int, out: Path, stop_after: int | None = None) -> list[dict[str, Any]]:
    """Runs the whole loop in several processes; what each of them ended with."""
    path = out.with_suffix(".yaml")
    path.write_text(config.to_yaml())
    start_workers(loop_worker.main, path, world_size, str(out), *([] if stop_after is None else [str(stop_after)]))
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(world_size)]


def run_workers(config_file: Path, world_size: int, out: Path, *overrides: str, steps: int) -> dict[str, Any]:
    take_steps(config_file, world_size, out, *overrides, steps=steps)
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


def test_workers_agree_where_parts_are_frozen(config_file: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    frozen = "optim.freeze=[backbone.*, transformer.encoder]"
    one = run_workers(config_file, 1, tmp_path / "one.pt", frozen, steps=2)
    two = run_workers(config_file, 2, tmp_path / "two.pt", frozen, steps=2)
    assert one["gradients"][0].numel() < alone["gradients"][0].numel(), "those parts have none"
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for gradient, expected in zip(two["gradients"], one["gradients"], strict=True):
        assert float((gradient - expected).norm() / expected.norm()) < 1e-5


def test_a_step_that_is_not_finite_on_one_worker_is_left_out_on_all(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    take_steps(config_file, 2, out, "train.on_nonfinite=skip", steps=3, poisoned="1")
    first, second = (torch.load(f"{out}.{rank}", weights_only=True) for rank in (0, 1))
    assert first["skipped"] == second["skipped"] == [False, True, False]
    assert all(torch.equal(value, second["moved"][name]) for name, value in first["moved"].items())
    assert all(torch.isfinite(value).all() for value in first["moved"].values())


def test_a_step_that_is_not_finite_on_one_worker_ends_all_with_the_same_message(
    config_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    take_steps(config_file, 2, out, steps=3, poisoned="1")
    first, second = (Path(f"{out}.{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith("True\nstep 1: not finite")
    assert "image ids [" in first and "transformer" in first and "learning rates 0.0001" in first


def values_of(state: object) -> list[torch.Tensor]:
    """All tensors of nested data, in its order."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for part in parts for tensor in values_of(part)]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with four training images and a validation image that cannot be read."""
    dataset = make_dataset(tmp_path_factory.mktemp("damaged") / "data")
    for image in sorted((dataset / "train2017").iterdir())[5:9]:
        image.write_bytes(image.read_bytes()[:200])
    sorted((dataset / "val2017").iterdir())[1].write_bytes(b"")
    return dataset


def damaged_config(damaged: Path, name: str, *overrides: str) -> Config:
    return tiny_config(
        damaged, damaged.parent / "runs", f"run.name={name}", "data.on_bad_image=skip", "data.max_bad_images=4",
        "model.dropout=0.1", "optim.ema_decay=0.9", "train.precision=bf16", "train.log_every_steps=3", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(damaged: Path) -> list[dict[str, Any]]:
    """What two workers end with that nobody disturbed."""
    return run_loops(damaged_config(damaged, "straight"), 2, damaged.parent / "straight")


def test_the_first_worker_alone_reads_the_checkpoint_and_the_others_are_told(
    damaged: Path, straight: list[dict[str, Any]]
) -> None:
    """The others' own storage is empty, so that there is nothing else that they could go on from.

    Running statistics are each worker's own, and their mean in checkpoints, however many of those were written.
    """
    config, out = damaged_config(damaged, "stopped", "train.checkpoint_every_steps=2"), damaged.parent / "stopped"
    stopped = run_loops(config, 2, out, stop_after=7)
    assert [(worker["status"], worker["step"]) for worker in stopped] == [("stopped", 7)] * 2
    resumed = run_loops(config, 2, out)
    assert [line for line in resumed[0]["lines"] if "going on from step 7" in line]
    for worker, undisturbed in zip(resumed, straight, strict=True):
        for part in ("model", "ema", "optimizer"):
            found, expected = values_of(worker[part]), values_of(undisturbed[part])
            assert len(found) == len(expected) > 0
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), part
    own = [torch.cat([v.flatten() for n, v in worker["model"].items() if "running_" in n]) for worker in straight]
    assert not torch.equal(own[0], own[1])
    kept = final_weights(damaged.parent / "runs" / "straight", 10)
    mean = torch.cat([v.flatten() for n, v in kept.items() if "running_" in n])
    torch.testing.assert_close(mean, (own[0] + own[1]) / 2)
    assert_same_weights(damaged.parent / "runs" / "stopped", damaged.parent / "runs" / "straight", 10)
    logged = [
        {step: values for worker in run for step, values in worker["metrics"] if "train/loss" in values}
        for run in (resumed, straight)
    ]
    for step in (9, 10):  # steps 7 to 9 are one interval, and so are 7, 8 and 9 of a run that stopped after 7
        for name in ("train/loss", "train/loss_giou_0", "train/class_error", "train/grad_norm", "perf/padding_frac"):
            assert logged[0][step][name] == pytest.approx(logged[1][step][name], rel=1e-9)
    assert resumed[1]["bad_image_ids"] == straight[1]["bad_image_ids"]


def test_workers_count_different_unreadable_images_together(damaged: Path, straight: list[dict[str, Any]]) -> None:
    ids = [int(image.stem) for image in sorted((damaged / "train2017").iterdir())[5:9]]
    assert [(worker["status"], worker["bad_image_ids"]) for worker in straight] == [("finished", ids)] * 2
    broken = sorted((damaged / "val2017").iterdir())[1]
    assert len([line for line in straight[0]["lines"] if broken.name in line]) == 1
    assert [values["val/bad_images"] for _, values in straight[0]["metrics"] if "val/AP" in values] == [1.0, 1.0]
    config = damaged_config(damaged, "few", "data.max_bad_images=3")
    few = run_loops(config, 2, damaged.parent / "few")
    assert few[0]["failed"] == few[1]["failed"] and few[0]["agreed"] and few[1]["agreed"]
    assert "4 different images could not be read" in few[0]["failed"]


def test_what_the_first_worker_tells_arrives_as_it_was(straight: list[dict[str, Any]]) -> None:
    """Tensors of any type and layout, anywhere in plain data; see `odd` in the worker."""
    told, arrived = straight[0]["told"], straight[1]["told"]
    assert arrived.keys() == told.keys() and arrived["text"] == "of 0" and arrived["empty"].shape == (0, 3)
    for a, b in zip(values_of(told), values_of(arrived), strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()) and torch.equal(a, b)
    assert straight[0]["gathered"] == [0, 1] and straight[1]["gathered"] is None
