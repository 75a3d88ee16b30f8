"""DETR's set loss (Carion et al. 2020, section 3.1 and appendix A.2), all decoder layers in one pass.

The sums over queries and boxes are divided by normalisers that the caller may give: summed over the micro-batches and
workers of a step they make the gradient independent of how the global batch was cut. Knows nothing of workers,
optimizers or where targets come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_ray.boxes import cxcywh_to_xyxy, generalized_iou
from detr_ray.loss.matcher import HungarianMatcher, Matches
from detr_ray.loss.targets import FlatTargets, flatten_targets
from detr_ray.loss.weighting import Weight, weight_at, weight_from_config
from detr_ray.structures import ModelOutput, Target

if TYPE_CHECKING:
    from detr_ray.config import LossConfig

LOSS_NAMES = ("loss_ce", "loss_bbox", "loss_giou")


class SetCriterion(nn.Module):
    """Matches predictions to boxes and measures how far off they are.

    For every decoder layer: weighted cross-entropy over all queries (``loss_ce``), L1 distance (``loss_bbox``) and
    1 - GIoU (``loss_giou``) over the matched pairs, each layer with its own matching.

    Args:
        num_classes: classes without no-object; the predictions have one logit more.
        matcher: assigns queries to boxes.
        ce: weight of the class loss in the total.
        bbox: weight of the L1 loss in the total.
        giou: weight of the GIoU loss in the total.
        eos_coef: class weight of no-object; all classes have 1.
        num_layers: decoder layers that ``weights`` names until the first call shows how many there are.
    """

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        ce: Weight = 1.0,
        bbox: Weight = 5.0,
        giou: Weight = 2.0,
        eos_coef: Weight = 0.1,
        num_layers: int = 6,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.num_layers = num_layers
        self._loss_weights = dict(zip(LOSS_NAMES, (ce, bbox, giou), strict=True))
        self._eos_coef = eos_coef
        self.at_epoch(0.0)

    def at_epoch(self, epoch: float) -> None:
        """Sets all weights (of losses, of matching costs, of no-object) to their values at an epoch."""
        self._current = {name: weight_at(weight, epoch) for name, weight in self._loss_weights.items()}
        self.eos_coef = weight_at(self._eos_coef, epoch)
        self.matcher.at_epoch(epoch)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every loss in the total, of all layers, as of the last ``at_epoch``."""
        suffixes = _layer_suffixes(self.num_layers)
        return {name + suffix: self._current[name] for suffix in suffixes for name in LOSS_NAMES}

    def normalisers(self, counts: Sequence[int], num_queries: int) -> tuple[float, float]:
        """What images with so many boxes each add to the two normalisers.

        Both are sums over images: add them over the micro-batches and workers of a step, and give the sums to the
        criterion.

        Args:
            counts: boxes of each image.
            num_queries: queries of the model.

        Returns:
            Number of boxes, and sum of the class weights of all queries' target classes.
        """
        matched = sum(min(count, num_queries) for count in counts)
        unmatched = len(counts) * num_queries - matched
        return float(sum(counts)), matched + self.eos_coef * unmatched

    def forward(
        self,
        outputs: ModelOutput,
        targets: Sequence[Target],
        num_boxes: float | Tensor | None = None,
        class_weight_sum: float | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Computes the losses of all layers.

        Args:
            outputs: the model's, of B images.
            targets: B of them; images without boxes are welcome, as are images with more boxes than queries.
            num_boxes: what the box losses are divided by, at least 1 is used; None: the boxes of this batch.
            class_weight_sum: what the class loss is divided by; None: the sum of this batch's class weights.

        Returns:
            0-d float32 tensors. ``loss_ce``, ``loss_bbox``, ``loss_giou`` and ``cardinality_error`` (mean over images
            of how far the number of queries that say an object is from the number of boxes) of the last layer,
            the same with ``_0``, ``_1``, ... of the earlier layers, and ``class_error`` (percentage of the last layer's
            matched queries with a wrong class; 100 where nothing is matched). Only the losses carry gradients.

        Raises:
            NonFiniteOutputs: predictions hold NaN or infinity.
            ValueError: shapes that do not fit each other, a label outside ``0..num_classes-1``, a target box that is
                not finite.
        """
        layers = [*outputs.get("aux_outputs", ()), outputs]
        self.num_layers = len(layers)
        # From here on everything is elementwise or a reduction: float32 stays float32 under autocast.
        logits = torch.stack([layer["pred_logits"] for layer in layers]).float()
        boxes = torch.stack([layer["pred_boxes"] for layer in layers]).float()
        if logits.shape[-1] != self.num_classes + 1:
            raise ValueError(
                f"the model predicts {logits.shape[-1]} classes with no-object, "
                f"the criterion expects {self.num_classes} + 1"
            )
        flat = flatten_targets(targets, logits.device)
        log_probs = logits.log_softmax(-1)
        matches = self.matcher.match(log_probs, boxes, flat)
        prediction_rows, target_rows = _rows_on_device(matches, logits.shape[:3], logits.device)

        own_boxes, own_weight_sum = self.normalisers(flat.counts, logits.shape[2])
        box_norm = _at_least_one(own_boxes if num_boxes is None else num_boxes)
        class_norm = _one_if_zero(own_weight_sum if class_weight_sum is None else class_weight_sum)
        matched_labels = flat.labels.index_select(0, target_rows)
        distance, overlap = _box_losses(boxes, flat.boxes_cxcywh, prediction_rows, target_rows)
        values = {
            "loss_ce": self._class_loss(log_probs, matched_labels, prediction_rows) / class_norm,
            "loss_bbox": distance / box_norm,
            "loss_giou": overlap / box_norm,
        }
        class_error, values["cardinality_error"] = self._errors(logits, matched_labels, prediction_rows, flat)
        return _by_name(values, class_error)

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Weighted sum of the losses of all layers, with the weights of the last ``at_epoch``."""
        parts = []
        for name, weight in self._current.items():
            layers = [value for key, value in losses.items() if key == name or key.startswith(f"{name}_")]
            parts.append(weight * torch.stack(layers).sum())
        return torch.stack(parts).sum()

    def _class_loss(self, log_probs: Tensor, matched_labels: Tensor, prediction_rows: Tensor) -> Tensor:
        """Sum over queries of weighted cross-entropies, ``[L]``."""
        classes = matched_labels.new_full((log_probs[..., 0].numel(),), self.num_classes)
        classes.index_copy_(0, prediction_rows, matched_labels)
        class_weights = log_probs.new_ones(self.num_classes + 1)
        class_weights[-1].fill_(self.eos_coef)
        nll = F.nll_loss(log_probs.flatten(0, 2), classes, weight=class_weights, reduction="none")
        return nll.view(log_probs.shape[0], -1).sum(1)

    @torch.no_grad()
    def _errors(
        self, logits: Tensor, matched_labels: Tensor, prediction_rows: Tensor, targets: FlatTargets
    ) -> tuple[Tensor, Tensor]:
        """Class error of the last layer (0-d) and cardinality error of every layer (``[L]``)."""
        counts = torch.tensor(targets.counts).to(logits.device, torch.float32, non_blocking=True)
        objects = (logits[..., :-1].amax(-1) >= logits[..., -1]).sum(2).float()
        cardinality_error = (objects - counts).abs().mean(1)

        num_pairs = matched_labels.shape[0] // logits.shape[0]
        if num_pairs == 0:
            return logits.new_full((), 100.0), cardinality_error
        last = slice(-num_pairs, None)
        predicted = logits.flatten(0, 2).index_select(0, prediction_rows[last]).argmax(-1)
        accuracy = (predicted == matched_labels[last]).float().mean()
        return 100.0 - 100.0 * accuracy, cardinality_error


def build_criterion(cfg_loss: LossConfig, num_classes: int = 91, num_layers: int = 6) -> SetCriterion:
    """Criterion of a config's ``loss`` section.

    Args:
        cfg_loss: has ``cost_class``, ``cost_bbox``, ``cost_giou``, ``ce``, ``bbox``, ``giou`` and ``eos_coef``, each a
            number or a schedule.
        num_classes: classes without no-object.
        num_layers: decoder layers that ``criterion.weights`` names before the first call.
    """
    matcher = HungarianMatcher(
        cost_class=weight_from_config(cfg_loss.cost_class),
        cost_bbox=weight_from_config(cfg_loss.cost_bbox),
        cost_giou=weight_from_config(cfg_loss.cost_giou),
    )
    return SetCriterion(
        num_classes,
        matcher,
        ce=weight_from_config(cfg_loss.ce),
        bbox=weight_from_config(cfg_loss.bbox),
        giou=weight_from_config(cfg_loss.giou),
        eos_coef=weight_from_config(cfg_loss.eos_coef),
        num_layers=num_layers,
    )


def _layer_suffixes(num_layers: int) -> list[str]:
    """Endings of the loss names: the last layer's is empty and comes first, then ``_0``, ``_1``, ..."""
    return ["", *(f"_{layer}" for layer in range(num_layers - 1))]


def _rows_on_device(matches: Matches, shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Matched pairs of all layers as rows of the ``[L*B*Q, ...]`` predictions and of the flat targets."""
    num_layers, num_images, num_queries = shape
    layers = np.arange(num_layers)[:, None]
    rows = (layers * num_images + matches.images) * num_queries + matches.queries
    both = torch.from_numpy(np.stack((rows.ravel(), matches.targets.ravel())))
    prediction_rows, target_rows = both.to(device, non_blocking=True).unbind()
    return prediction_rows, target_rows


def _box_losses(
    boxes_cxcywh: Tensor, target_boxes_cxcywh: Tensor, prediction_rows: Tensor, target_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums over the matched pairs of L1 distance and of 1 - GIoU, ``[L]`` each; zeros with a graph without pairs."""
    num_layers = boxes_cxcywh.shape[0]
    predicted = boxes_cxcywh.flatten(0, 2).index_select(0, prediction_rows)
    wanted = target_boxes_cxcywh.index_select(0, target_rows)
    giou = generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
    num_pairs = prediction_rows.shape[0] // num_layers
    distance = (predicted - wanted).abs().view(num_layers, num_pairs, 4).sum((1, 2))
    return distance, (1 - giou).view(num_layers, num_pairs).sum(1)


def _at_least_one(norm: float | Tensor) -> float | Tensor:
    """A normaliser that a batch without boxes can be divided by."""
    return norm.clamp(min=1.0) if isinstance(norm, Tensor) else max(float(norm), 1.0)


def _one_if_zero(norm: float | Tensor) -> float | Tensor:
    """The class weights sum to zero where no-object has none and there are no boxes; then so does the loss."""
    if isinstance(norm, Tensor):
        return torch.where(norm > 0, norm, torch.ones_like(norm))
    return norm if norm > 0 else 1.0


def _by_name(values: dict[str, Tensor], class_error: Tensor) -> dict[str, Tensor]:
    """Values of all layers (``[L]`` each, first layer first) under the original's names, last layer first."""
    split = {name: value.unbind() for name, value in values.items()}
    named = {name: layers[-1] for name, layers in split.items()}
    named["class_error"] = class_error
    for layer in range(len(split["loss_ce"]) - 1):
        named |= {f"{name}_{layer}": layers[layer] for name, layers in split.items()}
    return named
