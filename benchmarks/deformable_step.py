"""A training step of two-stage Deformable DETR and of DINO: forward, loss and backward, against the usual fallback.

    python -m benchmarks deformable_step

ResNet-50, 4 levels, 91 classes, 2 images of 512 x 683 with 8 boxes each, dropout 0, fp32 and bf16; 300 queries, or 900
and 192 denoising ones. Plain is the same model that reads its points with the usual fallback (`grid_sample`, stacked),
and a criterion that goes layer by layer and asks for the costs of all queries with the boxes of all images. Time of a
step, and peak memory of a process of its own.
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
MODELS = {
    "Deformable R50 two-stage": ["model.architecture=deformable_detr", "model.two_stage=true", "model.dropout=0"],
    "DINO R50 4-scale": ["model.architecture=dino"],
}
"""The models as published."""


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


def step_of(name: str, side: str, precision: str) -> Step:
    """A step, ready to be taken again and again; gives the weighted loss."""
    config: Config = load_config(None, MODELS[name])
    torch.manual_seed(0)
    model: DetectionModel = build_model(config.model, CLASSES).to(memory_format=torch.channels_last)
    criterion: SetCriterion | PlainFocalCriterion = build_criterion(config, CLASSES)
    if side == "plain":
        criterion = PlainFocalCriterion(float(config.loss.ce))  # type: ignore[arg-type]
        for module in model.modules():
            if isinstance(module, DeformableAttention):
                module.sampler = sample_stacked
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


def steps_in_a_row(name: str, side: str, precision: str) -> None:
    """Two steps; what is of interest is the memory of the process that takes them."""
    step = step_of(name, side, precision)
    for _ in range(2):
        step()


def run() -> list[Row]:
    """Both models in both precisions, in turns."""
    return [row for name in MODELS for precision in ("fp32", "bf16") for row in compare(name, precision)]


def compare(name: str, precision: str) -> list[Row]:
    """Speed and memory of one model."""
    title = f"{name} {IMAGES}x{HEIGHT}x{WIDTH}, {precision}"
    ours, plain = (step_of(name, side, precision) for side in ("ours", "plain"))
    times = alternate({"ours": ours, "plain": plain}, rounds=3)
    if precision == "fp32":
        assert abs(ours() - plain()) < 1e-4 * abs(plain()), "both must give the same loss"
    spread = max(times["ours"].spread, times["plain"].spread)
    rate = {side: IMAGES / times[side].median for side in times}
    del ours, plain
    peak = {}
    for side in ("ours", "plain"):
        seen = in_fresh_process(steps_in_a_row, name, side, precision)
        peak[side] = seen["peak_mb"] - seen["before_mb"]
    return [
        Row(title, rate["ours"], rate["plain"], "images/s", spread=spread),
        Row(f"{title}, peak memory", peak["ours"], peak["plain"], "MB", "lower"),
    ]
