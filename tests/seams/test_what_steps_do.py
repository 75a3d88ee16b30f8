"""What each step of a run does to the weights, against the same steps in plain torch: learning rates, loss
weights, matching costs, gradient, clipping, decay, accumulation, random numbers.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from observing import Loss, Observed, noting, observe, prepare, run, small_config, without_validation
from plain_loss import plain_losses
from tiny import make_dataset
from torch import Tensor
from torchvision.models import resnet18

from detr_ray.engine.training_step.step import seed_step


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some images without a box."""
    folder = tmp_path_factory.mktemp("data")
    return make_dataset(folder / "shapes", num_train=16, num_val=4, image_size=(48, 64), empty_fraction=0.3)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pt"
    torch.save(resnet18().state_dict(), path)
    return path


# Schedules

RATES = {
    "constant": ((), lambda epoch: 1.0),
    "step": (("optim.step_epochs=0.5", "optim.gamma=0.5"), lambda epoch: 0.5 ** math.floor(epoch / 0.5 + 1e-9)),
    "multistep": (
        ("optim.milestones=[0.25, 1.5]", "optim.gamma=0.1"),
        lambda epoch: 0.1 ** ((epoch >= 0.25) + (epoch >= 1.5)),
    ),
    "cosine": (("optim.min_lr_factor=0.2",), lambda epoch: 0.2 + 0.8 * (1 + math.cos(math.pi * epoch / 2)) / 2),
}


@pytest.mark.parametrize("schedule", RATES)
def test_each_update_is_of_the_rates_that_are_scheduled_and_logged(
    dataset: Path, tmp_path: Path, schedule: str
) -> None:
    settings, factor = RATES[schedule]
    rates = ("optim.lr=1e-3", "optim.lr_backbone=2e-4", f"optim.schedule={schedule}", "train.epochs=2")
    seen = observe(small_config(dataset, tmp_path, *rates, *settings, *without_validation(dataset)))
    used = [update.rates for update in seen.updates]
    expected = [factor(step / 4) for step in range(8)]
    assert [rate for rate, _ in used] == pytest.approx([1e-3 * share for share in expected])
    assert [rate for _, rate in used] == pytest.approx([2e-4 * share for share in expected])
    assert seen.metric("optim/lr") == [rate for rate, _ in used]
    assert seen.metric("optim/lr_backbone") == [rate for _, rate in used]
    assert seen.metric("train/epoch") == [step / 4 for step in range(1, 9)]


def test_the_warmup_multiplies_the_schedule(dataset: Path, tmp_path: Path) -> None:
    settings = ("optim.lr=1e-3", "optim.warmup_epochs=0.5", "optim.schedule=step", "optim.step_epochs=0.75")
    seen = observe(small_config(dataset, tmp_path, *settings, *without_validation(dataset)))
    used = [update.rates[0] for update in seen.updates]
    assert used[0] < 0.01e-3 and used[1] == pytest.approx(0.5e-3, rel=0.01)
    assert used[2:] == pytest.approx([1e-3, 1e-4])


CURVES = {
    "ce": "{points: [[0, 1], [1, 3]]}",
    "bbox": "{points: [[0, 5], [0.5, 1]], interpolation: constant}",
    "giou": "{points: [[0, 4], [1, 0]], interpolation: cosine}",
    "eos_coef": "{points: [[0, 0.1], [1, 0.9]]}",
    "cost_class": "{points: [[0, 0], [1, 10]]}",
    "cost_bbox": "{points: [[0, 5], [0.25, 0]], interpolation: constant}",
    "cost_giou": "{points: [[0.25, 2], [0.75, 0]]}",
}
VALUES = {
    "ce": lambda epoch: 1 + 2 * epoch,
    "bbox": lambda epoch: 5 if epoch < 0.5 else 1,
    "giou": lambda epoch: 4 * (1 + math.cos(math.pi * epoch)) / 2,
    "eos_coef": lambda epoch: 0.1 + 0.8 * epoch,
    "cost_class": lambda epoch: 10 * epoch,
    "cost_bbox": lambda epoch: 5 if epoch < 0.25 else 0,
    "cost_giou": lambda epoch: 2 - 4 * min(max(epoch - 0.25, 0), 0.5),
}


