"""Runs a model over a worker's share of the validation set, and scores the detections of all workers once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from detr_ray.data.label_map import LabelMap
from detr_ray.detector.inference import detect
from detr_ray.engine.context import WorkerContext
from detr_ray.engine.errors import RunFailed
from detr_ray.evaluation import CocoMetrics, DetectionTable, GroundTruth, ScorerProcess, evaluate_detections
from detr_ray.loss import ClassLoss
from detr_ray.model import DetectionModel
from detr_ray.structures import PaddedBatch

if TYPE_CHECKING:
    from detr_ray.data.index import DatasetIndex
    from detr_ray.engine.stream.planned_data import PlannedData


class Evaluator:
    """Evaluates models on one validation set.

    Args:
        index: the validation set.
        label_map: turns labels into the category ids of the annotation file.
        context: this worker's group.
        class_loss: of the models; says what their logits mean.
        precision: ``fp32``, ``bf16`` or ``fp16`` autocast.
        channels_last: lay images out with the channels last.
        max_detections: detections kept an image, the best first.
        skip_bad_images: images that cannot be read count as without detections, instead of failing the run.

    Attributes:
        bad_images: a line for each image that could not be read in the last evaluation, by id; the same on all workers.
    """

    def __init__(
        self,
        index: DatasetIndex,
        label_map: LabelMap,
        context: WorkerContext,
        class_loss: ClassLoss,
        *,
        precision: str = "fp32",
        channels_last: bool = False,
        max_detections: int = 100,
        skip_bad_images: bool = False,
    ) -> None:
        self._index = index
        self._category_ids = label_map.category_ids_of(np.arange(label_map.num_classes))
        self._context = context
        self._class_loss = class_loss
        self._precision = precision
        self._channels_last = channels_last
        self._max_detections = max_detections
        self._skip_bad_images = skip_bad_images
        self.bad_images: dict[int, str] = {}

    @torch.inference_mode()
    def detect(
        self, model: DetectionModel, batches: Iterator[PaddedBatch], step: int | None = None
    ) -> tuple[DetectionTable, list[int], dict[int, str]]:
        """Detections on this worker's batches.

        Args:
            model: the model.
            batches: this worker's share.
            step: optimizer steps that the model has taken, for the supervision of hanging workers. None for an
                evaluation that is no part of a training: its steps are the batches of all workers.

        Returns:
            The detections; the ids of all images seen; a line for each image that could not be read, by id.
        """
        was_training = model.training
        model.eval()
        device = self._context.device
        found: list[DetectionTable] = []
        image_ids: list[int] = []
        bad_images: dict[int, str] = {}
        done = 0
        self._context.enter("detecting on validation images", step or 0)
        for padded in batches:
            detections = detect(
                model,
                padded,
                device,
                self._class_loss,
                precision=self._precision,
                channels_last=self._channels_last,
                max_detections=self._max_detections,
            )
            ids = padded.image_ids.tolist()
            found.append(
                DetectionTable.from_detections(ids, detections, self._category_ids, max_per_image=self._max_detections)
            )
            image_ids += ids
            bad_images |= zip(padded.bad_image_ids.tolist(), padded.bad_images, strict=True)
            done += self._context.world_size
            # Each batch is progress.
            self._context.enter("detecting on validation images", done if step is None else step)
        model.train(was_training)
        self._context.enter("waiting for the scores", done if step is None else step)
        return DetectionTable.concat(found), image_ids, bad_images

    def find(
        self, model: DetectionModel, batches: Iterator[PaddedBatch], step: int | None = None
    ) -> DetectionTable | None:
        """Detections over the shares of all workers; every worker must call it. See `detect`.

        An image that cannot be read counts as an image without detections. Its annotated boxes stay, so scores do not
        become better by it, and stay comparable with those of the whole set.

        Returns:
            All detections on rank 0; None elsewhere.

        Raises:
            RunFailed: images could not be read and are not to be left out, or were not seen exactly once.
        """
        shares = self._context.gather_to_first(self.detect(model, batches, step))
        # Rank 0 decides for all workers. The detections are large and stay on rank 0.
        self.bad_images, problem = self._context.broadcast(self._look_at(shares))
        if problem:
            raise RunFailed(problem, agreed=True)
        if shares is None:
            return None
        found = DetectionTable.concat([table for table, _, _ in shares])
        return found if not self.bad_images else found.select(~np.isin(found.image_ids, list(self.bad_images)))

    def _look_at(
        self, shares: list[tuple[DetectionTable, list[int], dict[int, str]]] | None
    ) -> tuple[dict[int, str], str]:
        """Rank 0: the images that could not be read, and why the evaluation cannot be used (else empty)."""
        if shares is None:
            return {}, ""
        bad_images = {image_id: line for _, _, lines in shares for image_id, line in lines.items()}
        seen = np.sort(np.concatenate([np.asarray(image_ids, dtype=np.int64) for _, image_ids, _ in shares]))
        problem = ""
        if bad_images and not self._skip_bad_images:
            more = f" (and {len(bad_images) - 1} more)" if len(bad_images) > 1 else ""
            problem = (
                f"a validation image cannot be read: {next(iter(bad_images.values()))}{more}; mend it or take it out "
                "of the annotation file (`python -m detr_ray.check ... --decode` finds all), or set "
                "data.on_bad_image=skip"
            )
        elif not np.array_equal(seen, np.sort(self._index.image_ids)):
            different = len(np.unique(seen))
            problem = f"evaluation: {len(seen)} images were seen ({different} different) of {len(self._index)}"
        return bad_images, problem

    def score(self, detections: DetectionTable) -> CocoMetrics:
        """The COCO numbers of detections on the whole validation set."""
        return evaluate_detections(GroundTruth.from_columns(self._index), detections)

    def start_scoring(self, detections: DetectionTable) -> ScorerProcess:
        """Starts a process that computes the same numbers."""
        return ScorerProcess(GroundTruth.from_columns(self._index), detections)


def build_evaluator(data: PlannedData, context: WorkerContext, class_loss: ClassLoss) -> Evaluator:
    """The evaluator of a job's validation set, for models with this class loss."""
    assert data.val is not None, "there is a validation set"
    config = data.config
    return Evaluator(
        data.val,
        data.label_map,
        context,
        class_loss,
        precision=config.train.precision,
        channels_last=config.train.channels_last,
        max_detections=config.eval.max_detections,
        skip_bad_images=config.data.on_bad_image == "skip",
    )
