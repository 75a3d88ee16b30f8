"""What grows with the data set: 1,000, 10,000 and 100,000 images. Times, memory, and the planner at 1,000 workers.

    python -m benchmarks growth

The data sets have about 7 boxes an image with outlines, as COCO's; their images are links to a few small JPEGs. Each
figure is from a process of its own: opening the annotations from JSON and from the shards' index, the plan and first
batch, an epoch's plan, what travels to data tasks, and what a data task's process holds of its own once it has made a
batch. The planner for 1,000 workers plans the share of one of them in global batches of 8,000, as a data task does, of
118,287 images (COCO's) and of a million: its time a step is a share of a step of half a second.
"""

from __future__ import annotations

import json
import os
import pickle
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import Row, in_fresh_process, memory_mb
from benchmarks.padding import coco_like_sizes
from detr_ray.config import load_config
from detr_ray.data.formats import open_split
from detr_ray.data.label_map import LabelMap
from detr_ray.data.packing import write_shards
from detr_ray.data.planner import Planner, share_bounds
from detr_ray.engine.stream.planned_data import MIN_WINDOW, MIN_WINDOW_BATCHES, PlannedData
from tests.defaults import size_policy

SIZES = (1_000, 10_000, 100_000)
BATCH = 16
BOXES_AN_IMAGE = 7
SHAPES = 8
WORKERS, GLOBAL_BATCH, STEP_S = 1000, 8000, 0.5


