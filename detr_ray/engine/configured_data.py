"""Opens the data that a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from detr_ray.callbacks import Progress
from detr_ray.config import DataConfig
from detr_ray.config.data_sections import SourceConfig
from detr_ray.data.formats import Reading, open_split, open_undivided
from detr_ray.data.holdout import Holdout
from detr_ray.data.index import DatasetIndex
from detr_ray.data.merging import merge


class ConfiguredData:
    """The data that a configuration names.

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
