"""The training step: forward, loss, backward and update, against the plain implementation. Images/s and peak memory.

    python -m benchmarks step

Two models: the default one (ResNet-50, frozen norm, 6+6 layers, 100 queries) on 2 images of 512 x 683, one of them a
little narrower and padded; and the quickstart's (ResNet-18 cut at stride 8, batch norm) on 16 images of 48 x 64.
Dropout is 0, weights and images are the same on both sides. Each step starts from what a batch is when it arrives
(bytes here, normalised floats there) and ends with the weights updated. bf16 is compared with
plain fp32, and with plain bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.baseline.criterion import PlainCriterion
from benchmarks.baseline.model import PlainDetr
from benchmarks.baseline.training import PlainStep
from benchmarks.harness import Row, Timing, alternate, in_fresh_process
from detr_ray.config import Config, load_config
from detr_ray.engine.context import LocalContext
from detr_ray.engine.training_step.optimizer import build_optimizer
from detr_ray.engine.training_step.step import TrainStep
from detr_ray.loss import build_criterion
from detr_ray.model import build_model
from detr_ray.structures import IMAGENET_PIXELS, PaddedBatch, padding_mask, to_device

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
WORKLOADS = {"R50 2x512x683": (2, 512, 683, 91, 8), "quickstart 16x48x64": (16, 48, 64, 6, 2)}
"""Images, height, width, classes and boxes an image."""

Step = Callable[[], object]


def settings(workload: str) -> Config:
    """The configuration of a workload's model and optimizer."""
    if workload.startswith("quickstart"):
        return load_config(QUICKSTART, ["model.dropout=0"])
    return load_config(None, ["model.dropout=0", "model.backbone_weights=none"])


def draw_batch(workload: str) -> PaddedBatch:
    """A batch drawn from a seed, as a data task makes it."""
    images, height, width, classes, boxes = WORKLOADS[workload]
    rng = np.random.default_rng(0)
    sizes = np.tile(np.array([height, width], dtype=np.int32), (images, 1))
    sizes[-1, 1] -= width // 16
    pixels = rng.integers(0, 256, (images, height, width, 3), dtype=np.uint8)
    pixels[-1, :, sizes[-1, 1] :] = 0
    sides = rng.uniform(0.05, 0.4, (images * boxes, 2))
    centres = sides / 2 + rng.random((images * boxes, 2)) * (1 - sides)
    return PaddedBatch(
        images=pixels.transpose(0, 3, 1, 2),
        sizes=sizes,
        orig_sizes=sizes,
        image_ids=np.arange(images),
        positions=np.arange(images),
        labels=rng.integers(0, classes, images * boxes),
        boxes_cxcywh=np.concatenate([centres, sides], axis=1).astype(np.float32),
        counts=np.full(images, boxes),
    )


def train_step(workload: str, precision: str) -> TrainStep:
    """This project's step, as the training loop makes it."""
    config = settings(workload)
    torch.manual_seed(0)
    model = build_model(config.model, WORKLOADS[workload][3])
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, {"lr": 1e-4, "lr_backbone": 1e-5}, weight_decay=1e-4)
    return TrainStep(
        model,
        build_criterion(config.loss, WORKLOADS[workload][3], num_queries=config.model.num_queries),
        optimizer,
        LocalContext(),
        seed=0,
        precision=precision,
        clip_max_norm=config.optim.clip_max_norm,
        channels_last=config.train.channels_last,
    )


def our_step(workload: str, precision: str) -> Step:
    """The same, ready to be taken again and again."""
    step, batch = train_step(workload, precision), draw_batch(workload)
    return lambda: step(0, [batch])


def plain_step(workload: str, precision: str) -> Step:
    """The plain implementation's step."""
    config = settings(workload)
    torch.manual_seed(0)
    classes = WORKLOADS[workload][3]
    model = PlainDetr(config.model, classes)
    model.load_state_dict(build_model(config.model, classes).state_dict())
    step = PlainStep(model, PlainCriterion(classes), clip_max_norm=config.optim.clip_max_norm, bf16=precision == "bf16")
    padded = draw_batch(workload)
    batch = to_device(padded, torch.device("cpu"), IMAGENET_PIXELS)
    mask = padding_mask(torch.from_numpy(padded.sizes.astype(np.int64)), *padded.images.shape[2:])
    return lambda: step(batch.images, mask, batch.targets)


SIDES = {"ours": our_step, "plain": plain_step}


def steps_in_a_row(side: str, workload: str, precision: str) -> None:
    """Three steps; what is of interest is the memory of the process that takes them."""
    step = SIDES[side](workload, precision)
    for _ in range(3):
        step()


def peak_mb(side: str, workload: str, precision: str) -> float:
    """Highest resident memory of a process of its own, above what the imports took."""
    seen = in_fresh_process(steps_in_a_row, side, workload, precision)
    return float(seen["peak_mb"] - seen["before_mb"])


def run() -> list[Row]:
    """Four kinds of steps a workload, in turns."""
    rows = []
    for workload, (images, *_) in WORKLOADS.items():
        rounds = 5 if images == 2 else 30
        times = alternate(
            {
                "plain fp32": plain_step(workload, "fp32"),
                "ours fp32": our_step(workload, "fp32"),
                "plain bf16": plain_step(workload, "bf16"),
                "ours bf16": our_step(workload, "bf16"),
            },
            rounds,
            warmup=2,
        )
        for mine, theirs in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
            rows.append(_rate_row(workload, images, times, mine, theirs))
    workload = next(iter(WORKLOADS))
    plain = peak_mb("plain", workload, "fp32")
    for precision in ("fp32", "bf16"):
        name = f"step {workload}, peak memory, {precision} / plain fp32"
        rows.append(Row(name, peak_mb("ours", workload, precision), plain, "MB", "lower", "above the imports"))
    return rows


def _rate_row(workload: str, images: int, times: dict[str, Timing], mine: str, theirs: str) -> Row:
    ours, plain = times[f"ours {mine}"], times[f"plain {theirs}"]
    name = f"step {workload}, {mine} / plain {theirs}"
    return Row(name, images / ours.median, images / plain.median, "images/s", spread=max(ours.spread, plain.spread))