def draw_set(folder: Path, count: int) -> Path:
    """A COCO folder of so many images."""
    rng = np.random.default_rng(0)
    images = folder / "train2017"
    images.mkdir(parents=True)
    (folder / "annotations").mkdir()
    sizes = [(48, 64), (64, 48), (40, 64), (64, 64), (60, 64), (64, 40), (56, 64), (64, 60)][:SHAPES]
    for number, (height, width) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    shape_of = rng.integers(0, SHAPES, count).tolist()
    records = []
    for i, shape in enumerate(shape_of):
        os.link(folder / f"{shape}.jpg", images / f"{i:012d}.jpg")
        records.append({"id": i, "file_name": f"{i:012d}.jpg", "height": sizes[shape][0], "width": sizes[shape][1],
                        "license": 1, "coco_url": f"http://example.org/{i}", "date_captured": "2013"})  # fmt: skip
    of_image = rng.integers(0, count, count * BOXES_AN_IMAGE).tolist()
    corners = rng.uniform(0, 24, (len(of_image), 2)).round(2).tolist()
    outlines = rng.uniform(0, 48, (len(of_image), 24)).round(2).tolist()
    annotations = [
        {"id": k, "image_id": i, "category_id": 1 + k % 80, "bbox": [*corner, 15.5, 12.25], "area": 120.5, "iscrowd": 0,
         "segmentation": [outline]}
        for k, (i, corner, outline) in enumerate(zip(of_image, corners, outlines, strict=True))
    ]  # fmt: skip
    categories = [{"id": k + 1, "name": f"category {k + 1}"} for k in range(80)]
    content = {"images": records, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return folder


def make_set(folder: str, count: int) -> None:
    """The data set and its shards."""
    root = draw_set(Path(folder), count)
    write_shards(open_split(str(root), None, "train"), f"{folder}/shards", shard_megabytes=64)


def planned_data(where: str) -> PlannedData:
    """Opens a set, from its JSON or from its shards."""
    config = load_config(
        None, [where, f"train.global_batch_size={BATCH}", "data.augment.scales=[64]", "data.augment.crop_scales=[50]",
               "data.augment.crop_min=32", "data.augment.crop_max=48"],
    )  # fmt: skip
    train = open_split(config.data.root, config.data.train, "train")
    return PlannedData(config, train, None, LabelMap.contiguous(train.categories))


def drive(where: str, packed: str) -> dict[str, float]:
    """What a driver does with its data, and what it sends."""
    started = time.perf_counter()
    data = planned_data(where)
    opened = time.perf_counter()
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(data, protocol=5, buffer_callback=buffers.append)
    pickled = time.perf_counter()
    resident = memory_mb()["VmRSS"]
    Path(packed).write_bytes(pickle.dumps(data, protocol=5))
    return {
        "open_s": opened - started,
        "pickle_s": pickled - opened,
        "sent_mb": (len(stream) + sum(buffer.raw().nbytes for buffer in buffers)) / 1e6,
        "in_stream_mb": len(stream) / 1e6,
        "resident_mb": resident,
    }


def load(packed: str) -> dict[str, float]:
    """What a data task's process does; its data set arrives as one piece, which it only maps where Ray brings it."""
    data: PlannedData = pickle.loads(Path(packed).read_bytes())
    arrived = memory_mb()["VmRSS"]
    started = time.perf_counter()
    plan, (loader, _) = data.plan(1, 0), data.loaders()
    assert loader is not None and data.train is not None
    loader.load(plan.step(0)[0])
    first_batch = time.perf_counter() - started
    resident = memory_mb()["VmRSS"]
    started = time.perf_counter()
    steps = len(data.train) // BATCH
    for step in range(steps):
        plan.step(step)
    epoch = time.perf_counter() - started
    return {
        "first_batch_s": first_batch,
        "plan_epoch_s": epoch,
        "plan_us_an_image": epoch / (steps * BATCH) * 1e6,
        "own_mb": resident - arrived,
        "own_after_epoch_mb": memory_mb()["VmRSS"] - arrived,
    }


def plan_share(images: int) -> dict[str, float]:
    """Seconds a step for the share of one of 1,000 workers: of the planning of windows, and in all."""
    heights, widths = coco_like_sizes(images)
    planner = Planner(
        heights, widths, np.arange(images), seed=0, global_batch_size=GLOBAL_BATCH, size_policy=size_policy(),
        window=max(MIN_WINDOW, MIN_WINDOW_BATCHES * GLOBAL_BATCH),
    )  # fmt: skip
    steps = planner.window_bounds(1)[1]  # a whole window, of an epoch that is not the process's first
    planner.samples(0, 0, 1)
    seconds = []
    for step in range(planner.steps_per_epoch, planner.steps_per_epoch + steps):
        started = time.perf_counter()
        for first, last in share_bounds(GLOBAL_BATCH, WORKERS, 517):
            planner.samples(step, first, last)
        seconds.append(time.perf_counter() - started)
    return {"a_step_s": sum(seconds) / steps, "longest_s": max(seconds), "median_s": float(np.median(seconds))}


def of_size(scratch: str, count: int) -> dict[str, dict[str, Any]]:
    """All figures of one size, each from a fresh process."""
    folder = f"{scratch}/{count}"
    in_fresh_process(make_set, folder, count)
    return {
        "json": in_fresh_process(drive, f"data.root={folder}", f"{folder}/json.pickle"),
        "shards": in_fresh_process(drive, f"data.train.shards={folder}/shards", f"{folder}/shards.pickle"),
        "task": in_fresh_process(load, f"{folder}/json.pickle"),
    }


def rows_of(found: dict[int, dict[str, dict[str, Any]]]) -> list[Row]:
    """One row a figure and size; the baseline of a size is what the smallest one's growth in proportion would be."""
    rows = []
    figures = [
        ("open JSON", "json", "open_s", "s"),
        ("open shards", "shards", "open_s", "s"),
        ("first planned batch", "task", "first_batch_s", "s"),
        ("plan an epoch", "task", "plan_epoch_s", "s"),
        ("sent to data tasks, once", "json", "sent_mb", "MB"),
        ("data task's own memory", "task", "own_mb", "MB"),
        ("the same after an epoch", "task", "own_after_epoch_mb", "MB"),
    ]
    for name, part, key, unit in figures:
        for count, parts in found.items():
            rows.append(Row(f"{name}, {count:,}", parts[part]["result"][key], None, unit, better="lower"))
    for part in ("json", "shards"):
        for count, parts in found.items():
            peak, before = parts[part]["peak_mb"], parts[part]["before_mb"]
            kept = parts[part]["result"]["resident_mb"] - before
            note = f"above {before:.0f} MB of imports; {kept:.0f} MB are kept"
            rows.append(Row(f"driver's peak, {part}, {count:,}", peak - before, None, "MB", better="lower", note=note))
    return rows


def run() -> list[Row]:
    """The table."""
    with tempfile.TemporaryDirectory(prefix="growth-") as scratch:
        rows = rows_of({count: of_size(scratch, count) for count in SIZES})
    for images in (118_287, 1_000_000):
        found = in_fresh_process(plan_share, images)["result"]
        rows.append(
            Row(
                f"plan of 1 of 1,000 workers, {images:,} images",
                found["a_step_s"] / STEP_S * 100,
                None,
                "% of 0.5 s",
                better="lower",
                note=f"{found['a_step_s'] * 1000:.1f} ms a step, {found['longest_s'] * 1000:.0f} where a window begins",
            )
        )
    return rows
