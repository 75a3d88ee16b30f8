"""Share of padded pixels: batches of the plan against shuffled batches, side by side.

    python -m benchmarks.padding [key=value ...]

Reads annotations only, no image. By default the shapes are those of a COCO-like data set drawn from a seed; with
``data.train.annotations=FILE data.train.images=FOLDER`` they are a real one's. The augmentation is the original's.
"""

from __future__ import annotations

import sys

import numpy as np

from detr_ray.config import Config, load_config
from detr_ray.data.augmentation import AugmentValues, draw
from detr_ray.data.planner import Planner, padding_fraction, split_global_batch
from detr_ray.data.splits import open_split

EPOCHS = 10


def coco_like_sizes(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(heights, widths) distributed about as COCO's: mostly 640 on the long side, 4:3 and 3:2, a quarter upright."""
    rng = np.random.default_rng(seed)
    short = rng.choice(
        [480, 427, 426, 425, 640, 360, 500, 333], count, p=[0.42, 0.2, 0.1, 0.05, 0.05, 0.05, 0.05, 0.08]
    )
    long = np.where(short == 333, 500, 640)
    upright = rng.random(count) < 0.26
    return np.where(upright, long, short), np.where(upright, short, long)


def planned(planner: Planner, per_worker: int, workers: int) -> float:
    """Padding of the plan's batches as the workers get them."""
    steps = range(EPOCHS * planner.steps_per_epoch)
    shares = (
        split_global_batch(planner.global_batch(step), workers, rank) for step in steps for rank in range(workers)
    )
    return padding_fraction(micro_batch for share in shares for micro_batch in share)


def shuffled(heights: np.ndarray, widths: np.ndarray, values: AugmentValues, per_worker: int) -> float:
    """Padding of batches in random order, each image augmented on its own."""
    rng = np.random.default_rng(0)
    padded = filled = 0.0
    for _ in range(EPOCHS):
        order = rng.permutation(len(heights))
        sizes = np.stack([heights[order], widths[order]], axis=1)
        final = draw(sizes, rng.random((len(sizes), 8)), values).size
        final = final[: len(final) // per_worker * per_worker].reshape(-1, per_worker, 2).astype(np.float64)
        padded += float((final.max(axis=1).prod(axis=1) * per_worker).sum())
        filled += float(final.prod(axis=2).sum())
    return 1 - filled / padded


def main(argv: list[str]) -> int:
    """Prints the table."""
    config: Config = load_config(None, argv)
    if config.data.train is not None or config.data.root is not None:
        index = open_split(config.data.root, config.data.train, "train")
        heights, widths, name = index.heights, index.widths, index.source
    else:
        heights, widths = coco_like_sizes(4096)
        name = "4,096 images of COCO-like shapes"
    values = AugmentValues(**config.data.augment.model_dump())
    print(f"{name}: {len(heights)} images, {EPOCHS} epochs, 2 workers")
    print(f"{'images a worker':>16} {'shuffled':>9} {'planned':>9} {'8 share draws':>14}")
    for per_worker in (2, 4, 8, 16):
        found = []
        for shared_draws in (values.shared_draws, 8):
            augment = AugmentValues(**{**config.data.augment.model_dump(), "shared_draws": shared_draws})
            planner = Planner(
                heights, widths, np.arange(len(heights)), seed=config.run.seed, global_batch_size=2 * per_worker,
                augment=augment, window=config.data.window or 4096,
            )  # fmt: skip
            found.append(planned(planner, per_worker, 2))
        random = shuffled(heights, widths, values, per_worker)
        print(f"{per_worker:>16} {random:>9.1%} {found[0]:>9.1%} {found[1]:>14.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
