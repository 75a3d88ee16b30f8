"""The data of a job with its plan: all that a process needs to make any batch of any worker.

Also checks, before anything starts, whether learned position embeddings cover the largest planned images.

Imports neither the model nor the loss, which data tasks do not need.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from detr_ray.config import Config, ConfigError, ModelConfig
from detr_ray.data.balance import Balance
from detr_ray.data.evaluation_plan import plan_evaluation
from detr_ray.data.index import DatasetIndex
from detr_ray.data.label_map import LabelMap
from detr_ray.data.loader import BatchLoader
from detr_ray.data.planner import Planner
from detr_ray.data.sample import SamplePlan
from detr_ray.engine.stream.augmentation import augmentation_of
from detr_ray.engine.stream.batches import WorkerPlan

# With fewer samples or batches in a window, images of different shapes have to share batches.
MIN_WINDOW = 4096
MIN_WINDOW_BATCHES = 64


@dataclass(frozen=True)
class PlannedData:
    """Opened data sets, their labels, and the configuration that they are planned by.

    Attributes:
        config: the resolved configuration.
        train: the training set; None where nothing is trained.
        val: the validation set; None where nothing is evaluated.
        label_map: labels of both.
    """

    config: Config
    train: DatasetIndex | None
    val: DatasetIndex | None
    label_map: LabelMap

    @property
    def fingerprints(self) -> dict[str, str]:
        """Split -> fingerprint of its data."""
        splits = {"train": self.train, "val": self.val}
        return {split: index.fingerprint for split, index in splits.items() if index is not None}

    @property
    def measured_on(self) -> dict[str, Any]:
        """What scores depend on besides the model, as JSON values: scores are compared by `measured_alike`."""
        if self.val is None:
            return {}
        config = self.config
        return {
            "eval.size": config.eval.size,
            "eval.max_size": config.eval.max_size,
            "eval.max_detections": config.eval.max_detections,
            "train.precision": config.train.precision,
            "data.reduced_decoding": config.data.reduced_decoding,
            "validation data": self.val.fingerprint[:16],
        }

    def is_planned_as(self, other: PlannedData) -> bool:
        """Whether both give the same batches: the same data, planned with the same settings."""
        mine, its = self.config, other.config
        return (
            self.train is other.train
            and self.val is other.val
            and self.label_map == other.label_map
            and (mine.data, mine.train, mine.eval, mine.run.seed) == (its.data, its.train, its.eval, its.run.seed)
        )

    def plan(self, world_size: int, rank: int, micro_batch_size: int | None = None) -> WorkerPlan:
        """One worker's part of the plan. All parts that one process asks for use one planner.

        Args:
            world_size: number of workers.
            rank: the worker.
            micro_batch_size: largest number of images of one forward pass; None: the configured number, or no limit if
                it has not been found yet (``auto``).
        """
        configured = self.config.train.micro_batch_size
        most = micro_batch_size or (None if configured == "auto" else configured)
        return WorkerPlan(
            None if self.train is None else self.planner, lambda: self._evaluation, world_size, rank, most
        )

    @functools.cached_property
    def planner(self) -> Planner:
        """The plan of the training stream."""
        config = self.config
        assert self.train is not None
        return Planner(
            heights=self.train.heights,
            widths=self.train.widths,
            image_ids=self.train.image_ids,
            seed=config.run.seed,
            global_batch_size=config.train.global_batch_size,
            size_policy=augmentation_of(config.data.augment),
            window=config.data.window or max(MIN_WINDOW, MIN_WINDOW_BATCHES * config.train.global_batch_size),
            shard_of=None if self.train.shards is None else self.train.shards.file_of,
            shards_at_a_time=config.data.shard_window,
            repeats=self.repeats,
        )

    @property
    def repeats(self) -> np.ndarray | None:
        """How often an epoch takes each training image on average; None: each once."""
        assert self.train is not None
        data = self.config.data
        weights = tuple(source.weight for source in data.sources)
        return Balance(**data.balance.model_dump(), source_weights=weights).repeats(self.train)

    @functools.cached_property
    def _evaluation(self) -> list[tuple[SamplePlan, ...]]:
        if self.val is None:
            return []
        return plan_evaluation(
            self.val.heights,
            self.val.widths,
            self.val.image_ids,
            size=self.config.eval.size,
            max_size=self.config.eval.max_size,
            batch_size=self.config.eval.batch_size,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("planner", "_evaluation")}

    def loaders(self) -> tuple[BatchLoader | None, BatchLoader | None]:
        """Loaders of training and of validation samples."""
        data, train, val = self.config.data, None, None
        if self.train is not None:
            train = BatchLoader(
                self.train, self.label_map, reduce=data.reduced_decoding, pad_multiple=data.pad_multiple
            )
        if self.val is not None:
            val = BatchLoader(self.val, self.label_map, reduce=data.reduced_decoding)
        return train, val


def refuse_positions_out_of_reach(
    config: Config, model: ModelConfig, train: DatasetIndex | None, val: DatasetIndex | None
) -> None:
    """Refuses images that are too large for learned position embeddings, in training and validation.

    Args:
        config: says how large images become.
        model: the section of the model, which may come from a checkpoint instead of the configuration.
        train: the training set; None where nothing is trained.
        val: the validation set; None where nothing is evaluated.

    Raises:
        ConfigError: an image may become too large; names the keys.
    """
    if model.position_embedding != "learned":
        return
    from detr_ray.model.position_encoding import LEARNED_LIMIT  # takes a second, and few runs need it

    stride = model.backbone_stride // (2 if model.dilation else 1)
    reach = (
        f"model.position_embedding=learned has vectors for {LEARNED_LIMIT} rows and columns of {stride} pixels each, "
        f"images of {LEARNED_LIMIT * stride} pixels"
    )
    otherwise = "or set model.position_embedding=sine" + ("" if model.backbone_stride == 32 else ", or a larger stride")
    errors = []
    if train is not None:
        sizes = np.stack([train.heights, train.widths], axis=1)
        longest = augmentation_of(config.data.augment).largest_side(sizes)
        multiple = config.data.pad_multiple
        longest = -(-longest // multiple) * multiple
        if -(-longest // stride) > LEARNED_LIMIT:
            errors.append(
                f"data.augment: {reach}; training images become up to {longest} pixels long: lower "
                f"data.augment.max_size (and scales), or the size of scale_jitter, to "
                f"{LEARNED_LIMIT * stride // multiple * multiple} or less, "
                f"{otherwise}"
            )
    if val is not None:
        plan = plan_evaluation(
            val.heights, val.widths, val.image_ids, size=config.eval.size, max_size=config.eval.max_size, batch_size=1
        )
        longest = max(max(sample.size) for batch in plan for sample in batch)
        if -(-longest // stride) > LEARNED_LIMIT:
            errors.append(
                f"eval.size: {reach}; validation images become up to {longest} pixels long (eval.size="
                f"{config.eval.size}, eval.max_size={config.eval.max_size}): lower eval.max_size, or eval.size, to "
                f"{LEARNED_LIMIT * stride} or less, {otherwise}"
            )
    if errors:
        raise ConfigError(errors)
