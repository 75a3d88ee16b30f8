"""Planned batches against random ones: padding, work shared evenly, whether the order still shuffles, and the loss.

    python -m benchmarks padding

Random batches come from the same planner with a window of one batch (`data.window`), in which there is nothing to sort.
Shapes are drawn like COCO's, and those of 128 images of COCO where they are; the augmentation is the original's. An
order that is no longer shuffled would show in four figures: how often two images that shared a batch share one in the
next epoch, against chance, and against what pairs of such stored shapes do anyway; whether an image comes early again
that came early; whether a step's images are large where the last step's were. Last, the quickstart's model is trained
with both on drawn images of many shapes, from the same weights.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Row
from benchmarks.pipeline import COCO128
from benchmarks.step import QUICKSTART
from detr_ray.config import load_config
from detr_ray.data.evaluation_plan import plan_evaluation
from detr_ray.data.formats import open_split
from detr_ray.data.loader import BatchLoader
from detr_ray.data.planner import Planner, share_bounds
from detr_ray.engine.context import LocalContext
from detr_ray.engine.job import prepare_job
from detr_ray.engine.loop import TrainingLoop
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.engine.stream.planned_data import MIN_WINDOW, MIN_WINDOW_BATCHES
from detr_ray.structures import IMAGENET_PIXELS, to_device
from detr_ray.tracking import MemoryTracker
from tests.defaults import draw_shapes, size_policy

IMAGES = 4096
EPOCHS, SHUFFLED_EPOCHS = 4, 16
PER_WORKER, WORKERS, RANKS = (2, 4, 8, 16), 2, 8
BATCH = 16

DRAWN, HELD_OUT = 1600, 160
TRAIN_SEEDS, TRAIN_EPOCHS = (1, 2), 3
LAST_STEPS = 50

Shapes = tuple[np.ndarray, np.ndarray]
"""Heights and widths of the stored images."""


def coco_like_sizes(count: int, seed: int = 0) -> Shapes:
    """(heights, widths) distributed about as COCO's: mostly 640 on the long side, 4:3 and 3:2, a quarter upright."""
    rng = np.random.default_rng(seed)
    short = rng.choice(
        [480, 427, 426, 425, 640, 360, 500, 333], count, p=[0.42, 0.2, 0.1, 0.05, 0.05, 0.05, 0.05, 0.08]
    )
    long = np.where(short == 333, 500, 640)
    upright = rng.random(count) < 0.26
    return np.where(upright, long, short), np.where(upright, short, long)


def planner_of(shapes: Shapes, batch: int, *, planned: bool = True, shared_draws: int = 1) -> Planner:
    """As training plans its global batches; or in random order."""
    window = max(MIN_WINDOW, MIN_WINDOW_BATCHES * batch) if planned else batch
    policy = size_policy(shared_draws=shared_draws)
    ids = np.arange(len(shapes[0]))
    return Planner(*shapes, ids, seed=0, global_batch_size=batch, size_policy=policy, window=window)


