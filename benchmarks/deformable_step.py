"""A training step of two-stage Deformable DETR: forward, loss and backward, against the usual fallback.

    python -m benchmarks deformable_step    # DINO: dino_step

ResNet-50, 4 levels, 91 classes, 300 queries, 2 images of 512 x 683 with 8 boxes each, dropout 0, fp32 and bf16. Plain
is the same model that reads its points with the usual fallback (`grid_sample`, stacked), and a criterion that goes
layer by layer and asks for the costs of all queries with the boxes of all images. Time of a step, and peak memory of a
process of its own that takes one; both also with the encoder's inner values computed twice
(`train.recompute_encoder`). All have to give the same loss in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.baseline.deformable_attention import sample_stacked
from benchmarks.baseline.focal_criterion import PlainFocalCriterion
from benchmarks.harness import Row, alternate, in_fresh_process
from detr_ray.config import Config, load_config
from detr_ray.loss import SetCriterion, build_criterion
from detr_ray.model import DetectionModel, build_model
from detr_ray.model.deformable_attention import DeformableAttention
from detr_ray.structures import Batch, StepInfo, Target

IMAGES, HEIGHT, WIDTH, BOXES, CLASSES = 2, 512, 683, 8, 91
Step = Callable[[], float]
SIDES = ("ours", "recomputed", "plain")
MODEL = ["model.architecture=deformable_detr", "model.two_stage=true", "model.dropout=0"]
"""As published, but for the dropout."""


def draw_batch() -> Batch:
    """Normalised images and their boxes, as in training."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, 3, HEIGHT, WIDTH, generator=generator)
    targets = [
        Target(
            labels=torch.randint(CLASSES, (BOXES,), generator=generator),
            boxes=torch.rand(BOXES, 4, generator=generator) * 0.3 + 0.2,
        )
        for _ in range(IMAGES)
    ]
    ids = torch.arange(IMAGES)
    return Batch(
        images=images.contiguous(memory_format=torch.channels_last),
        mask=None,
        targets=targets,
        image_ids=ids,
        positions=ids,
        orig_sizes=torch.tensor([[HEIGHT, WIDTH]] * IMAGES),
        padded_pixels=IMAGES * HEIGHT * WIDTH,
        image_pixels=IMAGES * HEIGHT * WIDTH,
        step_info=StepInfo(seed=0, step=0, most_boxes=BOXES),
    )


def step_of(overrides: list[str], side: str, precision: str) -> Step:
    """A step, ready to be taken again and again; gives the weighted loss."""
    config: Config = load_config(None, overrides)
    torch.manual_seed(0)
    model: DetectionModel = build_model(config.model, CLASSES).to(memory_format=torch.channels_last)
    criterion: SetCriterion | PlainFocalCriterion = build_criterion(config, CLASSES)
    if side == "plain":
        criterion = PlainFocalCriterion(float(config.loss.ce))  # type: ignore[arg-type]
        for module in model.modules():
            if isinstance(module, DeformableAttention):
                module.sampler = sample_stacked
    if side == "recomputed":
        model.recompute_encoder()
    model.train()
    batch = draw_batch()

    def once() -> float:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            outputs = model(*model.inputs_of(batch))
        total = criterion.total(criterion(outputs, batch.targets))
        total.backward()
        return float(total.detach())

    return once


def take_one(overrides: list[str], side: str, precision: str) -> float:
    """One step; what is of interest is the memory of the process that takes it."""
    return step_of(overrides, side, precision)()


def run() -> list[Row]:
    """In both precisions, in turns."""
    return [row for precision in ("fp32", "bf16") for row in compare("Deformable R50 two-stage", MODEL, precision)]


def compare(name: str, overrides: list[str], precision: str) -> list[Row]:
    """Speed and memory of one model."""
    title = f"{name} {IMAGES}x{HEIGHT}x{WIDTH}, {precision}"
    losses: dict[str, float] = {}

    def noting(side: str) -> Callable[[], None]:
        step = step_of(overrides, side, precision)

        def once() -> None:
            losses[side] = step()

        return once

    times = alternate({side: noting(side) for side in SIDES}, rounds=3)
    if precision == "fp32":
        for side in ("ours", "recomputed"):
            assert abs(losses[side] - losses["plain"]) < 1e-4 * abs(losses["plain"]), "all must give the same loss"
    spread = max(found.spread for found in times.values())
    rate = {side: IMAGES / times[side].median for side in times}
    peak = {}
    for side in SIDES:
        seen = in_fresh_process(take_one, overrides, side, precision)
        peak[side] = seen["peak_mb"] - seen["before_mb"]
    return [
        row
        for side, kind in (("ours", ""), ("recomputed", ", encoder computed twice"))
        for row in (
            Row(f"{title}{kind}", rate[side], rate["plain"], "images/s", spread=spread),
            Row(f"{title}{kind}, peak memory", peak[side], peak["plain"], "MB", "lower"),
        )
    ]
