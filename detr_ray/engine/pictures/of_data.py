"""Pictures of the training data: planned batches, the augmentation of a sample step by step, a data set at a glance."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from detr_ray.callbacks import Say
from detr_ray.config import Config, ConfigError
from detr_ray.data.decoding import decode_image
from detr_ray.data.image_headers import ImageError
from detr_ray.data.images import ImageReader
from detr_ray.data.index import DatasetIndex
from detr_ray.data.sample import Crop, Flip, Picture, Place, Resize, SamplePlan, Step
from detr_ray.data.statistics import count_boxes
from detr_ray.data.transforms.sequence import Combine
from detr_ray.engine.job import choose_label_space, label_map_for
from detr_ray.engine.opened_data import open_data
from detr_ray.engine.pictures.request import Drawn, PictureRequest
from detr_ray.engine.stream.planned_data import PlannedData
from detr_ray.structures import PaddedBatch
from detr_ray.viz.dataset import SplitColumns, dataset_figure
from detr_ray.viz.samples import PicturedImage, padded_batch, sample_steps

_MOST_PLANNED = 20_000
_MOST_UNREADABLE = 50


def planned_data(config: Config, say: Say) -> PlannedData:
    """The data of a configuration with its plan, as in a training from random weights.

    Raises:
        ConfigError: no data is configured.
        DataError: it cannot be used.
    """
    train, val = open_data(config.data, say)
    space = choose_label_space(config, train, lambda: False, None)
    return PlannedData(config, train, val, label_map_for(space, train, val))


def batch_picture(config: Config, request: PictureRequest, say: Say) -> Drawn:
    """The first micro-batch of rank 0 at a step of the training, as the model gets it."""
    return planned_batch(planned_data(config, say), request)


def planned_batch(data: PlannedData, request: PictureRequest) -> Drawn:
    """The same of data that is planned already.

    Args:
        data: with a training set.
        request: its ``step`` and ``images`` are used.
    """
    samples = _samples_of_step(data, request.step)
    loader = data.loaders()[0]
    assert loader is not None
    batch = loader.load(samples)
    lines = [f"image {image_id} at place {place}" for place, image_id in enumerate(batch.image_ids.tolist())]
    lines += [f"WARNING: {line}" for line in batch.bad_images]
    title = f"step {request.step}, micro-batch 0 of rank 0, {len(samples)} images"
    figure = padded_batch(_first(batch, request.images), data.label_map.names, title)
    return Drawn(figure, lines)


def sample_picture(config: Config, request: PictureRequest, say: Say) -> Drawn:
    """Samples of a step before and after each step of their augmentation.

    In place of samples whose images cannot be read, those that come next are shown.
    """
    data = planned_data(config, say)
    if request.image is None:
        samples = _samples_from(data, request.step)
        wanted = min(request.images, len(_samples_of_step(data, request.step)))
    else:
        samples = iter((_sample_of_image(data, row_of_image(_train(data), request.image), request.step),))
        wanted = 1
    names = data.label_map.names
    reader = ImageReader(_train(data))
    rows: list[list[PicturedImage]] = []
    lines: list[str] = []
    unreadable: list[ImageError] = []
    for sample in samples:
        try:
            stages = _stages(data, reader, sample)
        except ImageError as error:
            if request.image is not None:
                raise
            unreadable.append(error)
            if len(unreadable) == _MOST_UNREADABLE:
                break
            continue
        rows.append([pictured(title, picture, names) for title, picture in stages])
        lines.append(f"image {sample.image_id}: {', '.join(title.replace(chr(10), ' ') for title, _ in stages)}")
        if len(rows) == wanted:
            break
    if not rows:
        raise unreadable[0]
    return Drawn(sample_steps(rows), [*lines, *(f"WARNING: left out: {error}" for error in unreadable)])


def data_picture(config: Config, request: PictureRequest, say: Say) -> Drawn:
    """Both splits at a glance, with their numbers."""
    data = planned_data(config, say)
    splits = [_columns(data, split, index) for split, index in (("train", data.train), ("val", data.val)) if index]
    lines = []
    for split in splits:
        lines += [f"{split.name}: {what}: {value}" for what, value in split.numbers()]
    return Drawn(dataset_figure(splits), lines)


def row_of_image(index: DatasetIndex, image: str) -> int:
    """The row of an image that a user names by its id or its file name.

    Raises:
        ConfigError: there is none.
    """
    if image.isascii() and image.isdigit():
        found = np.flatnonzero(index.image_ids == int(image))
        if len(found):
            return int(found[0])
    names = index.file_names.to_pylist()
    rows = [row for row, name in enumerate(names) if name == image or name.rpartition("/")[2] == image]
    if not rows:
        raise ConfigError(
            f"--image: {index.source} has no image with the id or the file name {image!r}; the first one is "
            f"{index.image_ids[0]}, {names[0]}"
        )
    if len(rows) > 1:
        raise ConfigError(f"--image: {len(rows)} images of {index.source} are called {image!r}: give the id of one")
    return rows[0]


def _train(data: PlannedData) -> DatasetIndex:
    assert data.train is not None, "opened for training"
    return data.train


def _samples_of_step(data: PlannedData, step: int) -> tuple[SamplePlan, ...]:
    batch_size = data.config.train.global_batch_size
    if batch_size > data.planner.epoch_samples:
        count, source = data.planner.epoch_samples, _train(data).source
        raise ConfigError(f"train.global_batch_size: {batch_size} is more than the {count} samples of {source}")
    workers = data.config.train.worker_range
    return data.plan(1 if workers is None else workers[0], 0).step(step)[0]


def _samples_from(data: PlannedData, step: int) -> Iterator[SamplePlan]:
    """The samples of an epoch's steps, from this one on."""
    for later in range(step, step + data.planner.steps_per_epoch):
        yield from _samples_of_step(data, later)


