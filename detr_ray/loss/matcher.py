"""Bipartite matching of predictions to boxes (Carion et al. 2020, section 3.1), for all prediction sets at once.

Costs are computed on the device, only between an image's queries and its own boxes, and reach the host in a single
copy. The same copy says whether predictions and targets can be matched at all: whether they are finite, and whether
labels are in range. Knows nothing of the losses that are built on the matching.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_ray.boxes import cxcywh_to_xyxy, generalized_iou
from detr_ray.loss.class_losses import ClassLoss, SoftmaxLoss
from detr_ray.loss.errors import NonFiniteOutputs
from detr_ray.loss.prediction_sets import Matches, PredictionSet
from detr_ray.loss.targets import FlatTargets, flatten_targets
from detr_ray.schedules import Scheduled, value_at
from detr_ray.structures import ModelOutput, Target


class HungarianMatcher:
    """Finds the cheapest one-to-one assignment of queries to boxes.

    The cost of a pair is ``cost_class * class cost + cost_bbox * L1 distance - cost_giou * GIoU``, in float32 under
    autocast too. Where an image has more boxes than queries, only as many as there are queries are matched.

    Args:
        cost_class: weight of the class loss's matching cost.
        cost_bbox: weight of the L1 distance of cxcywh boxes in 0..1.
        cost_giou: weight of the negative generalised IoU.
        class_loss: says what a class costs; None: softmax, over as many classes as the predictions have.
    """

    def __init__(
        self,
        cost_class: float | Scheduled = 1.0,
        cost_bbox: float | Scheduled = 5.0,
        cost_giou: float | Scheduled = 2.0,
        class_loss: ClassLoss | None = None,
    ) -> None:
        self._weights = (cost_class, cost_bbox, cost_giou)
        self._class_loss = class_loss
        self.at_epoch(0.0)

    def at_epoch(self, epoch: float) -> None:
        """Sets ``cost_class``, ``cost_bbox`` and ``cost_giou`` to their values at an epoch."""
        self.cost_class, self.cost_bbox, self.cost_giou = (value_at(weight, epoch) for weight in self._weights)

    @torch.no_grad()
    def __call__(self, outputs: ModelOutput, targets: Sequence[Target]) -> list[tuple[Tensor, Tensor]]:
        """Matches the last decoder layer's predictions.

        Args:
            outputs: the model's; ``aux_outputs`` are ignored.
            targets: one an image.

        Returns:
            For each image int64 query indices, ascending, and the indices of its boxes, on the host.

        Raises:
            NonFiniteOutputs: as for ``match``.
            ValueError: as for ``match``.
        """
        logits, boxes = outputs["pred_logits"].float()[None], outputs["pred_boxes"].float()[None]
        class_loss = self._class_loss or SoftmaxLoss(logits.shape[-1] - 1)
        flat = flatten_targets(targets, logits.device)
        (matches,) = self.match([PredictionSet(("",), logits, boxes, flat)], [class_loss.activate(logits)], class_loss)
        pairs, first_box = [], 0
        for image, count in enumerate(flat.counts):
            here = matches.images == image
            pairs.append((matches.queries[0, here], matches.targets[0, here] - first_box))
            first_box += count
        return pairs

    @torch.no_grad()
    def match(
        self, sets: Sequence[PredictionSet], activations: Sequence[Tensor], class_loss: ClassLoss
    ) -> list[Matches]:
        """Matches every layer of every prediction set separately; given pairs of a set are kept.

        Args:
            sets: predictions and targets of the same B images.
            activations: of each set, as ``class_loss`` gave them.
            class_loss: computes the matching costs of classes.

        Returns:
            The matched pairs of each set, on the host; queries ascending within an image; of each image as many pairs
            as it has boxes, at most ``Q``. Pairs that were given stay as they are.

        Raises:
            NonFiniteOutputs: predictions of an image are not finite, whether it has boxes or not.
            ValueError: the numbers of images differ, a label is outside ``0..num_classes-1``, or a target box is not
                finite.
        """
        for one in sets:
            if one.logits.shape[1] != len(one.targets.counts):
                raise ValueError(
                    f"predictions for {one.logits.shape[1]} images, but targets for {len(one.targets.counts)}"
                )
        parts: list[Tensor] = []
        for one, active in zip(sets, activations, strict=True):
            costs = one.logits.new_zeros(0) if one.pairs is not None else self._costs(one, active, class_loss)
            parts += [costs, *_checks(one, active, class_loss.num_classes)]
        # float32 holds flags as well as costs, so that everything travels together.
        copied = torch.cat([part.flatten().to(torch.float32) for part in parts]).cpu()
        arrived = [
            part.view(shape.shape).numpy()
            for part, shape in zip(copied.split([part.numel() for part in parts]), parts, strict=True)
        ]
        matches = []
        for number, one in enumerate(sets):
            costs, *checks = arrived[4 * number : 4 * number + 4]
            _refuse_unusable(one, costs if one.pairs is None else None, checks, class_loss.num_classes)
            matches.append(_assign(costs, one.targets.counts) if one.pairs is None else one.pairs)
        return matches

    def _costs(self, predictions: PredictionSet, activations: Tensor, class_loss: ClassLoss) -> Tensor:
        """Costs ``[M, L, Q]`` of each box against the queries of its own image."""
        targets = predictions.targets
        # A label out of range is reported when the costs are on the host; until then it must not fail on the GPU.
        labels = targets.labels.clamp(0, class_loss.num_classes - 1)
        classes = class_loss.costs(activations.detach(), targets.images, labels)

        # Coordinates come first, so that each one is a dense [M, L, Q] block for the elementwise operations below.
        boxes_cxcywh = predictions.boxes_cxcywh.detach()
        predicted = torch.cat((boxes_cxcywh, cxcywh_to_xyxy(boxes_cxcywh)), dim=-1)
        predicted = predicted.permute(3, 1, 0, 2).contiguous().index_select(1, targets.images)
        wanted = targets.boxes_cxcywh[:, None, None]
        distance = (predicted[:4] - wanted.movedim(-1, 0)).abs_().sum(0)
        giou = generalized_iou(predicted[4:].movedim(0, -1), cxcywh_to_xyxy(wanted))
        return self.cost_bbox * distance + self.cost_class * classes - self.cost_giou * giou


def _checks(predictions: PredictionSet, activations: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whether logits and boxes are finite, ``[L, B]`` each; and of each target 1 for a bad label, 2 for a bad box."""
    targets = predictions.targets
    bad_label = (targets.labels < 0) | (targets.labels >= num_classes)
    bad_box = ~targets.boxes_cxcywh.sum(1).isfinite()
    # A sum is finite only if all its terms are, and needs no mask of the size of the predictions. (It may overflow for
    # finite values beyond 1e34, which are just as unusable.)
    return (
        activations.detach().sum((2, 3)).isfinite(),
        predictions.boxes_cxcywh.detach().sum((2, 3)).isfinite(),
        bad_label + 2 * bad_box,
    )


