"""A criterion over several prediction sets: matched ones and ones that bring their pairs along."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from cases import NUM_CLASSES, random_case
from torch import Tensor

from detr_ray.config import LossConfig
from detr_ray.loss import ClassLoss, HungarianMatcher, NonFiniteOutputs, SetCriterion, SoftmaxLoss, build_criterion
from detr_ray.loss.prediction_sets import DecoderLayers, Matches, PredictionSet
from detr_ray.loss.targets import flatten_targets
from detr_ray.structures import ModelOutput, Target

COUNTS = [3, 0, 2]


class Proposals:
    """Predictions of one layer with other queries than the decoder's, which are matched."""

    def __init__(self, logits: Tensor, boxes: Tensor) -> None:
        self.logits, self.boxes = logits, boxes

    def normalisers(self, counts: Sequence[int], class_loss: ClassLoss) -> tuple[float, float]:
        return float(sum(counts)), class_loss.normaliser(counts, self.logits.shape[1])

    def predictions(self, outputs: ModelOutput, targets: Sequence[Target]) -> PredictionSet:
        flat = flatten_targets(targets, self.logits.device)
        return PredictionSet(("_enc",), self.logits[None], self.boxes[None], flat)


class Given(Proposals):
    """The same with pairs that are known: query ``i`` of an image is to find its box ``i``."""

    def predictions(self, outputs: ModelOutput, targets: Sequence[Target]) -> PredictionSet:
        flat = flatten_targets(targets, self.logits.device)
        queries = torch.cat([torch.arange(count) for count in flat.counts])
        pairs = Matches(flat.images, queries[None], torch.arange(len(queries))[None])
        return PredictionSet(("_dn",), self.logits[None], self.boxes[None], flat, pairs)


def criterion_of(*more: Proposals) -> SetCriterion:
    class_loss = SoftmaxLoss(NUM_CLASSES)
    matcher = HungarianMatcher(class_loss=class_loss)
    return SetCriterion(class_loss, matcher, [DecoderLayers(5), *more])


def other_predictions(num_queries: int = 9) -> tuple[Tensor, Tensor]:
    outputs, _ = random_case(COUNTS, num_queries=num_queries, num_layers=1, seed=7)
    return outputs["pred_logits"], outputs["pred_boxes"]


def test_each_set_is_measured_as_a_model_output_of_its_own() -> None:
    outputs, targets = random_case(COUNTS, num_layers=3)
    logits, boxes = other_predictions()
    alone = build_criterion(LossConfig(), NUM_CLASSES)
    decoder, proposals = alone(outputs, targets), alone(ModelOutput(pred_logits=logits, pred_boxes=boxes), targets)
    together = criterion_of(Proposals(logits, boxes))
    losses = together(outputs, targets)
    assert losses.keys() == decoder.keys() | {f"{name}_enc" for name in proposals}
    for name, value in decoder.items():
        assert torch.equal(losses[name], value)
    for name, value in proposals.items():
        assert torch.equal(losses[f"{name}_enc"], value)
    alone(outputs, targets)
    expected = alone.total(decoder) + sum(
        weight * proposals[name] for name, weight in (("loss_ce", 1), ("loss_bbox", 5), ("loss_giou", 2))
    )
    torch.testing.assert_close(together.total(losses), expected)
    assert together.weights["loss_bbox_enc"] == 5


def test_pairs_that_are_given_are_not_matched() -> None:
    outputs, targets = random_case(COUNTS)
    logits, boxes = other_predictions()
    exact = boxes.detach().clone()
    for image, target in enumerate(targets):
        exact[image, : len(target["boxes"])] = target["boxes"].flip(0)  # the matcher would pair them the other way
    losses = criterion_of(Given(logits, exact))(outputs, targets)
    distance = sum((target["boxes"] - target["boxes"].flip(0)).abs().sum() for target in targets)
    torch.testing.assert_close(losses["loss_bbox_dn"], distance / sum(COUNTS))


def test_normalisers_are_two_for_each_set_and_each_set_uses_its_own() -> None:
    outputs, targets = random_case(COUNTS)
    criterion = criterion_of(Proposals(*other_predictions()))
    own = criterion.normalisers(COUNTS)
    assert own == (5.0, 5 + 0.1 * 10, 5.0, pytest.approx(5 + 0.1 * 22))
    losses, doubled = (
        criterion(outputs, targets, own),
        criterion(outputs, targets, (*own[:2], *(2 * n for n in own[2:]))),
    )
    assert torch.equal(losses["loss_ce"], doubled["loss_ce"])
    torch.testing.assert_close(losses["loss_ce_enc"], 2 * doubled["loss_ce_enc"])
    torch.testing.assert_close(losses["loss_giou_enc"], 2 * doubled["loss_giou_enc"])


def test_the_host_is_waited_for_once_for_all_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, targets = random_case(COUNTS)
    criterion = criterion_of(Proposals(*other_predictions()), Given(*other_predictions()))
    copies = []
    copy = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: copies.append(self.numel()) or copy(self))
    criterion(outputs, targets)
    assert len(copies) == 1


@pytest.mark.parametrize("source", [Proposals, Given])
def test_predictions_that_are_not_finite_are_found_in_every_set(source: type[Proposals]) -> None:
    outputs, targets = random_case(COUNTS)
    logits, boxes = other_predictions()
    logits = logits.detach().clone()
    logits[1, 0, 0] = float("nan")  # of the image without boxes
    with pytest.raises(NonFiniteOutputs, match="logits are not finite for image"):
        criterion_of(source(logits, boxes))(outputs, targets)
