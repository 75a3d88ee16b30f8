"""Opens the data sets of a configuration: generates, reads and checks them, before a run or an evaluation is prepared.

Bad data is refused here, on the driver and in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from detr_ray.addresses import local_path
from detr_ray.callbacks import Progress, Say
from detr_ray.config import ConfigError, DataConfig
from detr_ray.config.data_sections import SourceConfig
from detr_ray.data.errors import DataError
from detr_ray.data.formats import Reading, open_split, open_undivided
from detr_ray.data.generated import DrawingParameters, generate_dataset
from detr_ray.data.holdout import Holdout
from detr_ray.data.index import PROBLEMS, DatasetIndex
from detr_ray.data.inspection import common_cause, inspect_images, is_other_folder
from detr_ray.data.merging import merge
from detr_ray.data.statistics import count_boxes, find_misreadings
from detr_ray.engine.reporting.progress import Pace

_IMAGES_LOOKED_AT = 32

OpenedData = tuple[DatasetIndex, DatasetIndex | None]
"""The training and the validation set, opened."""


def open_data(data: DataConfig, say: Say) -> OpenedData:
    """Opens the training and the validation set, generating them first where the configuration says so.

    Raises:
        ConfigError: no data is configured.
        DataError: it cannot be read, or is not what it should be.
    """
    generate_data(data, say)
    configured = ConfiguredData(data)
    train = _open_split(data, configured, "train", say)
    val = _open_split(data, configured, "val", say) if data.has_val else None
    return train, val


def open_training_data(data: DataConfig, say: Say) -> DatasetIndex:
    """Opens the training set alone.

    Raises:
        ConfigError: none is configured.
        DataError: it cannot be read, or is not what it should be.
    """
    if not data.has_train:
        raise ConfigError("data.train: no training data is given; set data.root=FOLDER, or data.train.annotations=FILE")
    generate_data(data, say)
    return _open_split(data, ConfiguredData(data), "train", say)


def open_evaluation_data(data: DataConfig, say: Say) -> DatasetIndex:
    """Opens the validation set alone.

    Raises:
        ConfigError: none is configured.
        DataError: it cannot be read, or is not what it should be.
    """
    if not data.has_val:
        raise ConfigError(
            "data.val: no validation data is given; set data.root=FOLDER, or data.val.annotations=FILE and "
            "data.val.images=FOLDER"
        )
    generate_data(data, say)
    return _open_split(data, ConfiguredData(data), "val", say)


def generate_data(data: DataConfig, say: Say) -> None:
    """Writes the generated data set that a configuration asks for, if it is not there yet."""
    if data.generate is None:
        return
    root = generated_root(data)
    if not root.exists():
        say(f"drawing {data.generate.num_train} + {data.generate.num_val} images into {root}")
    try:
        draw(data)
    except OSError as error:
        raise DataError(f"data.root: the data set cannot be written into {root}: {error}") from error


def draw(data: DataConfig, progress: Progress | None = None) -> None:
    """Draws the generated data set that a configuration asks for; if it is there, checks that it is the same.

    Args:
        data: with ``generate``.
        progress: called with the number of images drawn, and of all.

    Raises:
        DataError: its folder holds something else.
        OSError: it cannot be written.
    """
    assert data.generate is not None
    generate_dataset(generated_root(data), DrawingParameters(**data.generate.model_dump()), progress)


def generated_root(data: DataConfig) -> Path:
    """The folder of a generated data set."""
    root = None if data.root is None else local_path(data.root)
    assert root is not None, "validated with the configuration"
    return root


class ConfiguredData:
    """The data that a configuration names, without what is checked before a run.

    Args:
        data: the configuration.
    """

    def __init__(self, data: DataConfig) -> None:
        self._data = data
        self._undivided: DatasetIndex | None = None

    def open(self, split: str, pace: Callable[[str], Progress] | None = None) -> DatasetIndex:
        """Opens a split with all its images; reads only the annotations.

        With ``data.split`` both splits are parts of the same images, which are read once.

        Args:
            split: ``train`` or ``val``.
            pace: for what is done to images, where that is more than to read one file (``read the sizes of``), what is
                told of those that are done, and of all.

        Raises:
            DataError: it cannot be read, or is not what it should be; or too many training images have no size.
        """
        data = self._data
        of_train = split == "train" or data.split is not None
        reading = Reading(data.on_bad_image == "skip", data.max_bad_images if of_train else None, pace)
        if data.is_of_sources(split):
            if self._undivided is None:
                self._undivided = merge(self._open_sources(reading))
            if data.split is None:
                return self._undivided
            return Holdout(**data.split.model_dump()).part(self._undivided, split)
        places = data.places(split)
        if data.split is None:
            return open_split(data.root, places, split, data.follow_links, data_format=data.format, reading=reading)
        if self._undivided is None:
            self._undivided = open_undivided(
                data.root, places, data.follow_links, data_format=data.format, reading=reading
            )
        return Holdout(**data.split.model_dump()).part(self._undivided, split)

    def _open_sources(self, reading: Reading) -> list[DatasetIndex]:
        """Opens all of several data sets. The limit of images without a size holds for all of them together."""
        opened: list[DatasetIndex] = []
        for source in self._data.sources:
            skipped = sum(index.images_left_out for index in opened)
            most = None if reading.most_skipped is None else max(0, reading.most_skipped - skipped)
            opened.append(self._open_source(source, replace(reading, most_skipped=most)))
        return opened

    def _open_source(self, source: SourceConfig, reading: Reading) -> DatasetIndex:
        """One of several data sets: its training images, or all images if some are to be held out."""
        data, places = self._data, source if source.root is None else None
        if data.split is not None:
            return open_undivided(source.root, places, data.follow_links, data_format=source.format, reading=reading)
        return open_split(source.root, places, "train", data.follow_links, data_format=source.format, reading=reading)


def _open_split(data: DataConfig, configured: ConfiguredData, split: str, say: Say) -> DatasetIndex:
    index = configured.open(split, lambda what: Pace(f"{split}: {what}", say))
    if data.max_images is not None:
        index = index.first(data.max_images)
    problems = ", ".join(f"{count} {PROBLEMS[kind]}" for kind, count in index.problems.items() if count)
    say(f"{split}: {len(index)} images, {len(index.category_ids)} annotations" + (f" ({problems})" if problems else ""))
    if split == "train" and not count_boxes(index).per_image.any():
        raise DataError(
            f"{index.source}: there is not one box to learn from: none that lies inside of its image and is no crowd"
        )
    for misreading in find_misreadings(index):
        if misreading.ruins:
            raise DataError(f"{index.source}: {misreading.message}. {misreading.advice}")
    _look_at_images(index, split, data, say)
    return index


def _look_at_images(index: DatasetIndex, split: str, data: DataConfig, say: Say) -> None:
    """Finds faults that all or many images have, before workers are started.

    A few images from all over the set are looked at: in a sorted set, the first ones may differ from the others.

    Raises:
        DataError: none of them can be used; the storage fails; or, if bad images are not skipped, one of the validation
            set cannot be used: the run would end after its first epoch.
    """
    rows = np.unique(np.linspace(0, len(index) - 1, min(len(index), _IMAGES_LOOKED_AT)).astype(np.int64))
    bad = inspect_images(index, only=rows.tolist()).bad
    failed = next((image for image in bad if image.storage_failed), None)
    if failed is not None:
        raise DataError(f"{failed.file}: {failed.reason}") from OSError(failed.reason)
    if not bad:
        return
    cause = common_cause(bad, len(rows))
    if not cause and is_other_folder(bad, len(rows)):
        cause = f"Is the folder right ({data.place_of(split)})?"
    message = (
        f"{bad[0].file}: {bad[0].reason} ({split}: {len(bad)} of {len(rows)} images that were looked at cannot be "
        f"used). {cause or 'The check command names all of them'}"
    )
    skip = data.on_bad_image == "skip"
    if len(bad) == len(rows) or (split == "val" and not skip):
        raise DataError(message)
    if not skip:
        say(f"WARNING: {message}; the run ends at the first of them, unless data.on_bad_image=skip")