def _refuse_unusable(
    predictions: PredictionSet, costs: np.ndarray | None, checks: Sequence[np.ndarray], num_classes: int
) -> None:
    """Raises for predictions and targets that cannot be matched; for faults of the targets first."""
    logits_finite, boxes_finite, target_faults = checks
    counts = predictions.targets.counts
    image_of = np.repeat(np.arange(len(counts)), counts)
    if target_faults.any():
        _refuse_targets(predictions.targets, target_faults.astype(int), image_of, num_classes)
    logits_bad, boxes_bad = logits_finite == 0, boxes_finite == 0
    if costs is not None:
        # Finite boxes whose areas overflow are found only by their costs.
        rows, layers = np.nonzero(~np.isfinite(costs).all(axis=2))
        boxes_bad[layers, image_of[rows]] |= ~logits_bad[layers, image_of[rows]]
    bad = logits_bad | boxes_bad
    if bad.any():
        layers, images = np.nonzero(bad)
        parts = [name for name, where in (("logits", logits_bad), ("boxes", boxes_bad)) if where.any()]
        raise NonFiniteOutputs(np.unique(images).tolist(), np.unique(layers).tolist(), parts)


def _refuse_targets(targets: FlatTargets, faults: np.ndarray, image_of: np.ndarray, num_classes: int) -> None:
    bad_labels = np.flatnonzero(faults & 1)
    if bad_labels.size:
        row = bad_labels[0]
        raise ValueError(
            f"label {int(targets.labels[row])} of image {image_of[row]} of the micro-batch is outside "
            f"0..{num_classes - 1}: the model has {num_classes} classes, so the data's label map and the model's "
            "number of classes disagree"
        )
    images = np.unique(image_of[faults >= 2]).tolist()
    raise ValueError(f"target boxes of image(s) {images} of the micro-batch are not finite")


def _assign(costs: np.ndarray, counts: Sequence[int]) -> Matches:
    """Solves one assignment for each image and layer."""
    _, num_layers, num_queries = costs.shape
    pair_counts = [min(count, num_queries) for count in counts]
    num_pairs = sum(pair_counts)
    queries = np.empty((num_layers, num_pairs), dtype=np.int64)
    targets = np.empty((num_layers, num_pairs), dtype=np.int64)
    box, pair = 0, 0
    for count, pair_count in zip(counts, pair_counts, strict=True):
        here = slice(pair, pair + pair_count)
        for layer in range(num_layers) if count else ():
            queries[layer, here], rows = linear_sum_assignment(costs[box : box + count, layer].T)
            targets[layer, here] = rows + box
        box += count
        pair += pair_count
    images = np.repeat(np.arange(len(counts)), pair_counts)
    return Matches(*(torch.from_numpy(column) for column in (images, queries, targets)))
