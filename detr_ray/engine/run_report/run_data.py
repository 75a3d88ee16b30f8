"""The data of a past run, where it is still at hand: for the pictures of images in its report."""

from __future__ import annotations

from collections.abc import Callable

from detr_ray.callbacks import Say
from detr_ray.config import ConfigError, DataConfig
from detr_ray.data.errors import DataError
from detr_ray.data.index import DatasetIndex
from detr_ray.engine.job import choose_label_space, label_map_for
from detr_ray.engine.opened_data import generated_root, open_evaluation_data, open_training_data
from detr_ray.engine.past_run import PastRun
from detr_ray.engine.stream.planned_data import PlannedData

_PLACES = ("root", "format", "train", "val", "sources", "generate")
_PARTS = ("max_images", "split")
_NAMES = {"train": "the first batch", "val": "the validation images"}


class RunData:
    """Opens the data that a run was trained and validated on.

    Args:
        run: the run.
        given: where the data lies now; what names none counts as not given.
        warn: told why data is not at hand.
    """

    def __init__(self, run: PastRun, given: DataConfig, warn: Say) -> None:
        self._run, self._warn = run, warn
        data = run.config.data
        if {"root", "train", "val", "sources"} & given.model_fields_set:
            now = (*_PLACES, *(name for name in _PARTS if name in given.model_fields_set))
            data = data.model_copy(update={name: getattr(given, name) for name in now})
        self._config = run.config.model_copy(update={"data": data})

    def validation_set(self) -> DatasetIndex | None:
        """The images that the run was validated on; None if they are not at hand, or it was not validated."""
        if "val" not in self._run.record["fingerprints"]:
            return None
        return self._opened("val", open_evaluation_data)

    def training_data(self) -> PlannedData | None:
        """The training set with its plan; None if it is not at hand."""
        train = self._opened("train", open_training_data)
        if train is None:
            return None
        space = choose_label_space(self._config, train, lambda: False, self._run.record)
        return PlannedData(self._config, train, None, label_map_for(space, train, None))

    def _opened(self, split: str, opened: Callable[[DataConfig, Say], DatasetIndex]) -> DatasetIndex | None:
        """A split, if it is what the run had; a data set that would have to be drawn first is not at hand."""
        data = self._config.data
        try:
            if data.generate is not None and not generated_root(data).exists():
                raise DataError(f"the generated images are not in {generated_root(data)} any more")
            index = opened(data, lambda line: None)
            if index.fingerprint != self._run.record["fingerprints"].get(split):
                raise DataError(f"{index.source} is not what the run had")
        except (DataError, ConfigError) as error:
            self._warn(f"the report is without {_NAMES[split]}: {error}")
            return None
        return index
