"""From files to updated weights: steps of an epoch of 128 images of COCO with the R50 model, against the plain script.

    python -m benchmarks end_to_end

The short side is 256 to 320 pixels, batches are of 4 images, the augmentation is the original's at that size, dropout
is 0, first weights are the same. Plain is the model, loss, step and Pillow DataLoader of `benchmarks/baseline`. Ours is
what `detr_ray.train` runs: in one process (`train.launcher=local`), and as a Ray job with one worker and its data
tasks. All use all cores, each of the three in a process of its own; images/s are those after the first step. Notes say
how many pixels an image has in its padded batch: with random batches (`data.window` of one batch) ours computes about
as many as plain, with `data.pad_multiple` there are fewer shapes.
"""

from __future__ import annotations

import os
import random
import re
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torchvision.models import resnet50

from benchmarks.baseline.criterion import PlainCriterion
from benchmarks.baseline.model import PlainDetr
from benchmarks.baseline.pillow_pipeline import CocoFolder, Sizes, data_loader
from benchmarks.baseline.training import PlainStep
from benchmarks.harness import Row, in_fresh_process
from benchmarks.pipeline import COCO128, images_folder
from detr_ray.config import Config, load_config
from detr_ray.data.formats import open_split
from detr_ray.data.label_map import LabelMap
from detr_ray.data.sample import SamplePlan
from detr_ray.engine.stream.planned_data import PlannedData
from detr_ray.model import build_model
from detr_ray.model.weights import load_backbone_weights

WEIGHTS = "resnet50.pth"

BATCH, STEPS = 4, 10
LOADER_WORKERS = 0 if (os.cpu_count() or 1) <= 2 else 2
"""What the plain script is fastest with: on two cores, worker processes take from the steps what they save them."""
CLASSES = 91
SIZES = Sizes(scales=(256, 288, 320), max_size=533, crop_scales=(180, 225, 270), crop_min=172, crop_max=270)

Found = dict[str, float]
"""Images/s after the first step, and pixels of an image in its padded batch."""


VARIANTS = {"planned": (), "random": (f"data.window={BATCH}",), "multiples": ("data.pad_multiple=64",)}


def settings(root: str, scratch: str, launcher: str, precision: str, variant: str) -> Config:
    """What ours trains."""
    lengths = {"scales": list(SIZES.scales), "max_size": SIZES.max_size, "crop_scales": list(SIZES.crop_scales),
               "crop_min": SIZES.crop_min, "crop_max": SIZES.crop_max}  # fmt: skip
    return load_config(
        None,
        [
            *(f"data.augment.{name}={value}" for name, value in lengths.items()),
            f"data.train.annotations={root}/annotations/instances_train2017.json",
            f"data.train.images={root}/train2017",
            f"data.label_space={'coco91' if Path(root) == COCO128 else 'contiguous'}",
            *VARIANTS[variant],
            f"model.backbone_weights={scratch}/{WEIGHTS}", "model.dropout=0",
            f"run.storage={scratch}", f"run.name={launcher}-{precision}-{variant}",
            "train.epochs=2", f"train.max_steps={STEPS}", f"train.log_every_steps={STEPS}",
            f"train.global_batch_size={BATCH}", "train.num_workers=1", "train.use_gpu=false",
            f"train.launcher={launcher}", f"train.precision={precision}",
            "tracking.enabled=false",
        ],
    )  # fmt: skip


def ours(root: str, scratch: str, launcher: str, precision: str, variant: str) -> Found:
    """Some steps, as the command takes them; the line of progress at the last one has the rate since the first."""
    from detr_ray.runtime.launch import fit

    lines: list[str] = []
    config = settings(root, scratch, launcher, precision, variant)
    fit(config, lines.append)
    rate = next(found for line in lines if (found := re.search(rf"step {STEPS}/{STEPS} .* ([\d.]+) images/s", line)))
    return {"images/s": float(rate[1]), "pixels": planned_pixels(config)}


def in_one_process(root: str, scratch: str) -> dict[str, Found]:
    """Ours without Ray."""
    return {
        "fp32": ours(root, scratch, "local", "fp32", "planned"),
        "bf16": ours(root, scratch, "local", "bf16", "planned"),
        "random": ours(root, scratch, "local", "fp32", "random"),
        "multiples": ours(root, scratch, "local", "bf16", "multiples"),
    }


