"""DETR's set loss (Carion et al. 2020, section 3.1 and appendix A.2), over a list of prediction sets.

The sums over queries and boxes are divided by normalisers that the caller may give: summed over the micro-batches and
workers of a step they make the gradient independent of how the global batch was cut. Knows nothing of workers,
optimizers or where targets come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from detr_ray.boxes import cxcywh_to_xyxy, generalized_iou, iou
from detr_ray.loss.class_losses import ClassLoss, SoftmaxLoss
from detr_ray.loss.matcher import HungarianMatcher
from detr_ray.loss.prediction_sets import (
    ChosenCells,
    DecoderLayers,
    Denoising,
    EncoderCells,
    Matches,
    OneToMany,
    PredictionSet,
    PredictionSource,
)
from detr_ray.loss.sigmoid_losses import SIGMOID_LOSSES
from detr_ray.schedules import Scheduled, value_at
from detr_ray.structures import ModelOutput, Target

if TYPE_CHECKING:
    from detr_ray.config import Config, LossConfig, ModelConfig

LOSS_NAMES = ("loss_ce", "loss_bbox", "loss_giou")
ERROR_NAMES = ("class_error", "cardinality_error")
"""What the criterion measures beside losses: means over images or pairs, which must not be summed over workers."""


class SetCriterion(nn.Module):
    """Matches predictions to boxes and measures how far off they are.

    For every layer of every prediction set: the class loss over all queries (``loss_ce``), L1 distance (``loss_bbox``)
    and 1 - GIoU (``loss_giou``) over the matched pairs, each layer with its own matching.

    Args:
        class_loss: the loss of the classes.
        matcher: assigns queries to boxes for prediction sets without given pairs.
        sources: find the prediction sets in a model's output; the decoder's layers come first.
        ce: weight of the class loss in the total.
        bbox: weight of the L1 loss in the total.
        giou: weight of the GIoU loss in the total.
        num_layers: number of decoder layers for ``weights`` before the first call.
        more_suffixes: suffixes of the losses of other sets for ``weights`` before the first call.
    """

    def __init__(
        self,
        class_loss: ClassLoss,
        matcher: HungarianMatcher,
        sources: Sequence[PredictionSource],
        ce: float | Scheduled = 1.0,
        bbox: float | Scheduled = 5.0,
        giou: float | Scheduled = 2.0,
        num_layers: int = 6,
        more_suffixes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.class_loss = class_loss
        self.matcher = matcher
        self.sources = tuple(sources)
        self._loss_weights = dict(zip(LOSS_NAMES, (ce, bbox, giou), strict=True))
        self._suffixes = ("", *(f"_{layer}" for layer in range(num_layers - 1)), *more_suffixes)
        self.at_epoch(0.0)

    @property
    def num_classes(self) -> int:
        """Classes without no-object."""
        return self.class_loss.num_classes

    def at_epoch(self, epoch: float) -> None:
        """Sets all weights (of losses, of matching costs, of the class loss) to their values at an epoch."""
        self.loss_weights = {name: value_at(weight, epoch) for name, weight in self._loss_weights.items()}
        self.class_loss.at_epoch(epoch)
        self.matcher.at_epoch(epoch)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every loss in the total, of all layers and sets, as of the last ``at_epoch``."""
        return {name + suffix: weight for suffix in self._suffixes for name, weight in self.loss_weights.items()}

    def normalisers(self, counts: Sequence[int]) -> tuple[float, ...]:
        """What images with these numbers of boxes add to the normalisers, two for each prediction set.

        All are sums over images: add them over the micro-batches and workers of a step, and give the sums to the
        criterion. How many there are does not depend on the images.

        Args:
            counts: boxes of each image.
        """
        return tuple(value for source in self.sources for value in source.normalisers(counts, self.class_loss))

    def forward(
        self, outputs: ModelOutput, targets: Sequence[Target], normalisers: Sequence[float | Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Computes the losses of all prediction sets.

        Args:
            outputs: the model's, of B images.
            targets: B of them; an image may have no boxes, or more boxes than there are queries.
            normalisers: what losses are divided by, as ``normalisers`` counts it over all images of a step; box losses
                are divided by 1 at least. None: of this batch alone.

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
        found = [source.predictions(outputs, targets) for source in self.sources]
        sets = [one for one in found if one is not None]
        for one in sets:
            if one.logits.shape[-1] != self.class_loss.num_logits:
                raise ValueError(
                    f"the model predicts {one.logits.shape[-1]} logits a query, the criterion expects "
                    f"{self.class_loss.num_logits} for {self.num_classes} classes"
                )
        self._suffixes = tuple(suffix for one in sets for suffix in (one.suffixes[-1], *one.suffixes[:-1]))
        activations = [self.class_loss.activate(one.logits) for one in sets]
        all_pairs = self.matcher.match(sets, activations, self.class_loss)
        if normalisers is None:
            normalisers = self.normalisers([len(target["labels"]) for target in targets])
        norms = [normalisers[2 * number : 2 * number + 2] for number, one in enumerate(found) if one is not None]
        losses: dict[str, Tensor] = {}
        for one, active, pairs, (box_norm, class_norm) in zip(sets, activations, all_pairs, norms, strict=True):
            box_norm, class_norm = one.repeats * _at_least_one(box_norm), one.repeats * _one_if_zero(class_norm)
            losses |= self._losses(one, active, pairs, box_norm, class_norm)
        return losses

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum of the losses of all layers and sets, with the weights of the last ``at_epoch``."""
        parts = []
        for name, weight in self.loss_weights.items():
            parts.append(weight * torch.stack([losses[name + suffix] for suffix in self._suffixes]).sum())
        return torch.stack(parts).sum()

    def _losses(
        self,
        predictions: PredictionSet,
        activations: Tensor,
        pairs: Matches,
        box_norm: float | Tensor,
        class_norm: float | Tensor,
    ) -> dict[str, Tensor]:
        """The losses and errors of one prediction set, by name."""
        targets = predictions.targets
        prediction_rows, target_rows = _rows_on_device(pairs, predictions.logits)
        matched_labels = targets.labels.index_select(0, target_rows)
        predicted = predictions.boxes_cxcywh.flatten(0, 2).index_select(0, prediction_rows)
        wanted = targets.boxes_cxcywh.index_select(0, target_rows)
        distance, overlap = _box_losses(predicted, wanted, predictions.logits.shape[0])
        ious = None
        if self.class_loss.needs_iou:
            ious = iou(cxcywh_to_xyxy(predicted.detach()), cxcywh_to_xyxy(wanted))
        values = {
            "loss_ce": self.class_loss.loss(activations, prediction_rows, matched_labels, ious) / class_norm,
            "loss_bbox": distance / box_norm,
            "loss_giou": overlap / box_norm,
        }
        class_error, values["cardinality_error"] = self._errors(predictions, matched_labels, prediction_rows)
        return _by_name(values, class_error, predictions.suffixes)

    @torch.no_grad()
    def _errors(
        self, predictions: PredictionSet, matched_labels: Tensor, prediction_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Class error of the last layer (0-d) and cardinality error of every layer (``[L]``)."""
        logits = predictions.logits
        counts = torch.tensor(predictions.targets.counts).to(logits.device, torch.float32, non_blocking=True)
        objects = self.class_loss.finds_object(logits).sum(2).float()
        cardinality_error = (objects - counts).abs().mean(1)

        num_pairs = matched_labels.shape[0] // logits.shape[0]
        if num_pairs == 0:
            return logits.new_full((), 100.0), cardinality_error
        last = slice(-num_pairs, None)
        predicted = self.class_loss.predicted(logits.flatten(0, 2).index_select(0, prediction_rows[last]))
        accuracy = (predicted == matched_labels[last]).float().mean()
        return 100.0 - 100.0 * accuracy, cardinality_error


def build_criterion(
    cfg: Config | LossConfig,
    num_classes: int = 91,
    num_layers: int | None = None,
    num_queries: int | None = None,
    cfg_model: ModelConfig | None = None,
) -> SetCriterion:
    """Criterion of a configuration.

    Args:
        cfg: the configuration, or its section ``loss`` alone.
        num_classes: classes without no-object.
        num_layers: decoder layers that ``criterion.weights`` names before the first call. None: those of the section
            ``model`` that the output has, or 6.
        num_queries: of the model; the class loss softmax needs it to count normalisers before the first call. None:
            that of the section ``model``.
        cfg_model: the section ``model``, if ``cfg`` is a section. It tells the defaults of the section ``loss``, and
            which prediction sets there are besides the decoder's layers. None: DETR's, and no others.
    """
    loss: Any = getattr(cfg, "loss", cfg)
    model: Any = getattr(cfg, "model", cfg_model)
    if model is not None and hasattr(loss, "for_architecture"):
        loss = loss.for_architecture(getattr(model, "architecture", "detr"))
    if num_queries is None:
        num_queries = getattr(model, "num_queries", None)
    if num_layers is None:
        num_layers = getattr(model, "decoder_layers", 6) if getattr(model, "aux_loss", True) else 1
    class_loss = _class_loss(loss, num_classes)
    sources: list[PredictionSource] = [DecoderLayers(num_queries)]
    suffixes: list[str] = []
    if getattr(model, "two_stage", False):
        sources.append(EncoderCells())
        suffixes.append("_enc")
    if getattr(model, "architecture", "detr") == "dino":
        sources.append(ChosenCells())
        suffixes.append("_interm")
    if getattr(model, "denoising_queries", 0):
        sources.append(Denoising())
        suffixes += ["_dn", *(f"_dn_{layer}" for layer in range(num_layers - 1))]
    if getattr(model, "one_to_many_queries", 0):
        sources.append(OneToMany(model.one_to_many_copies))
        suffixes += ["_one2many", *(f"_{layer}_one2many" for layer in range(num_layers - 1))]
    return SetCriterion(
        class_loss,
        HungarianMatcher(loss.cost_class, loss.cost_bbox, loss.cost_giou, class_loss),
        sources,
        ce=loss.ce,
        bbox=loss.bbox,
        giou=loss.giou,
        num_layers=num_layers,
        more_suffixes=suffixes,
    )


def _class_loss(loss: LossConfig, num_classes: int) -> ClassLoss:
    kind = getattr(loss, "class_loss", "softmax")  # sections made by hand may have only the original's keys
    if kind == "softmax":
        return SoftmaxLoss(num_classes, loss.eos_coef)
    given = {"alpha": loss.focal_alpha, "gamma": loss.focal_gamma}
    return SIGMOID_LOSSES[kind](num_classes, **{name: value for name, value in given.items() if value is not None})


def _rows_on_device(pairs: Matches, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Matched pairs of all layers as rows of the ``[L * B * Q, ...]`` predictions and of the flat targets."""
    num_layers, num_images, num_queries = logits.shape[:3]
    layers = torch.arange(num_layers, device=pairs.queries.device)[:, None]
    rows = (layers * num_images + pairs.images) * num_queries + pairs.queries
    both = torch.stack((rows.flatten(), pairs.targets.flatten()))
    prediction_rows, target_rows = both.to(logits.device, non_blocking=True).unbind()
    return prediction_rows, target_rows


def _box_losses(predicted_cxcywh: Tensor, wanted_cxcywh: Tensor, num_layers: int) -> tuple[Tensor, Tensor]:
    """Sums of L1 distance and of 1 - GIoU over the matched pairs, ``[L]`` each; differentiable zeros without pairs."""
    giou = generalized_iou(cxcywh_to_xyxy(predicted_cxcywh), cxcywh_to_xyxy(wanted_cxcywh))
    num_pairs = predicted_cxcywh.shape[0] // num_layers
    distance = (predicted_cxcywh - wanted_cxcywh).abs().view(num_layers, num_pairs, 4).sum((1, 2))
    return distance, (1 - giou).view(num_layers, num_pairs).sum(1)


def _at_least_one(norm: float | Tensor) -> float | Tensor:
    """The normaliser, at least 1, so that a batch without boxes can be divided by it."""
    return norm.clamp(min=1.0) if isinstance(norm, Tensor) else max(float(norm), 1.0)


def _one_if_zero(norm: float | Tensor) -> float | Tensor:
    """Replaces 0 by 1: without boxes, and with weight 0 for no-object, class weights and loss are both 0."""
    if isinstance(norm, Tensor):
        return torch.where(norm > 0, norm, torch.ones_like(norm))
    return norm if norm > 0 else 1.0


def _by_name(values: dict[str, Tensor], class_error: Tensor, suffixes: Sequence[str]) -> dict[str, Tensor]:
    """Values of all layers (``[L]`` each) under the original's names, last layer first."""
    split = {name: value.unbind() for name, value in values.items()}
    named = {name + suffixes[-1]: layers[-1] for name, layers in split.items()}
    named["class_error" + suffixes[-1]] = class_error
    for layer, suffix in enumerate(suffixes[:-1]):
        named |= {name + suffix: layers[layer] for name, layers in split.items()}
    return named
