"""A training step of two-stage Deformable DETR: forward, loss and backward, against the usual fallback.

    python -m benchmarks deformable_step

ResNet-50, 4 levels, 300 queries, 91 classes, 2 images of 512 x 683 with 8 boxes each, dropout 0, fp32 and bf16. Plain
is the same model that reads its points with the usual fallback (`grid_sample`, stacked), and a criterion that goes
layer by layer and asks for the costs of all queries with the boxes of all images. Time of a step, and peak memory of a
process of its own.
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
from detr_ray.structures import Target

IMAGES, HEIGHT, WIDTH, BOXES, CLASSES = 2, 512, 683, 8, 91
Step = Callable[[], float]


def settings() -> Config:
    """Deformable DETR in two stages, as published."""
    return load_config(None, ["model.architecture=deformable_detr", "model.two_stage=true", "model.dropout=0"])


def draw_batch() -> tuple[torch.Tensor, list[Target]]:
    """Normalised images and their boxes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, 3, HEIGHT, WIDTH, generator=generator)
    targets = [
        Target(
            labels=torch.randint(CLASSES, (BOXES,), generator=generator),
            boxes=torch.rand(BOXES, 4, generator=generator) * 0.3 + 0.2,
        )
        for _ in range(IMAGES)
    ]
    return images.contiguous(memory_format=torch.channels_last), targets


def step_of(side: str, precision: str) -> Step:
    """A step, ready to be taken again and again; gives the weighted loss."""
    config = settings()
    torch.manual_seed(0)
    model: DetectionModel = build_model(config.model, CLASSES).to(memory_format=torch.channels_last)
    criterion: SetCriterion | PlainFocalCriterion = build_criterion(config, CLASSES)
    if side == "plain":
        criterion = PlainFocalCriterion()
        for module in model.modules():
            if isinstance(module, DeformableAttention):
                module.sampler = sample_stacked
    model.train()
    images, targets = draw_batch()

    def once() -> float:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            outputs = model(images)
        total = criterion.total(criterion(outputs, targets))
        total.backward()
        return float(total.detach())

    return once


def steps_in_a_row(side: str, precision: str) -> None:
    """Two steps; what is of interest is the memory of the process that takes them."""
    step = step_of(side, precision)
    for _ in range(2):
        step()


def run() -> list[Row]:
    """Both precisions, in turns."""
    rows = []
    name = f"Deformable R50 two-stage {IMAGES}x{HEIGHT}x{WIDTH}"
    for precision in ("fp32", "bf16"):
        ours, plain = (step_of(side, precision) for side in ("ours", "plain"))
        times = alternate({"ours": ours, "plain": plain}, rounds=3)
        if precision == "fp32":
            assert abs(ours() - plain()) < 1e-4 * abs(plain()), "both must give the same loss"
        spread = max(times["ours"].spread, times["plain"].spread)
        rate = {side: IMAGES / times[side].median for side in times}
        rows.append(Row(f"{name}, {precision}", rate["ours"], rate["plain"], "images/s", spread=spread))
        del ours, plain
        peak = {}
        for side in ("ours", "plain"):
            seen = in_fresh_process(steps_in_a_row, side, precision)
            peak[side] = seen["peak_mb"] - seen["before_mb"]
        rows.append(Row(f"{name}, {precision}, peak memory", peak["ours"], peak["plain"], "MB", "lower"))
    return rows
