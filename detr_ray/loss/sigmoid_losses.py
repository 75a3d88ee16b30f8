"""Class losses over independent classes: a sigmoid for each, and no logit for no-object.

For a background query, all classes are zero. All losses here have the same matching cost. They differ in the target of
a matched query's logit: 1 (focal loss), or the IoU of its box (varifocal and matchability-aware loss).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from detr_ray.loss.class_losses import Scores

_EPS = 1e-8
"""Added inside the logarithms of matching costs, as in the original."""


class FocalLoss:
    """Sigmoid focal loss (Lin et al. 2017), in DETR since Deformable DETR.

    Args:
        num_classes: classes.
        alpha: weight of targets 1; targets 0 have ``1 - alpha``.
        gamma: exponent of the error of a probability.

    Attributes:
        needs_iou: whether ``loss`` uses the IoU of the matched boxes.
    """

    needs_iou = False
    cost_alpha, cost_gamma = 0.25, 2.0

    def __init__(self, num_classes: int, alpha: float = 0.25, gamma: float = 2.0) -> None:
        self.num_classes = self.num_logits = num_classes
        self.alpha, self.gamma = alpha, gamma
        self.cost_alpha, self.cost_gamma = alpha, gamma

    def at_epoch(self, epoch: float) -> None:
        """Does nothing: the weights are constant."""

    def activate(self, logits: Tensor) -> Tensor:
        """The logits, unchanged: costs use only those of the boxes' labels."""
        return logits

    def costs(self, activations: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Focal loss of the label's logit for target 1, minus that for target 0."""
        probability = activations.permute(1, 3, 0, 2)[images, labels].sigmoid()
        absent = 1 - probability
        as_one = self.cost_alpha * absent**self.cost_gamma * -(probability + _EPS).log()
        as_zero = (1 - self.cost_alpha) * probability**self.cost_gamma * -(absent + _EPS).log()
        return as_one - as_zero

    def loss(self, activations: Tensor, rows: Tensor, labels: Tensor, ious: Tensor | None = None) -> Tensor:
        """Sum over all queries and classes: first with target 0 for all, then corrected for the matched labels."""
        layers = activations.shape[0]
        background = self._as_zero(activations).flatten(1).sum(1)
        matched = activations.flatten(0, 2)[rows, labels]
        change = self._as_object(matched, ious) - self._as_zero(matched)
        return background + change.view(layers, rows.shape[0] // layers).sum(1)

    def _as_zero(self, logits: Tensor) -> Tensor:
        """Loss of logits with target 0."""
        return (1 - self.alpha) * logits.sigmoid() ** self.gamma * F.softplus(logits)

    def _as_object(self, logits: Tensor, ious: Tensor | None) -> Tensor:
        """Loss of the matched labels' logits."""
        return self.alpha * (-logits).sigmoid() ** self.gamma * F.softplus(-logits)

    def normaliser(self, counts: Sequence[int], num_queries: int | None = None) -> float:
        """The number of boxes."""
        return float(sum(counts))

    def finds_object(self, logits: Tensor) -> Tensor:
        """Whether a class has a probability of at least one half."""
        return logits.amax(-1) >= 0

    def predicted(self, logits: Tensor) -> Tensor:
        """The class with the highest logit."""
        return logits.argmax(-1)

    def scores(self, logits: Tensor, limit: int) -> Scores:
        """The ``limit`` highest probabilities over queries and classes; a query may come with several labels."""
        found = logits.sigmoid().flatten(1)
        scores, places = found.topk(min(limit, found.shape[1]), dim=1)
        return Scores(scores, places % self.num_logits, places // self.num_logits)


class VarifocalLoss(FocalLoss):
    """Varifocal loss (Zhang et al. 2021): the IoU of a box is target and weight of its matched logit.

    Args:
        num_classes: classes.
        alpha: weight of targets 0.
        gamma: exponent of the probability in that weight.
    """

    needs_iou = True

    def __init__(self, num_classes: int, alpha: float = 0.75, gamma: float = 2.0) -> None:
        super().__init__(num_classes, alpha, gamma)
        self.cost_alpha, self.cost_gamma = FocalLoss.cost_alpha, FocalLoss.cost_gamma

    def _as_zero(self, logits: Tensor) -> Tensor:
        return self.alpha * logits.detach().sigmoid() ** self.gamma * F.softplus(logits)

    def _as_object(self, logits: Tensor, ious: Tensor | None) -> Tensor:
        assert ious is not None, "needs_iou says so"
        return ious * F.binary_cross_entropy_with_logits(logits, ious, reduction="none")


class MatchabilityLoss(FocalLoss):
    """Matchability-aware loss (Huang et al. 2024, DEIM): as varifocal, but all matches have weight 1.

    Args:
        num_classes: classes.
        gamma: exponent of the IoU in the target of a matched logit, and of the probability in the weight of others.
    """

    needs_iou = True

    def __init__(self, num_classes: int, gamma: float = 1.5) -> None:
        super().__init__(num_classes, gamma=gamma)
        self.cost_alpha, self.cost_gamma = FocalLoss.cost_alpha, FocalLoss.cost_gamma

    def _as_zero(self, logits: Tensor) -> Tensor:
        return logits.detach().sigmoid() ** self.gamma * F.softplus(logits)

    def _as_object(self, logits: Tensor, ious: Tensor | None) -> Tensor:
        assert ious is not None, "needs_iou says so"
        return F.binary_cross_entropy_with_logits(logits, ious**self.gamma, reduction="none")


SIGMOID_LOSSES: dict[str, type[FocalLoss]] = {"focal": FocalLoss, "vfl": VarifocalLoss, "mal": MatchabilityLoss}
"""Value of ``loss.class_loss`` -> class."""
