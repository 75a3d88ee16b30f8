"""A picture of the augmentation: the same images under each transform of the list, and under all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from detr_ray.callbacks import Say
from detr_ray.config import Config
from detr_ray.data.index import DatasetIndex
from detr_ray.data.loader import BatchLoader
from detr_ray.data.planner import Planner
from detr_ray.data.sample import Instances, Picture, SamplePlan
from detr_ray.data.transforms.sequence import Entry, TransformSequence, always
from detr_ray.engine.pictures.of_data import pictured, planned_data
from detr_ray.engine.pictures.request import Drawn, PictureRequest
from detr_ray.engine.stream.augmentation import augmentation_of
from detr_ray.viz.samples import PicturedImage, sample_steps


def augmentation_picture(config: Config, request: PictureRequest, say: Say) -> Drawn:
    """Rows of the same images: as stored, after each single transform, and as used in training.

    The images of a mosaic are those of the picture. ``request.step`` gives another draw.
    """
    data = planned_data(config, say)
    assert data.train is not None
    train = data.train.first(min(request.images, len(data.train)))
    loader = BatchLoader(train, data.label_map)
    augment = config.data.augment
    entries = augmentation_of(augment).entries
    rows: list[tuple[str, Sequence[SamplePlan]]] = [("as stored", _as_stored(train))]
    for transform, entry in zip(augment.transforms, entries, strict=True):
        rows.append((transform.name, _planned(train, (always(entry),), config.run.seed, request.step)))
    rows.append(("as trained", _planned(train, entries, config.run.seed, request.step)))
    lines: list[str] = []
    names = data.label_map.names
    pictures = [[_trained_on(title, loader, sample, names, lines) for sample in samples] for title, samples in rows]
    return Drawn(sample_steps(pictures), list(dict.fromkeys(lines)))


def _as_stored(train: DatasetIndex) -> list[SamplePlan]:
    columns = zip(train.image_ids.tolist(), train.heights.tolist(), train.widths.tolist(), strict=True)
    return [SamplePlan(row, row, image_id, (height, width)) for row, (image_id, height, width) in enumerate(columns)]


def _planned(train: DatasetIndex, entries: tuple[Entry, ...], seed: int, step: int) -> list[SamplePlan]:
    """One sample of each image, in the order of the images."""
    planner = Planner(
        train.heights, train.widths, train.image_ids,
        seed=seed, global_batch_size=len(train), size_policy=TransformSequence(entries),
    )  # fmt: skip
    return sorted(planner.global_batch(step), key=lambda sample: sample.index)


def _trained_on(
    title: str, loader: BatchLoader, sample: SamplePlan, names: Sequence[str | None], lines: list[str]
) -> PicturedImage:
    """A sample as the model would get it."""
    batch = loader.load([sample])
    lines += [f"WARNING: {line}" for line in batch.bad_images]
    height, width = sample.size
    centres, sides = batch.boxes_cxcywh[:, :2], batch.boxes_cxcywh[:, 2:]
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1) * np.array([width, height] * 2)
    picture = Picture(torch.from_numpy(batch.images[0].transpose(1, 2, 0)), Instances(boxes, batch.labels, sample.size))
    return pictured(f"{title}\nimage {sample.image_id}, {width} x {height}", picture, names)