def sizes_by_rank(shapes: Shapes, ranks: int, each: int, epochs: int, *, planned: bool, shared: int = 1) -> np.ndarray:
    """Final sizes as the workers get them, ``[steps, ranks, each, 2]``."""
    if planned:
        planner = planner_of(shapes, ranks * each, shared_draws=shared)
        sizes = np.concatenate([planner.epoch_sizes(epoch) for epoch in range(epochs)])
        shares = [share_bounds(ranks * each, ranks, rank)[0] for rank in range(ranks)]
        return np.stack([sizes[:, first:last] for first, last in shares], axis=1).astype(np.int64)
    # A random global batch is as many random batches: the planner would sort the images within one.
    planner = planner_of(shapes, each, planned=False)
    sizes = np.concatenate([planner.epoch_sizes(epoch) for epoch in range(epochs)]).astype(np.int64)
    return sizes[: len(sizes) // ranks * ranks].reshape(-1, ranks, each, 2)


def padded_pixels(sizes: np.ndarray) -> np.ndarray:
    """Pixels of each worker's batch, ``[steps, ranks]``."""
    return sizes.max(axis=2).prod(axis=-1) * sizes.shape[2]


def padding_row(what: str, shapes: Shapes, each: int, epochs: int, shared: int = 1) -> Row:
    """Share of the pixels that is padding."""
    found = []
    for planned in (True, False):
        sizes = sizes_by_rank(shapes, WORKERS, each, epochs, planned=planned, shared=shared)
        found.append(100 * (1 - sizes.prod(axis=-1).sum() / padded_pixels(sizes).sum()))
    return Row(f"padding, {what}, {each} images a worker", found[0], found[1], "%", "lower")


def work_rows(shapes: Shapes, each: int) -> list[Row]:
    """What all workers of a step wait for: the one with the most pixels."""
    excess = []
    for planned in (True, False):
        pixels = padded_pixels(sizes_by_rank(shapes, RANKS, each, EPOCHS, planned=planned))
        excess.append(100 * (pixels.max(axis=1) / pixels.mean(axis=1) - 1))
    name = f"busiest of {RANKS} workers over their mean, {each} images each"
    note = "more pixels than the mean worker of the step"
    ours, random = excess
    return [
        Row(name, ours.mean(), random.mean(), "%", "lower", note),
        Row(f"{name}, worst", np.quantile(ours, 0.99), np.quantile(random, 0.99), "%", "lower", "99th percentile"),
    ]


def order_of(planner: Planner, epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """The images of each step ``[epochs, steps, batch]``, and each step's mean area ``[epochs, steps]``."""
    steps = planner.steps_per_epoch
    plans = [planner.global_batch(step) for step in range(epochs * steps)]
    images = np.array([[sample.index for sample in plan] for plan in plans]).reshape(epochs, steps, -1)
    areas = np.array([statistics.fmean(sample.size[0] * sample.size[1] for sample in plan) for plan in plans])
    return images, areas.reshape(epochs, steps)


def met_again(images: np.ndarray, shape_of: np.ndarray) -> tuple[float, float]:
    """How often two images that share a batch in one epoch share one in the next.

    Args:
        images: ``[epochs, steps, batch]``, every image once an epoch.
        shape_of: ``[images]`` number of the stored shape, from 0.

    Returns:
        As a multiple of chance, and of what pairs of such shapes do whether or not they shared a batch before.
    """
    epochs, steps, batch = images.shape
    count, shapes = steps * batch, int(shape_of.max()) + 1
    batch_of = np.empty((epochs, count), np.int64)
    for epoch in range(epochs):
        batch_of[epoch, images[epoch]] = np.arange(steps)[:, None]
    left, right = (images[:, :, column].reshape(epochs, -1) for column in np.triu_indices(batch, 1))
    again = np.stack([batch_of[k + 1, left[k]] == batch_of[k + 1, right[k]] for k in range(epochs - 1)])

    number_of = np.bincount(shape_of, minlength=shapes)
    pairs = np.outer(number_of, number_of) - np.diag(number_of)  # ordered pairs of two images
    kinds = np.stack([shape_of[left], shape_of[right]])
    sharing = np.zeros((shapes, shapes))
    np.add.at(sharing, tuple(kinds.reshape(2, -1)), 1)
    likely = (sharing + sharing.T) / (epochs * np.maximum(pairs, 1))
    by_shape = likely[tuple(kinds[:, :-1])].mean()
    return again.mean() / ((batch - 1) / (count - 1)), again.mean() / by_shape


def place_correlation(images: np.ndarray) -> float:
    """Rank correlation of the images' places in one epoch and in the next."""
    places = images.reshape(len(images), -1).argsort(axis=1)
    return statistics.fmean(np.corrcoef(before, after)[0, 1] for before, after in itertools.pairwise(places))


def area_correlation(areas: np.ndarray) -> float:
    """Correlation of the mean areas of successive steps."""
    return float(np.corrcoef(areas[:, :-1].ravel(), areas[:, 1:].ravel())[0, 1])


def shuffle_rows(shapes: Shapes) -> list[Row]:
    """Whether the planned order still shuffles, and what it costs to have like images together."""
    shape_of = np.unique(np.stack(shapes, axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    orders = [order_of(planner_of(shapes, BATCH, planned=planned), SHUFFLED_EPOCHS) for planned in (True, False)]
    (again, beyond), (random_again, random_beyond) = (met_again(images, shape_of) for images, _ in orders)
    places, random_places = (place_correlation(images) for images, _ in orders)
    areas, random_areas = (area_correlation(areas) for _, areas in orders)
    spread, random_spread = (100 * areas.std() / areas.mean() for _, areas in orders)
    return [
        Row("two images meet again in the next epoch", again, random_again, "x chance", "lower",
            f"global batches of {BATCH}; the price of sorting: like shapes meet more often"),
        Row("the same, by what their shapes give", beyond, None, "x", "lower",
            f"1: epochs know nothing of each other; random {random_beyond:.2f}"),
        Row("places in successive epochs", places, None, "correlation", "lower",
            f"0: shuffled anew, 1: the same order; random {random_places:.3f}"),
        Row("areas of successive steps", areas, None, "correlation", "lower",
            f"0: sizes come in random order, 1: sorted; random {random_areas:.3f}"),
        Row("a step's mean area, spread over steps", spread, random_spread, "%", "lower",
            "standard deviation; the price of sorting: steps of small and of large images"),
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Trained:
    """What one training gave: the loss of each step, and that on images it was not trained on."""

    losses: list[float]
    held_out: float


def train(root: Path, scratch: Path, seed: int, *, planned: bool) -> Trained:
    """Trains the quickstart's model for a few epochs; the same seed gives the same first weights."""
    overrides = [
        f"run.seed={seed}", f"run.storage={scratch}", f"run.name=seed-{seed}-{'planned' if planned else 'random'}",
        "data.root=null", "data.generate=null", f"data.train.annotations={root}/annotations/instances_train2017.json",
        f"data.train.images={root}/train2017", "data.augment.scales=[32,40,48]", "data.augment.max_size=96",
        "model.num_queries=5", f"train.epochs={TRAIN_EPOCHS}", f"train.global_batch_size={BATCH}",
        "train.num_workers=1", "train.launcher=local",
        "train.log_every_steps=1", "tracking.enabled=false",
    ]  # fmt: skip
    config = load_config(QUICKSTART, overrides if planned else [*overrides, f"data.window={BATCH}"])
    job = prepare_job(config, lambda line: None)
    tracker = MemoryTracker()
    loop = TrainingLoop(job, LocalContext(), LocalBatches(job.data.plan(1, 0), *job.data.loaders()), tracker)
    loop.run()
    losses = [value for _, value in tracker.history("train/loss")]
    return Trained(losses, held_out_loss(loop, root))


@torch.no_grad()
def held_out_loss(loop: TrainingLoop, root: Path) -> float:
    """Mean loss a batch on the validation images, at their middle size."""
    index = open_split(str(root), None, "val")
    loader = BatchLoader(index, loop.job.data.label_map)
    plans = plan_evaluation(index.heights, index.widths, index.image_ids, size=40, max_size=96, batch_size=BATCH)
    model, total = loop.model.eval(), 0.0
    for padded in loader.load_each(plans):
        batch = to_device(padded, torch.device("cpu"), IMAGENET_PIXELS)
        normalisers = loop.criterion.normalisers(padded.counts.tolist())
        losses = loop.criterion(model(batch.images, batch.mask), batch.targets, normalisers)
        total += float(loop.criterion.total(losses)) * len(padded.counts)
    return total / len(index)


def training_rows(scratch: Path) -> list[Row]:
    """The loss after the same steps from the same weights, with planned and with random batches."""
    root = scratch / "drawn"
    draw_shapes(root, num_train=DRAWN, num_val=HELD_OUT, seed=0, image_size=(32, 80), max_objects=2,
                     min_object_size=16, clutter=0)  # fmt: skip
    sides = {"planned": True, "random": False}
    found = {name: [train(root, scratch, seed, planned=side) for seed in TRAIN_SEEDS] for name, side in sides.items()}

    def row(name: str, of_run: Callable[[Trained], float], note: str) -> Row:
        seeds = {side: [of_run(run) for run in runs] for side, runs in found.items()}
        ours, random = (statistics.fmean(values) for values in seeds.values())
        return Row(name, ours, random, "loss", "lower", f"{note}; seeds: {_listed(seeds)}")

    steps = len(found["planned"][0].losses)
    curves = {
        side: np.mean([run.losses for run in runs], axis=0)[: steps // LAST_STEPS * LAST_STEPS]
        .reshape(-1, LAST_STEPS).mean(axis=1).tolist()
        for side, runs in found.items()
    }  # fmt: skip
    return [
        row(f"training loss, last {LAST_STEPS} of {steps} steps",
            lambda run: statistics.fmean(run.losses[-LAST_STEPS:]), f"each {LAST_STEPS} steps: {_listed(curves)}"),
        row(f"loss on {HELD_OUT} other images after {steps} steps", lambda run: run.held_out,
            "with the running statistics of batch norm"),
    ]  # fmt: skip


def _listed(values: Mapping[str, Sequence[float]]) -> str:
    return ", ".join(f"{name} {' '.join(f'{value:.1f}' for value in several)}" for name, several in values.items())


def run() -> list[Row]:
    """The table."""
    shapes = coco_like_sizes(IMAGES)
    rows = [padding_row("COCO-like shapes", shapes, each, EPOCHS) for each in PER_WORKER]
    if COCO128.is_dir():
        index = open_split(str(COCO128), None, "train")
        few = (index.heights, index.widths)
        for each in PER_WORKER:
            rows.append(padding_row(f"{len(index)} images of COCO", few, each, 32))
        rows.append(padding_row(f"{len(index)} images of COCO, shared_draws=8", few, 8, 32, shared=8))
    for each in (2, 8):
        rows += work_rows(shapes, each)
    rows += shuffle_rows(shapes)
    with tempfile.TemporaryDirectory(prefix="padding-") as folder:
        return rows + training_rows(Path(folder))
