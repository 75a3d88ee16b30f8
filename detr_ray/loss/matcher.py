"""Bipartite matching of predictions to boxes (Carion et al. 2020, section 3.1), for all decoder layers at once.

Costs are computed on the device, only between an image's queries and its own boxes, and reach the host in a single
copy. The same copy carries what has to be checked before an assignment makes sense: finiteness of every image's
predictions and the labels. Knows nothing of the losses that are built on the matching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_ray.boxes import cxcywh_to_xyxy, generalized_iou
from detr_ray.loss.errors import NonFiniteOutputs
from detr_ray.loss.targets import FlatTargets, flatten_targets
from detr_ray.loss.weighting import Weight, weight_at
from detr_ray.structures import ModelOutput, Target


@dataclass(frozen=True, slots=True)
class Matches:
    """Matched pairs of ``L`` decoder layers, on the host.

    Every layer has the same number of pairs, ``P``: of each image as many as it has boxes, at most ``Q``.

    Attributes:
        images: ``[P]`` int64, the image of each pair as its place in the micro-batch; ascending.
        queries: ``[L, P]`` int64, ascending within an image.
        targets: ``[L, P]`` int64, rows of the flat targets.
    """

    images: np.ndarray
    queries: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True, slots=True)
class _HostCopy:
    """What comes back from the device: see ``HungarianMatcher._copy_to_host`` for the order on the way."""

    costs: np.ndarray  # [M, L, Q] float32
    logits_finite: np.ndarray  # [L, B] bool
    boxes_finite: np.ndarray  # [L, B] bool
    targets_finite: np.ndarray  # [M] bool
    labels: np.ndarray  # [M] int64


class HungarianMatcher:
    """Finds the cheapest one-to-one assignment of queries to boxes.

    The cost of a pair is ``class * -probability of the box's label + bbox * L1 distance + giou * -GIoU``, in float32
    under autocast too. Where an image has more boxes than queries, only as many as there are queries are matched.

    Args:
        cost_class: weight of the negative probability.
        cost_bbox: weight of the L1 distance of cxcywh boxes in 0..1.
        cost_giou: weight of the negative generalised IoU.
    """

    def __init__(self, cost_class: Weight = 1.0, cost_bbox: Weight = 5.0, cost_giou: Weight = 2.0) -> None:
        self._weights = {"class": cost_class, "bbox": cost_bbox, "giou": cost_giou}
        self.at_epoch(0.0)

    def at_epoch(self, epoch: float) -> None:
        """Sets ``cost_class``, ``cost_bbox`` and ``cost_giou`` to their values at an epoch."""
        self.cost_class = weight_at(self._weights["class"], epoch)
        self.cost_bbox = weight_at(self._weights["bbox"], epoch)
        self.cost_giou = weight_at(self._weights["giou"], epoch)

    @torch.no_grad()
    def __call__(self, outputs: ModelOutput, targets: Sequence[Target]) -> list[tuple[Tensor, Tensor]]:
        """Matches the last decoder layer's predictions.

        Args:
            outputs: the model's; ``aux_outputs`` are not looked at.
            targets: one an image.

        Returns:
            For each image int64 query indices, ascending, and the indices of its boxes, on the host.

        Raises:
            NonFiniteOutputs: as for ``match``.
            ValueError: as for ``match``.
        """
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        flat = flatten_targets(targets, logits.device)
        matches = self.match(logits.float().log_softmax(-1)[None], boxes.float()[None], flat)
        pairs, first_box = [], 0
        for image, count in enumerate(flat.counts):
            here = matches.images == image
            queries, rows = matches.queries[0, here], matches.targets[0, here]
            pairs.append((torch.from_numpy(queries), torch.from_numpy(rows - first_box)))
            first_box += count
        return pairs

    def match(self, log_probs: Tensor, boxes_cxcywh: Tensor, targets: FlatTargets) -> Matches:
        """Matches every layer by itself.

        Args:
            log_probs: ``[L, B, Q, C+1]`` float32 log-softmax of the logits.
            boxes_cxcywh: ``[L, B, Q, 4]`` float32 in 0..1.
            targets: the boxes of the same B images.

        Returns:
            The matched pairs of all layers.

        Raises:
            NonFiniteOutputs: predictions of an image are not finite, whether it has boxes or not.
            ValueError: the numbers of images differ, a label is outside ``0..C-1``, or a target box is not finite.
        """
        if log_probs.shape[1] != len(targets.counts):
            raise ValueError(f"predictions for {log_probs.shape[1]} images, but targets for {len(targets.counts)}")
        log_probs, boxes_cxcywh = log_probs.detach(), boxes_cxcywh.detach()
        costs = self._costs(log_probs, boxes_cxcywh, targets)
        host = self._copy_to_host(costs, log_probs, boxes_cxcywh, targets)
        _check(host, targets.counts, num_classes=log_probs.shape[-1] - 1)
        return _assign(host.costs, targets.counts)

    def _costs(self, log_probs: Tensor, boxes_cxcywh: Tensor, targets: FlatTargets) -> Tensor:
        """Costs ``[M, L, Q]`` of each box against the queries of its own image."""
        # A label out of range is reported from the host copy; until then it must not become a fault of the device.
        labels = targets.labels.clamp(0, log_probs.shape[-1] - 2)
        probabilities = log_probs.permute(1, 3, 0, 2)[targets.images, labels].exp_()

        # Coordinates lead, so that each one is a dense [M, L, Q] block for the elementwise work below.
        predicted = torch.cat((boxes_cxcywh, cxcywh_to_xyxy(boxes_cxcywh)), dim=-1)
        predicted = predicted.permute(3, 1, 0, 2).contiguous().index_select(1, targets.images)
        wanted = targets.boxes_cxcywh[:, None, None]
        distance = (predicted[:4] - wanted.movedim(-1, 0)).abs_().sum(0)
        giou = generalized_iou(predicted[4:].movedim(0, -1), cxcywh_to_xyxy(wanted))
        return self.cost_bbox * distance - self.cost_class * probabilities - self.cost_giou * giou

    def _copy_to_host(self, costs: Tensor, log_probs: Tensor, boxes: Tensor, targets: FlatTargets) -> _HostCopy:
        """Copies costs, finiteness and labels to the host as one block of 32-bit words."""
        num_targets = targets.labels.shape[0]
        num_layers, num_images = log_probs.shape[:2]
        # A sum is finite only if all its terms are, and needs no mask of the size of the predictions. (It may overflow
        # for finite values beyond 1e34, which are no less broken.)
        flags = torch.cat(
            (
                log_probs.sum((2, 3)).isfinite().flatten(),
                boxes.sum((2, 3)).isfinite().flatten(),
                targets.boxes_cxcywh.sum(1).isfinite(),
            )
        )
        block = torch.cat((costs.flatten().view(torch.int32), flags.int(), targets.labels.view(torch.int32)))
        words = block.cpu().numpy()

        per_layer = num_layers * num_images
        sizes = (costs.numel(), per_layer, per_layer, num_targets)
        cost_words, logits_flags, boxes_flags, target_flags, label_words = np.split(words, np.cumsum(sizes))
        return _HostCopy(
            costs=cost_words.view(np.float32).reshape(costs.shape),
            logits_finite=logits_flags.reshape(num_layers, num_images).astype(bool),
            boxes_finite=boxes_flags.reshape(num_layers, num_images).astype(bool),
            targets_finite=target_flags.astype(bool),
            labels=np.ascontiguousarray(label_words).view(np.int64),
        )


def _check(host: _HostCopy, counts: Sequence[int], num_classes: int) -> None:
    """Raises for whatever makes an assignment meaningless; the targets' faults first, as they are the data's."""
    image_of = np.repeat(np.arange(len(counts)), counts)
    bad_labels = np.flatnonzero((host.labels < 0) | (host.labels >= num_classes))
    if bad_labels.size:
        row = bad_labels[0]
        raise ValueError(
            f"label {host.labels[row]} of image {image_of[row]} of the micro-batch is outside 0..{num_classes - 1}: "
            f"the model has {num_classes} classes, so the data's label map and the model's number of classes disagree"
        )
    bad_targets = np.flatnonzero(~host.targets_finite)
    if bad_targets.size:
        images = np.unique(image_of[bad_targets]).tolist()
        raise ValueError(f"target boxes of image(s) {images} of the micro-batch are not finite")

    logits_bad, boxes_bad = ~host.logits_finite, ~host.boxes_finite
    # Boxes that are finite but so large that their areas overflow show up in the costs only.
    rows, layers = np.nonzero(~np.isfinite(host.costs).all(axis=2))
    boxes_bad[layers, image_of[rows]] |= host.logits_finite[layers, image_of[rows]]
    bad = logits_bad | boxes_bad
    if bad.any():
        layers, images = np.nonzero(bad)
        parts = [name for name, where in (("logits", logits_bad), ("boxes", boxes_bad)) if where.any()]
        raise NonFiniteOutputs(np.unique(images).tolist(), np.unique(layers).tolist(), parts)


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
    return Matches(images=np.repeat(np.arange(len(counts)), pair_counts), queries=queries, targets=targets)
