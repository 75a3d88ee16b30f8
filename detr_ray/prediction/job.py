"""A prediction over many images: its batches, its parts, and the settings that a folder of results must match.

The batches are those of an evaluation of the same images: one size in each batch, the largest images first. Several
consecutive batches are a *part*, whose results are one file. An interrupted job continues with the parts whose files
are missing. Every image is in exactly one part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from detr_ray.data.evaluation_plan import plan_evaluation
from detr_ray.data.index import DatasetIndex
from detr_ray.data.label_map import LabelMap
from detr_ray.data.loader import BatchLoader
from detr_ray.data.sample import SamplePlan
from detr_ray.detector.artifact import SavedModel
from detr_ray.detector.package import ModelFacts
from detr_ray.evaluation import DetectionTable
from detr_ray.prediction.loaded_model import LoadedModel
from detr_ray.prediction.thresholds import Threshold, label_thresholds
from detr_ray.structures import PaddedBatch


@dataclass(frozen=True)
class PredictionJob:
    """A prediction that can be computed in any process.

    Attributes:
        index: the images.
        saved: the model; its configuration has sizes, batches and precision.
        facts: facts about the model.
        threshold: lowest score that is kept, see `LoadedModel.predict`.
        top_k: most objects an image.
        part_images: least number of images of a part, except for the last one.
        unreadable: a line for each image that was left out because its size could not be read.
    """

    index: DatasetIndex
    saved: SavedModel
    facts: ModelFacts
    threshold: Threshold
    top_k: int
    part_images: int
    unreadable: tuple[str, ...] = ()

    @cached_property
    def batches(self) -> list[tuple[SamplePlan, ...]]:
        """All batches."""
        assert self.saved.config is not None
        if not len(self.index):
            return []
        evaluation = self.saved.config.eval
        return plan_evaluation(
            self.index.heights,
            self.index.widths,
            self.index.image_ids,
            size=evaluation.size,
            max_size=evaluation.max_size,
            batch_size=evaluation.batch_size,
        )

    @cached_property
    def parts(self) -> list[range]:
        """Numbers of the batches of each part."""
        bounds, images = [0], 0
        for number, batch in enumerate(self.batches, 1):
            images += len(batch)
            if images >= self.part_images:
                bounds.append(number)
                images = 0
        if bounds[-1] < len(self.batches):
            bounds.append(len(self.batches))
        return [range(first, last) for first, last in pairwise(bounds)]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("batches", "parts")}

    def without_weights(self) -> PredictionJob:
        """The same job for those that make its batches: they need the images, and none of the weights."""
        return dataclasses.replace(self, saved=dataclasses.replace(self.saved, checkpoint={}))

    def loader(self) -> BatchLoader:
        """The loader of the batches."""
        assert self.saved.config is not None
        no_labels = LabelMap(("none",), (0,))  # the images have no annotations, so no labels
        return BatchLoader(self.index, no_labels, reduce=self.saved.config.data.reduced_decoding)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the results depend on, as JSON values; a folder of results is continued only if they are equal."""
        config = self.saved.config
        assert config is not None
        return {
            "images": self.index.fingerprint[:16],
            "images_root": self.index.images_root,
            "model": _digest(self.saved)[:16],
            "eval.size": config.eval.size,
            "eval.max_size": config.eval.max_size,
            "eval.batch_size": config.eval.batch_size,
            "train.precision": config.train.precision,
            "data.reduced_decoding": config.data.reduced_decoding,
            "--threshold": self.threshold,
            "thresholds": self._digest_of_thresholds(),
            "--top-k": self.top_k,
            "--part-images": self.part_images,
        }

    def _digest_of_thresholds(self) -> str | None:
        """A hash of the lowest score of each label. With ``best_f1``, these come from a file that may have changed."""
        assert self.saved.label_map is not None
        lowest = label_thresholds(self.threshold, self.saved.label_map, self.facts.scores, self.saved.source)
        return None if lowest is None else hashlib.sha256(lowest.tobytes()).hexdigest()[:16]


def _digest(saved: SavedModel) -> str:
    """A hash of the weights and the labels."""
    assert saved.label_map is not None
    digest = hashlib.sha256(json.dumps(saved.label_map.to_dict()).encode())
    for name, value in sorted(saved.checkpoint["model"].items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class BatchFindings:
    """The detections on the images of a batch.

    Attributes:
        detections: the objects.
        bad_images: a line for each image that could not be read, by id.
    """

    detections: DetectionTable
    bad_images: Mapping[int, str] = field(default_factory=dict)


class BatchPredictor:
    """Finds objects on batches of a job.

    Args:
        job: the job.
        device: device to use; None for the GPU, if there is one.
        model: the job's model, if it is loaded already.
    """

    def __init__(self, job: PredictionJob, device: str | None, model: LoadedModel | None = None) -> None:
        assert job.saved.config is not None
        self._model = LoadedModel(job.saved, job.facts) if model is None else model.with_config(job.saved.config)
        self._device = self._model.to(device)
        self._thresholds = label_thresholds(job.threshold, self._model.label_map, job.facts.scores, job.saved.source)
        self._top_k = job.top_k

    def __call__(self, batch: PaddedBatch) -> BatchFindings:
        """Detects objects on a batch; images that could not be read have none.

        Raises:
            WeightsError: predictions of the model are not finite.
        """
        bad = dict(zip(batch.bad_image_ids.tolist(), batch.bad_images, strict=True))
        found = []
        for image_id, size, detections in zip(
            batch.image_ids.tolist(),
            batch.orig_sizes.tolist(),
            self._model.detect(batch, self._top_k, self._device),
            strict=True,
        ):
            if image_id in bad:
                continue
            one = self._model.prediction(
                detections, f"image {image_id}", (size[0], size[1]), self._thresholds, self._top_k
            )
            ids = np.full(len(one), image_id, np.int64)
            found.append(DetectionTable(ids, one.category_ids, one.boxes_xywh_px, one.scores))
        return BatchFindings(DetectionTable.concat(found), bad)
