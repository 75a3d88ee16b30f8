from __future__ import annotations

import pytest
import torch
from cases import NUM_CLASSES, random_case
from plain_criterion import cheapest, pair_costs

from detr_ray.loss import HungarianMatcher
from detr_ray.schedules import Curve


def pairs_of(match: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[int, int]]:
    return list(zip(match[0].tolist(), match[1].tolist(), strict=True))


@pytest.mark.parametrize("weights", [(1, 5, 2), (1, 0, 0), (0, 1, 0), (0, 0, 1), (3.5, 0.5, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_matches_are_the_cheapest_of_all_assignments(weights: tuple[float, float, float], seed: int) -> None:
    outputs, targets = random_case([3, 0, 6, 8, 1], num_queries=6, num_layers=1, seed=seed)
    found = HungarianMatcher(*weights)(outputs, targets)
    for image, target in enumerate(targets):
        pairs = pairs_of(found[image])
        assert len(pairs) == len({query for query, _ in pairs}) == len({box for _, box in pairs})
        assert len(pairs) == min(len(target["labels"]), 6)
        if pairs:
            costs = pair_costs(outputs["pred_logits"][image], outputs["pred_boxes"][image], target, weights).detach()
            # Sums are compared, not pairs: equal labels make equal costs where only the class counts.
            found_cost, least_cost = (sum(costs[pair].item() for pair in chosen) for chosen in (pairs, cheapest(costs)))
            assert found_cost == pytest.approx(least_cost, rel=1e-6)


def test_indices_are_int64_on_the_host_with_queries_ascending() -> None:
    outputs, targets = random_case([4, 9, 0], num_queries=7)
    for (queries, boxes), count in zip(HungarianMatcher()(outputs, targets), (4, 7, 0), strict=True):
        assert queries.dtype == boxes.dtype == torch.int64
        assert queries.device.type == boxes.device.type == "cpu"
        assert queries.tolist() == sorted(set(queries.tolist()))
        assert len(set(boxes.tolist())) == len(boxes) == count


def test_a_match_depends_on_its_own_image_only() -> None:
    outputs, targets = random_case([3, 5, 2], num_queries=8, num_layers=1)
    together = HungarianMatcher()(outputs, targets)
    for image in range(3):
        alone = {key: value[image : image + 1] for key, value in outputs.items()}
        assert pairs_of(HungarianMatcher()(alone, targets[image : image + 1])[0]) == pairs_of(together[image])


def test_only_the_last_layer_is_matched() -> None:
    outputs, targets = random_case([3, 4], num_queries=6)
    last = {key: outputs[key] for key in ("pred_logits", "pred_boxes")}
    whole = HungarianMatcher()(outputs, targets)
    assert [pairs_of(match) for match in whole] == [pairs_of(match) for match in HungarianMatcher()(last, targets)]


def test_a_perfect_prediction_is_matched_to_its_box() -> None:
    outputs, targets = random_case([4], num_queries=6, num_layers=1)
    order = torch.tensor([5, 0, 3, 2])
    with torch.no_grad():
        outputs["pred_boxes"][0, order] = targets[0]["boxes"]
        outputs["pred_logits"][0, order] = 9.0 * torch.eye(NUM_CLASSES + 1)[targets[0]["labels"]]
    assert sorted(pairs_of(HungarianMatcher()(outputs, targets)[0])) == [(0, 1), (2, 3), (3, 2), (5, 0)]


def test_half_precision_predictions_are_matched_in_float32() -> None:
    # Two boxes 1e-4 apart, far below what bf16 arithmetic resolves at a cost of about 2.
    boxes = torch.tensor([[0.5, 0.5, 0.25, 0.25], [0.75, 0.5, 0.25, 0.25]], dtype=torch.bfloat16)[None]
    logits = torch.zeros(1, 2, NUM_CLASSES + 1, dtype=torch.bfloat16)
    targets = [{"labels": torch.tensor([0]), "boxes": torch.tensor([[0.62505, 0.5, 0.25, 0.25]])}]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pairs_of(HungarianMatcher()({"pred_logits": logits, "pred_boxes": boxes}, targets)[0]) == [(1, 0)]
        targets[0]["boxes"][0, 0] = 0.62495
        assert pairs_of(HungarianMatcher()({"pred_logits": logits, "pred_boxes": boxes}, targets)[0]) == [(0, 0)]


def test_scheduled_costs_change_the_matching() -> None:
    near = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]])[None]
    logits = torch.zeros(1, 2, NUM_CLASSES + 1)
    logits[0, 1, 4] = 10.0  # the query that is far off knows the class
    targets = [{"labels": torch.tensor([4]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2]])}]
    outputs = {"pred_logits": logits, "pred_boxes": near}
    matcher = HungarianMatcher(cost_class=Curve(((0.0, 1.0), (10.0, 21.0))), cost_bbox=5, cost_giou=2)
    assert pairs_of(matcher(outputs, targets)[0]) == [(0, 0)]
    matcher.at_epoch(5.0)
    assert matcher.cost_class == pytest.approx(11.0)
    assert pairs_of(matcher(outputs, targets)[0]) == [(1, 0)]


def test_corners_of_half_precision_boxes_are_computed_in_float32() -> None:
    outputs, targets = random_case([40] * 3, num_queries=60, num_layers=1, seed=5)
    half = {key: value.bfloat16() for key, value in outputs.items()}
    widened = {key: value.float() for key, value in half.items()}
    matcher = HungarianMatcher(cost_class=0, cost_bbox=0, cost_giou=1)
    found, expected = matcher(half, targets), matcher(widened, targets)
    assert [pairs_of(match) for match in found] == [pairs_of(match) for match in expected]