def value(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The weighted sum over all layers."""
    return sum(
        (weights[name.removeprefix("loss_").split("_")[0]] * v for name, v in losses.items() if name[:5] == "loss_"),
        torch.zeros(()),
    )


def test_each_loss_is_of_the_weights_and_costs_of_its_epoch(dataset: Path, tmp_path: Path) -> None:
    """What is logged of a step is the plain loss of what the model said, with the weights that hold then."""
    settings = [f"loss.{name}={curve}" for name, curve in CURVES.items()]
    seen = observe(small_config(dataset, tmp_path, *settings, *without_validation(dataset), "optim.lr=1e-2"))
    for step, loss in enumerate(seen.losses):
        now = {name: value_at(step / 4) for name, value_at in VALUES.items()}
        costs = (now["cost_class"], now["cost_bbox"], now["cost_giou"])
        plain = plain_losses(loss.outputs, loss.targets, now["eos_coef"], costs)
        for name, expected in plain.items():
            assert seen.metric(f"train/{name}")[step] == pytest.approx(float(expected), rel=1e-4, abs=1e-5), name
        assert seen.metric("train/loss")[step] == pytest.approx(float(value(plain, now)), rel=1e-4)
        for name in ("ce", "bbox", "giou"):
            assert seen.metric(f"loss/weight/{name}")[step] == pytest.approx(now[name])


# Updates


def expected_gradient(seen: Observed, step: int, losses: list[Loss]) -> dict[str, Tensor]:
    """Gradient of the plain loss of a whole step, through the model as it was, at the same images."""
    per_step = len(losses)
    forwards = seen.training[per_step * step : per_step * (step + 1)]
    model = seen.job.build_detector().model.train()
    weights = seen.job.config.loss
    model.load_state_dict(forwards[0].weights)
    for forward, loss in zip(forwards, losses, strict=True):
        outputs = model(forward.images, forward.mask)
        boxes = sum(len(target["labels"]) for each in losses for target in each.targets)
        class_weights = boxes + weights.eos_coef * (4 * 6 - boxes)
        costs = (weights.cost_class, weights.cost_bbox, weights.cost_giou)
        plain = plain_losses(outputs, loss.targets, weights.eos_coef, costs, (class_weights, max(boxes, 1)))
        value(plain, {"ce": weights.ce, "bbox": weights.bbox, "giou": weights.giou}).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro_batch_size", [4, 2, 1])
def test_the_gradient_is_that_of_the_whole_batchs_loss(
    dataset: Path, tmp_path: Path, backbone: Path, micro_batch_size: int
) -> None:
    settings = (
        "model.dropout=0", "model.backbone_norm=frozen", f"model.backbone_weights={backbone}", "optim.lr=1e-3",
        f"train.micro_batch_size={micro_batch_size}", "loss.ce=0.5", "loss.giou=3", *without_validation(dataset),
    )  # fmt: skip
    seen = observe(small_config(dataset, tmp_path, *settings), stop_after=2)
    per_step = 4 // micro_batch_size
    assert len(seen.training) == 2 * per_step and len(seen.updates) == 2
    for step in range(2):
        expected = expected_gradient(seen, step, seen.losses[per_step * step : per_step * (step + 1)])
        found = seen.updates[step].gradients
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max() + 1))
        norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
        assert seen.metric("train/grad_norm")[step] == pytest.approx(float(norm), rel=1e-3)


@pytest.mark.parametrize("clip", [0, 0.1, 1e6])
def test_the_weights_move_as_plain_adamw_moves_them(dataset: Path, tmp_path: Path, clip: float) -> None:
    settings = (
        f"optim.clip_max_norm={clip}", "optim.weight_decay=0.5", "optim.lr=1e-2", "optim.lr_backbone=1e-3",
        "optim.schedule=step", "optim.step_epochs=0.5", *without_validation(dataset),
    )  # fmt: skip
    seen = observe(small_config(dataset, tmp_path, *settings))
    weights = {name: torch.nn.Parameter(value.clone()) for name, value in seen.updates[0].weights.items()}
    backbone = [p for name, p in weights.items() if name.startswith("backbone.")]
    rest = [p for name, p in weights.items() if not name.startswith("backbone.")]
    assert backbone and rest and len(weights) == len([p for p in seen.models[0].parameters() if p.requires_grad])
    plain = torch.optim.AdamW([{"params": rest}, {"params": backbone}], weight_decay=0.5)
    after = [update.weights for update in seen.updates[1:]] + [dict(seen.models[0].named_parameters())]
    for step, (update, wanted) in enumerate(zip(seen.updates, after, strict=True)):
        for name, gradient in update.gradients.items():
            weights[name].grad = gradient.clone()
        if clip:
            torch.nn.utils.clip_grad_norm_(weights.values(), clip)
        factor = 0.1 ** (step // 2)
        plain.param_groups[0]["lr"], plain.param_groups[1]["lr"] = 1e-2 * factor, 1e-3 * factor
        plain.step()
        for name, weight in weights.items():
            torch.testing.assert_close(wanted[name], weight, rtol=1e-4, atol=2e-6)


# Random numbers


def test_random_numbers_of_a_step_are_its_own(dataset: Path, tmp_path: Path) -> None:
    settings = ("model.dropout=0.5", *without_validation(dataset))
    runs = {}
    for name, more in {"a": (), "again": (), "other": ("run.seed=43",)}.items():
        seen = observe(small_config(dataset, tmp_path, f"run.name={name}", *settings, *more))
        runs[name] = [forward.seed for forward in seen.training]
    stopped = observe(small_config(dataset, tmp_path, "run.name=halves", *settings), stop_after=2)
    resumed = observe(small_config(dataset, tmp_path, "run.name=halves", *settings))
    assert [forward.seed for forward in stopped.training + resumed.training] == runs["a"] == runs["again"]
    assert len({*runs["a"], *runs["other"]}) == 8


def test_each_worker_has_random_numbers_of_its_own(dataset: Path, tmp_path: Path) -> None:
    seeds = set()
    for numbers in itertools.product(range(3), repeat=3):
        seed_step(*numbers)
        seeds.add(torch.initial_seed())
    assert len(seeds) == 27
    found = []
    for rank in (0, 1):
        seen = prepare(small_config(dataset, tmp_path, f"run.name=rank-{rank}"))
        seen.loop.context.rank, seen.loop.context.world_size = rank, 2  # type: ignore[misc]
        with seen.job.run.locked(), noting(seen):
            micro_batches = next(seen.loop.batches.train_batches(0, 1))
            seen.loop._train_step(0, micro_batches)
        found.append(seen.training[0].seed)
    assert found[0] != found[1]


# What the others can see of it


def test_the_heartbeat_says_what_is_being_done(dataset: Path, tmp_path: Path) -> None:
    seen = observe(small_config(dataset, tmp_path, "train.checkpoint_every_steps=2", "train.log_every_steps=4"))
    assert seen.phases[0] == ("starting", 0) and seen.phases[-1] == ("leaving", 4)
    of_third_step = [phase for phase, step in seen.phases if step == 2]
    wanted = (
        "waiting for data", "summing over workers", "forward pass", "loss", "backward pass", "update",
    )  # fmt: skip
    assert [phase for phase in of_third_step if phase in wanted] == list(wanted)
    assert "writing a checkpoint" in of_third_step and "adding up metrics" in [
        p for p, step in seen.phases if step == 4
    ]
    assert "detecting on validation images" in [phase for phase, step in seen.phases if step == 4]


def test_means_of_the_log_are_over_its_interval(dataset: Path, tmp_path: Path) -> None:
    settings = (*without_validation(dataset), "train.epochs=2")
    each = observe(small_config(dataset, tmp_path, "run.name=each", *settings))
    some = observe(small_config(dataset, tmp_path, "run.name=some", *settings, "train.log_every_steps=4"))
    assert [step for step, _ in some.tracker.history("train/loss")] == [1, 4, 8]
    for name in ("train/loss_ce", "train/loss_bbox_0", "train/class_error", "train/grad_norm", "train/loss"):
        values = each.metric(name)
        expected = [values[0], sum(values[1:4]) / 3, sum(values[4:]) / 4]
        assert some.metric(name) == pytest.approx(expected, rel=1e-5), name


def test_padding_and_bad_images_are_counted(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", num_train=8, num_val=2, image_size=(40, 90))
    broken = sorted((dataset / "train2017").iterdir())[3]
    broken.write_bytes(b"")
    settings = ("data.on_bad_image=skip", *without_validation(dataset), "train.micro_batch_size=2")
    seen = run(prepare(small_config(dataset, tmp_path, *settings)))
    for step in range(2):
        forwards = seen.training[2 * step : 2 * step + 2]
        padded = sum(forward.images[:, 0].numel() for forward in forwards)
        images = sum(sample.size[0] * sample.size[1] for sample in seen.samples(step))
        assert seen.metric("perf/padding_frac")[step] == pytest.approx(1 - images / padded, abs=1e-9)
    assert sum(seen.metric("train/bad_images")) == 1
    black = [image for forward in seen.training for image in forward.images if image.flatten(1).std(1).max() == 0]
    assert len(black) == 1