def as_jobs(root: str, scratch: str) -> dict[str, Found]:
    """Ours as jobs of one Ray."""
    from detr_ray.runtime.session import ray_session

    tasks = load_config(None, []).data.tasks_per_worker
    with ray_session(1, tasks, False):
        return {
            "fp32": ours(root, scratch, "ray", "fp32", "planned"),
            "bf16": ours(root, scratch, "ray", "bf16", "planned"),
        }


def planned_pixels(config: Config) -> float:
    """Mean pixels of an image in its padded batch, but for the first step."""
    train = open_split(config.data.root, config.data.train, "train")
    plan = PlannedData(config, train, None, LabelMap.contiguous(train.categories)).plan(1, 0)
    batches = [batch for step in range(1, STEPS) for batch in plan.step(step)]
    multiple = config.data.pad_multiple

    def padded(batch: tuple[SamplePlan, ...], side: int) -> int:
        return -(-max(sample.size[side] for sample in batch) // multiple) * multiple

    return statistics.fmean(padded(batch, 0) * padded(batch, 1) for batch in batches)


def plain_step(scratch: str, precision: str) -> PlainStep:
    """The plain script's model and step."""
    weights = f"{scratch}/{WEIGHTS}"
    config = load_config(None, [f"model.backbone_weights={weights}", "model.dropout=0"])
    torch.manual_seed(config.run.seed)
    first = build_model(config.model, CLASSES)
    load_backbone_weights(first, weights, config.model.backbone)
    model = PlainDetr(config.model, CLASSES)
    model.load_state_dict(first.state_dict())
    return PlainStep(model, PlainCriterion(CLASSES), clip_max_norm=config.optim.clip_max_norm, bf16=precision == "bf16")


def plain_steps(step: PlainStep, root: str, num_workers: int = LOADER_WORKERS) -> Found:
    """Some steps of the plain script."""
    folder = CocoFolder(f"{root}/annotations/instances_train2017.json", f"{root}/train2017", SIZES)
    random.seed(0)
    torch.manual_seed(0)
    areas: list[int] = []
    started = 0.0
    for number, (images, mask, targets) in enumerate(data_loader(folder, BATCH, num_workers)):
        step(images, mask, targets)
        if number == 0:
            started = time.perf_counter()
            continue
        areas.append(images.shape[2] * images.shape[3])
        if number == STEPS - 1:
            break
    return {"images/s": len(areas) * BATCH / (time.perf_counter() - started), "pixels": statistics.fmean(areas)}


def plain(root: str, scratch: str) -> dict[str, Found]:
    """The plain script."""
    return {precision: plain_steps(plain_step(scratch, precision), root) for precision in ("fp32", "bf16")}


def run() -> list[Row]:
    """The table."""
    with tempfile.TemporaryDirectory(prefix="epoch-") as folder:
        scratch = Path(folder)
        root = str(images_folder(scratch))
        torch.save(resnet50(weights=None).state_dict(), scratch / WEIGHTS)
        theirs, local, jobs = (
            in_fresh_process(function, root, folder)["result"] for function in (plain, in_one_process, as_jobs)
        )

    def row(what: str, found: Found, precision: str, more: str = "") -> Row:
        other = theirs[precision]
        pixels = f"{found['pixels'] / 1000:.0f} and {other['pixels'] / 1000:.0f} thousand pixels an image"
        name = f"end to end, {what} / plain {precision}"
        return Row(name, found["images/s"], other["images/s"], "images/s", note=pixels + more)

    return [
        row("one process, fp32", local["fp32"], "fp32", f"; plain with {LOADER_WORKERS} loader workers"),
        row("one process, fp32, random batches", local["random"], "fp32"),
        row("Ray job, fp32", jobs["fp32"], "fp32"),
        row("one process, bf16", local["bf16"], "fp32"),
        row("one process, bf16", local["bf16"], "bf16"),
        row("one process, bf16, pad_multiple=64", local["multiples"], "fp32"),
        row("Ray job, bf16", jobs["bf16"], "fp32"),
    ]
