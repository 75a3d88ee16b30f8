"""Prediction sets: predictions in a model's output, with the targets that they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from detr_ray.loss.class_losses import ClassLoss
from detr_ray.loss.targets import FlatTargets, flatten_targets
from detr_ray.structures import ModelOutput, Target


@dataclass(frozen=True, slots=True)
class Matches:
    """Matched pairs of ``L`` layers of predictions.

    Every layer has the same number of pairs, ``P``.

    Attributes:
        images: ``[P]`` int64, the image of each pair as its place in the micro-batch; ascending.
        queries: ``[L, P]`` int64.
        targets: ``[L, P]`` int64, rows of the flat targets.
    """

    images: Tensor
    queries: Tensor
    targets: Tensor


@dataclass(frozen=True, slots=True)
class PredictionSet:
    """Predictions of ``L`` layers for the same queries, compared with the same targets.

    Attributes:
        suffixes: one for each layer; the names of its losses end with it. The layer with the empty suffix gives the
            model's result.
        logits: ``[L, B, Q, num_logits]`` float32.
        boxes_cxcywh: ``[L, B, Q, 4]`` float32 in 0..1.
        targets: what the queries are to find.
        pairs: which query is to find which target; None where the matcher decides.
        repeats: how many queries are to find each target; the normalisers are multiplied by it.
    """

    suffixes: tuple[str, ...]
    logits: Tensor
    boxes_cxcywh: Tensor
    targets: FlatTargets
    pairs: Matches | None = None
    repeats: int = 1


class PredictionSource(Protocol):
    """Finds a prediction set in a model's output, and computes its normalisers without an output."""

    def normalisers(self, counts: Sequence[int], class_loss: ClassLoss) -> tuple[float, float]:
        """What images with these numbers of boxes add to the divisors of box losses and class loss.

        Both are sums over images, so that they can be added over micro-batches and workers.
        """
        ...

    def predictions(self, outputs: ModelOutput, targets: Sequence[Target]) -> PredictionSet | None:
        """The predictions in a model's output; None if it has none, as in evaluation."""
        ...


class DecoderLayers:
    """The decoder's layers, each matched with the image's boxes by itself.

    Args:
        num_queries: of the model; None until an output shows it.
    """

    def __init__(self, num_queries: int | None = None) -> None:
        self._num_queries = num_queries

    def normalisers(self, counts: Sequence[int], class_loss: ClassLoss) -> tuple[float, float]:
        """The number of boxes, and the class loss's own."""
        return float(sum(counts)), class_loss.normaliser(counts, self._num_queries)

    def predictions(self, outputs: ModelOutput, targets: Sequence[Target]) -> PredictionSet:
        """All layers, first to last; the losses of the last one have no suffix."""
        logits, boxes_cxcywh = _stacked(outputs)
        self._num_queries = logits.shape[2]
        suffixes = (*(f"_{layer}" for layer in range(len(logits) - 1)), "")
        return PredictionSet(suffixes, logits, boxes_cxcywh, flatten_targets(targets, logits.device))


class CountedByBoxes:
    """Base of sources whose losses are divided by the number of boxes; with several groups, by that of one group."""

    def normalisers(self, counts: Sequence[int], class_loss: ClassLoss) -> tuple[float, float]:
        """The number of boxes, and the class loss's own, which must not depend on the number of queries."""
        return float(sum(counts)), class_loss.normaliser(counts)


class EncoderCells(CountedByBoxes):
    """What the encoder predicts for each of its cells, matched with the image's boxes (two-stage Deformable DETR).

    The class only tells whether there is an object: every box has class 0, and the model ranks cells by its logit.
    """

    def predictions(self, outputs: ModelOutput, targets: Sequence[Target]) -> PredictionSet | None:
        """The predictions under ``enc_outputs``; names of their losses end with ``_enc``."""
        if "enc_outputs" not in outputs:
            return None
        cells = outputs["enc_outputs"]
        flat = flatten_targets(targets, cells["pred_logits"].device)
        objects = replace(flat, labels=torch.zeros_like(flat.labels))
        return PredictionSet(("_enc",), cells["pred_logits"].float()[None], cells["pred_boxes"].float()[None], objects)


