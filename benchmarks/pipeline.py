"""The input pipeline: images/s with the original's training augmentation, against a DataLoader over Pillow transforms.

    python -m benchmarks pipeline

128 images of COCO, batches of 8. In one process both sides take turns, on one thread each. With two data processes each
side runs alone in a process of its own: ours is two Ray Data tasks at a time, as in training, and its figures hold what
moves batches to the training process. A core's images/s are images by the CPU time of all processes, in a steady state.
Bytes an image are those of a batch as it travels. Last, photos of 12 megapixels, with and without
``data.reduced_decoding``, and by how much that changes pixels.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.baseline.pillow_pipeline import CocoFolder, data_loader
from benchmarks.harness import Row, Timing, alternate, in_fresh_process
from detr_ray.config import Config, load_config
from detr_ray.data.formats import open_split
from detr_ray.data.label_map import LabelMap
from detr_ray.data.loader import BatchLoader
from detr_ray.data.packing import write_shards
from detr_ray.engine.stream.planned_data import PlannedData
from tests.defaults import draw_shapes

COCO128 = Path(__file__).parents[2] / "shared" / "data" / "coco128"
BATCH, WORKERS = 8, 2
ROUNDS = 5
STEADY_EPOCHS = 4
PHOTOS, PHOTO_SIZE = 4, (4000, 3000)


def images_folder(scratch: Path) -> Path:
    """A folder in COCO's layout: real images where they are, drawn ones otherwise."""
    if COCO128.is_dir():
        return COCO128
    root = scratch / "drawn"
    if not root.exists():
        draw_shapes(root, num_train=128, num_val=1, seed=0, image_size=(480, 640), max_objects=12)
    return root


def planned_data(*overrides: str) -> PlannedData:
    """The training set, planned as training would plan it."""
    config: Config = load_config(None, [f"train.global_batch_size={BATCH}", *overrides])
    train = open_split(config.data.root, config.data.train, "train")
    return PlannedData(config, train, None, LabelMap.contiguous(train.categories))


def epoch_of(data: PlannedData) -> Callable[[], int]:
    """Loads an epoch in this process, another one at each call; gives the bytes of its batches."""
    plan, (loader, _) = data.plan(1, 0), data.loaders()
    assert loader is not None and data.train is not None
    steps = len(data.train) // BATCH
    epochs = iter(range(1_000_000))

    def run() -> int:
        first = next(epochs) * steps
        batches = (samples for step in range(first, first + steps) for samples in plan.step(step))
        return sum(batch.images.nbytes for batch in loader.load_each(batches))

    return run


def plain_epoch(root: Path) -> Callable[[], int]:
    """The same of the baseline."""
    batches = data_loader(CocoFolder(root / "annotations" / "instances_train2017.json", root / "train2017"), BATCH, 0)
    return lambda: sum(images.nbytes + mask.nbytes for images, mask, _ in batches)


def in_one_process(root: Path, shards: str) -> list[Row]:
    """Images/s and bytes an image, one thread each."""
    moved: dict[str, list[int]] = {"folder": [], "shards": [], "plain": []}
    runs = {
        "folder": epoch_of(planned_data(f"data.root={root}")),
        "shards": epoch_of(planned_data(f"data.train.shards={shards}")),
        "plain": plain_epoch(root),
    }
    counted: dict[str, Callable[[], None]] = {
        name: functools.partial(lambda name, run: moved[name].append(run()), name, run) for name, run in runs.items()
    }
    times = alternate(counted, rounds=ROUNDS)
    images = 128 // BATCH * BATCH
    bytes_an_image = {name: statistics.mean(values) / images for name, values in moved.items()}

    def row(name: str, what: str) -> Row:
        ours, plain = times[what], times["plain"]
        return Row(name, images / ours.median, images / plain.median, "images/s", spread=max(ours.spread, plain.spread))

    return [
        row("one process, folder", "folder"),
        row("one process, shards", "shards"),
        Row(
            "a batch as it travels", bytes_an_image["folder"] / 1e6, bytes_an_image["plain"] / 1e6, "MB/image",
            better="lower", note="uint8, planned batches; floats and mask, random batches",
        ),
    ]  # fmt: skip


def steady(batches: Callable[[int], Iterator[Any]], cpu_seconds: Callable[[], float]) -> dict[str, float]:
    """Images/s, and images by CPU second, of the epochs after a first one."""
    for _ in batches(0):
        pass
    images, cpu, started = 0, cpu_seconds(), time.perf_counter()
    for epoch in range(1, 1 + STEADY_EPOCHS):
        for _ in batches(epoch):
            images += BATCH
    wall = time.perf_counter() - started
    return {"images/s": images / wall, "images/cpu-s": images / (cpu_seconds() - cpu)}


