"""The class loss: matching cost of a query and a label, training target of the logits, and scores from logits.

All of it is in one object, so that matching, training and evaluation read logits in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_ray.schedules import Scheduled, value_at


class Scores(NamedTuple):
    """The detections of the class logits of ``B`` images, ``K`` for each image.

    Attributes:
        scores: ``[B, K]`` in 0..1.
        labels: ``[B, K]`` int64, never no-object.
        queries: ``[B, K]`` int64, the query of each detection.
    """

    scores: Tensor
    labels: Tensor
    queries: Tensor


class ClassLoss(Protocol):
    """What the criterion, the matcher and the post-processing need of a class loss.

    ``L`` layers, ``B`` images, ``Q`` queries, ``M`` boxes of the micro-batch, ``P`` matched pairs a layer.
    ``activations`` are the result of ``activate``, which is called once for costs and loss.

    Attributes:
        num_logits: logits of one query.
        num_classes: classes without no-object.
        needs_iou: whether ``loss`` uses the IoU of the matched boxes.
    """

    num_logits: int
    num_classes: int
    needs_iou: bool

    def at_epoch(self, epoch: float) -> None:
        """Sets weights that change over the run to their values at an epoch."""
        ...

    def activate(self, logits: Tensor) -> Tensor:
        """``[L, B, Q, num_logits]`` float32 logits as the costs and the loss use them, of the same shape."""
        ...

    def costs(self, activations: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Matching costs ``[M, L, Q]`` of boxes with these labels, against the queries of their images."""
        ...

    def loss(self, activations: Tensor, rows: Tensor, labels: Tensor, ious: Tensor | None = None) -> Tensor:
        """Sum of the loss over images and queries, ``[L]``, not normalised.

        Args:
            activations: ``[L, B, Q, num_logits]``.
            rows: ``[L * P]`` the matched queries, as rows of the flattened ``[L * B * Q]`` predictions.
            labels: ``[L * P]`` their labels.
            ious: ``[L * P]`` IoU of their boxes with those that they are matched with, without gradient; None where
                ``needs_iou`` is false.
        """
        ...

    def normaliser(self, counts: Sequence[int], num_queries: int | None = None) -> float:
        """What images with these numbers of boxes add to the divisor of the summed loss.

        Args:
            counts: boxes of each image.
            num_queries: of the model, where the caller knows it.
        """
        ...

    def finds_object(self, logits: Tensor) -> Tensor:
        """Whether queries find an object, ``[..., Q]`` bool, from ``[..., Q, num_logits]``."""
        ...

    def predicted(self, logits: Tensor) -> Tensor:
        """The class with the highest logit, ``[...]`` int64; no-object counts as class ``num_classes``."""
        ...

    def scores(self, logits: Tensor, limit: int) -> Scores:
        """The detections in ``[B, Q, num_logits]`` float32 logits.

        Args:
            logits: of all queries.
            limit: largest number of detections an image, where a query may stand for several; otherwise all are given.
        """
        ...


class SoftmaxLoss:
    """Cross-entropy over the classes and no-object (Carion et al. 2020, section 3.1).

    Args:
        num_classes: classes without no-object.
        eos_coef: weight of no-object among the classes; all others have 1.
    """

    needs_iou = False

    def __init__(self, num_classes: int, eos_coef: float | Scheduled = 0.1) -> None:
        self.num_classes = num_classes
        self.num_logits = num_classes + 1
        self._eos_coef = eos_coef
        self.at_epoch(0.0)

    def at_epoch(self, epoch: float) -> None:
        """Sets ``eos_coef`` to its value at an epoch."""
        self.eos_coef = value_at(self._eos_coef, epoch)

    def activate(self, logits: Tensor) -> Tensor:
        """Logarithms of the probabilities."""
        return logits.log_softmax(-1)

    def costs(self, activations: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """The negative probability of the label."""
        return activations.permute(1, 3, 0, 2)[images, labels].exp_().neg_()

    def loss(self, activations: Tensor, rows: Tensor, labels: Tensor, ious: Tensor | None = None) -> Tensor:
        """Sum of the weighted cross-entropies; the target of queries without a match is no-object."""
        classes = labels.new_full((activations[..., 0].numel(),), self.num_classes)
        classes.index_copy_(0, rows, labels)
        class_weights = activations.new_ones(self.num_logits)
        class_weights[-1].fill_(self.eos_coef)
        nll = F.nll_loss(activations.flatten(0, 2), classes, weight=class_weights, reduction="none")
        return nll.view(activations.shape[0], -1).sum(1)

    def normaliser(self, counts: Sequence[int], num_queries: int | None = None) -> float:
        """Sum of the class weights of all queries' target classes.

        Raises:
            ValueError: the number of queries is not known.
        """
        if num_queries is None:
            raise ValueError("the criterion was built without num_queries, and has seen no output yet")
        matched = sum(min(count, num_queries) for count in counts)
        return matched + self.eos_coef * (len(counts) * num_queries - matched)

    def finds_object(self, logits: Tensor) -> Tensor:
        """Whether a class has a logit as high as no-object's."""
        return logits[..., :-1].amax(-1) >= logits[..., -1]

    def predicted(self, logits: Tensor) -> Tensor:
        """The class with the highest logit."""
        return logits.argmax(-1)

    def scores(self, logits: Tensor, limit: int) -> Scores:
        """Every query's best class other than no-object, with its probability, in the order of the queries."""
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        queries = torch.arange(logits.shape[1], device=logits.device).expand_as(labels)
        return Scores(scores, labels, queries)