class ChosenCells(CountedByBoxes):
    """What the encoder predicts for the cells that became queries, matched with the image's boxes (DINO)."""

    def predictions(self, outputs: ModelOutput, targets: Sequence[Target]) -> PredictionSet | None:
        """The predictions under ``interm_outputs``; names of their losses end with ``_interm``."""
        if "interm_outputs" not in outputs:
            return None
        cells = outputs["interm_outputs"]
        flat = flatten_targets(targets, cells["pred_logits"].device)
        return PredictionSet(("_interm",), cells["pred_logits"].float()[None], cells["pred_boxes"].float()[None], flat)


class Denoising(CountedByBoxes):
    """Queries that start from noised boxes, with known pairs of queries and boxes (DINO, Zhang et al. 2022)."""

    def predictions(self, outputs: ModelOutput, targets: Sequence[Target]) -> PredictionSet | None:
        """The predictions under ``dn_outputs``; names of their losses end with ``_dn``, or ``_dn_0`` and so on."""
        if "dn_outputs" not in outputs:
            return None
        groups = outputs["dn_outputs"]["groups"]
        logits, boxes_cxcywh = _stacked(outputs["dn_outputs"])
        flat = flatten_targets(targets, logits.device)
        suffixes = (*(f"_dn_{layer}" for layer in range(len(logits) - 1)), "_dn")
        pairs = _pairs_of_groups(flat.counts, groups, logits.shape[2] // groups, len(logits))
        return PredictionSet(suffixes, logits, boxes_cxcywh, flat, pairs, repeats=groups)


def _pairs_of_groups(counts: Sequence[int], groups: int, queries: int, layers: int) -> Matches:
    """Pairs query ``i`` of each group with box ``i`` of its image, in every layer."""
    boxes = np.repeat(counts, groups)  # of each image and group
    place = np.arange(groups * sum(counts)) - np.repeat(boxes.cumsum() - boxes, boxes)
    first_query = np.repeat(np.tile(np.arange(groups) * queries, len(counts)), boxes)
    images = np.repeat(np.repeat(np.arange(len(counts)), groups), boxes)
    first_target = np.cumsum((0, *counts[:-1]))
    return Matches(
        images=torch.from_numpy(images),
        queries=torch.from_numpy(first_query + place).expand(layers, -1),
        targets=torch.from_numpy(first_target[images] + place).expand(layers, -1),
    )


class OneToMany:
    """Further queries that are matched with several copies of each box (H-DETR, Jia et al. 2022).

    Args:
        copies: of each box.
    """

    def __init__(self, copies: int) -> None:
        self.copies = copies

    def normalisers(self, counts: Sequence[int], class_loss: ClassLoss) -> tuple[float, float]:
        """The number of boxes with their copies, and the class loss's own."""
        repeated = [count * self.copies for count in counts]
        return float(sum(repeated)), class_loss.normaliser(repeated)

    def predictions(self, outputs: ModelOutput, targets: Sequence[Target]) -> PredictionSet | None:
        """The predictions under ``one_to_many_outputs``; names of their losses end with ``_one2many``."""
        if "one_to_many_outputs" not in outputs:
            return None
        logits, boxes_cxcywh = _stacked(outputs["one_to_many_outputs"])
        repeated = [
            Target(labels=target["labels"].repeat(self.copies), boxes=target["boxes"].repeat(self.copies, 1))
            for target in targets
        ]
        suffixes = (*(f"_{layer}_one2many" for layer in range(len(logits) - 1)), "_one2many")
        return PredictionSet(suffixes, logits, boxes_cxcywh, flatten_targets(repeated, logits.device))


def _stacked(outputs: ModelOutput) -> tuple[Tensor, Tensor]:
    """Logits and boxes of all layers, ``[L, B, Q, ...]``, the first layer first."""
    layers = [*outputs.get("aux_outputs", ()), outputs]
    # From here on everything is elementwise or a reduction: float32 stays float32 under autocast.
    logits = torch.stack([layer["pred_logits"] for layer in layers]).float()
    return logits, torch.stack([layer["pred_boxes"] for layer in layers]).float()