def _sample_of_image(data: PlannedData, row: int, step: int) -> SamplePlan:
    """The first sample of an image from a step on. Two epochs contain every image that `data.balance` does not drop."""
    steps = 2 * data.planner.steps_per_epoch
    plan = data.plan(1, 0)
    for later in range(step, step + steps):
        for batch in plan.step(later):
            for sample in batch:
                if sample.index == row:
                    return sample
    raise ConfigError(f"--image: image {_train(data).image_ids[row]} comes in none of {steps} steps")


def _stages(data: PlannedData, reader: ImageReader, sample: SamplePlan) -> list[tuple[str, Picture]]:
    """(name of the step, picture after it) for each step; first the image as stored."""
    train = _train(data)
    stored = _stored(data, reader, sample.index)
    partners = [partner.apply(_stored(data, reader, partner.index)) for partner in sample.partners]
    stages = [(f"image {sample.image_id}, {train.file_name(sample.index)}\nstored, {_size_of(stored)}", stored)]
    picture = stored
    for step in sample.steps:
        picture = step.apply(picture, partners)
        stages.append((f"{_described(step)}\n{_size_of(picture)}, {_boxes_of(picture)}", picture))
    final = picture.resize(sample.size)
    if tuple(picture.pixels.shape[:2]) != sample.size:
        stages.append((f"resize to the planned size\n{_size_of(final)}, {_boxes_of(final)}", final))
    return stages


def _stored(data: PlannedData, reader: ImageReader, row: int) -> Picture:
    train = _train(data)
    size = (int(train.heights[row]), int(train.widths[row]))
    pixels = decode_image(reader.read(row), reader.name(row), size).permute(1, 2, 0)
    return Picture(pixels, train.training_instances(row, data.label_map))


def _described(step: Step) -> str:
    if isinstance(step, Flip):
        return "flip left to right" if step.axis else "flip top to bottom"
    if isinstance(step, Resize):
        return f"resize to {step.size[1]} x {step.size[0]}"
    if isinstance(step, Crop):
        return f"crop {step.width} x {step.height} at ({step.left}, {step.top})"
    if isinstance(step, Place):
        return f"place on {step.margin.size[1]} x {step.margin.size[0]} at ({step.margin.left}, {step.margin.top})"
    if isinstance(step, Combine):
        return _described(step.step)
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(step).__name__).lower()
    values = [f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in _values(step)]
    return " ".join([words, ", ".join(values)])


def _values(step: Step) -> list[tuple[str, Any]]:
    """The parameters of a step, without seeds."""
    fields = dataclasses.fields(step)  # type: ignore[arg-type]
    return [(field.name, getattr(step, field.name)) for field in fields if field.name != "seed"]


def _size_of(picture: Picture) -> str:
    height, width = picture.pixels.shape[:2]
    return f"{width} x {height}"


def _boxes_of(picture: Picture) -> str:
    count = len(picture.instances.labels)
    return f"{count} box{'' if count == 1 else 'es'}"


def pictured(title: str, picture: Picture, names: Sequence[str | None]) -> PicturedImage:
    """A picture with its title, and the names of its objects.

    Args:
        title: above it.
        picture: what is shown.
        names: one a label.
    """
    height, width = picture.pixels.shape[:2]
    instances = picture.instances.scale((height, width))
    labels = instances.labels.tolist()
    texts = [names[label] or f"label {label}" for label in labels]
    return PicturedImage(title, picture.pixels.numpy(), instances.boxes_xyxy_px, texts, labels)


def _first(batch: PaddedBatch, count: int) -> PaddedBatch:
    """The first images of a batch, in the frame of the whole batch."""
    boxes = int(batch.counts[:count].sum())
    return dataclasses.replace(
        batch,
        images=batch.images[:count],
        sizes=batch.sizes[:count],
        orig_sizes=batch.orig_sizes[:count],
        image_ids=batch.image_ids[:count],
        positions=batch.positions[:count],
        counts=batch.counts[:count],
        labels=batch.labels[:boxes],
        boxes_cxcywh=batch.boxes_cxcywh[:boxes],
    )


def _columns(data: PlannedData, split: str, index: DatasetIndex) -> SplitColumns:
    counts = count_boxes(index)
    learnt = ~index.is_crowd & (index.boxes_xywh_px[:, 2:] > 0).all(axis=1)
    names = dict(index.categories)
    return SplitColumns(
        name=split,
        sizes_px=np.stack([index.heights, index.widths], axis=1),
        planned_sizes_px=_planned_sizes(data, split),
        boxes_wh_px=index.boxes_xywh_px[learnt, 2:],
        boxes_per_image=counts.per_image,
        class_counts={names[category_id]: count for category_id, count in counts.per_category.items()},
    )


def _planned_sizes(data: PlannedData, split: str) -> np.ndarray:
    """Planned sizes of the first epoch, or of the evaluation, for a limited number of images."""
    if split == "val":
        return np.array([sample.size for batch in data.plan(1, 0).evaluation for sample in batch]).reshape(-1, 2)
    few = min(data.planner.steps_per_epoch, max(1, _MOST_PLANNED // data.config.train.global_batch_size))
    plan = data.plan(1, 0)
    sizes = [sample.size for step in range(few) for batch in plan.step(step) for sample in batch]
    return np.array(sizes).reshape(-1, 2)