def tree_cpu_seconds() -> float:
    """CPU time so far of this process and of those below it that live."""
    import psutil

    total = 0.0
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def through_ray(root: str) -> dict[str, float]:
    """Ours with two data tasks, and the object store's peak."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    from detr_ray.runtime.datasets import RayBatches
    from detr_ray.runtime.session import ray_session

    data = planned_data(f"data.root={root}", f"data.tasks_per_worker={WORKERS}")
    assert data.train is not None
    steps = len(data.train) // BATCH
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        state = get_state_from_address(ray.get_runtime_context().gcs_address)
        while not ended.wait(0.1):
            store = get_memory_info_reply(state).store_stats
            peak[0] = max(peak[0], store.object_store_bytes_used / 1e6)

    with ray_session(1, WORKERS, False):
        batches = RayBatches(data, ray.put(data), 1, 0)
        # One stream over all epochs, as training reads it.
        stream = batches.train_batches(0, (1 + STEADY_EPOCHS) * steps)
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()

        def epoch(number: int) -> Iterator[Any]:
            return (next(stream) for _ in range(steps))

        found = steady(epoch, tree_cpu_seconds)
        ended.set()
        watcher.join()
    return {**found, "store_mb": peak[0]}


def through_workers(root: str) -> dict[str, float]:
    """The baseline with two worker processes."""
    folder = Path(root)
    dataset = CocoFolder(folder / "annotations" / "instances_train2017.json", folder / "train2017")
    loader = data_loader(dataset, BATCH, WORKERS)
    return steady(lambda epoch: iter(loader), tree_cpu_seconds)


def with_two_processes(root: Path) -> list[Row]:
    """Images/s of two data processes, together and a core."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
    for _ in range(2):
        found["ours"].append(in_fresh_process(through_ray, str(root))["result"])
        found["plain"].append(in_fresh_process(through_workers, str(root))["result"])

    def row(name: str, key: str, unit: str) -> Row:
        ours, plain = (Timing(tuple(values[key] for values in found[side])) for side in ("ours", "plain"))
        return Row(name, ours.median, plain.median, unit, spread=max(ours.spread, plain.spread))

    store = max(values["store_mb"] for values in found["ours"])
    return [
        row("two data processes", "images/s", "images/s"),
        row("two data processes, a core", "images/cpu-s", "images/s"),
        Row("object store at its peak", store, None, "MB", better="lower", note=f"{WORKERS} tasks, 4 batches ahead"),
    ]


def draw_photos(root: Path, folder: Path) -> None:
    """Photos as wide as many images side by side, so that they hold detail down to the pixel, in COCO's layout."""
    rng = np.random.default_rng(0)
    sources = [Image.open(path).convert("RGB") for path in sorted((root / "train2017").iterdir())[:64]]
    (folder / "train2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    width, height = PHOTO_SIZE
    for number in range(PHOTOS):
        photo = Image.new("RGB", PHOTO_SIZE)
        for left in range(0, width, 500):
            for top in range(0, height, 500):
                photo.paste(sources[rng.integers(len(sources))].resize((500, 500)), (left, top))
        photo.save(folder / "train2017" / f"{number}.jpg", quality=90)
    records = ", ".join(
        f'{{"id": {number}, "file_name": "{number}.jpg", "width": {width}, "height": {height}}}'
        for number in range(PHOTOS)
    )
    (folder / "annotations" / "instances_train2017.json").write_text(
        f'{{"images": [{records}], "annotations": [], "categories": [{{"id": 1, "name": "thing"}}]}}'
    )


def large_photos(root: Path, scratch: Path) -> list[Row]:
    """Photos of 12 megapixels decoded whole, and at a fraction of their size where that is large enough."""
    folder = scratch / "photos"
    draw_photos(root, folder)
    data = planned_data(f"data.root={folder}", "train.global_batch_size=4")
    assert data.train is not None
    plans = [samples for step in range(4) for samples in data.plan(1, 0).step(step)]
    whole = BatchLoader(data.train, data.label_map)
    rows = []

    def loaded(loader: BatchLoader) -> list[Any]:
        return [*loader.load_each(plans)]

    for margin in (2.0, 1.0):
        reduced = BatchLoader(data.train, data.label_map, reduce=margin)
        times = alternate(
            {"reduced": functools.partial(loaded, reduced), "whole": functools.partial(loaded, whole)}, rounds=3
        )
        pairs = zip(reduced.load_each(plans), whole.load_each(plans), strict=True)
        difference = np.concatenate(
            [np.abs(a.images.astype(np.int16) - b.images.astype(np.int16)).ravel() for a, b in pairs]
        )
        rows.append(
            Row(
                f"12 MP photos, reduced_decoding={margin:g}",
                len(plans) * 4 / times["reduced"].median,
                len(plans) * 4 / times["whole"].median,
                "images/s",
                note=f"baseline: decoded whole; pixels differ by {difference.mean():.2f} of 255 on average, "
                f"99.9 % by at most {np.quantile(difference, 0.999):.0f}",
                spread=max(times["reduced"].spread, times["whole"].spread),
            )
        )
    return rows


def run() -> list[Row]:
    """The table."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="pipeline-") as folder:
            scratch = Path(folder)
            root = images_folder(scratch)
            shards = str(scratch / "shards")
            write_shards(open_split(str(root), None, "train"), shards)
            rows = in_one_process(root, shards)
            rows += large_photos(root, scratch)
            return rows + with_two_processes(root)
    finally:
        torch.set_num_threads(threads)
