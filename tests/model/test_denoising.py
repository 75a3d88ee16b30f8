"""Denoising queries: the published noise, who sees whom, and of what the random numbers are a function."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from family_goldens import load_family_golden

from detr_ray.model.denoising import Noise, allowed_pairs, draw_noise, groups_for, noised
from detr_ray.model.dino import EPS
from detr_ray.structures import StepInfo, Target

INFO = StepInfo(seed=3, step=7, most_boxes=4)


def test_recorded_draws_give_the_recorded_queries(shared_data: Path) -> None:
    """Upstream draws for all boxes of the batch together, copy by copy: positives and negatives in turns."""
    golden = load_family_golden(shared_data, "dino_4scale")
    arrays, settings = golden.arrays, golden.settings
    counts = [len(target["labels"]) for target in golden.targets]
    groups = groups_for(settings["dn_number"], max(counts))
    assert groups == int(arrays["dn/groups"])

    replaced = arrays["dn/draw_keep_label"] < settings["dn_label_noise_ratio"] / 2
    new_labels = torch.full(replaced.shape, -1)
    new_labels[replaced] = arrays["dn/draw_new_label"]
    sizes = arrays["dn/draw_part"].view(groups, 2, sum(counts), 4).clone()
    sizes[:, 1] += 1
    shifts = sizes * (arrays["dn/draw_sign"].view(sizes.shape) * 2 - 1)
    noise = Noise(
        np.full((3, groups, 2, max(counts)), -1, np.int64), np.zeros((3, groups, 2, max(counts), 4), np.float32)
    )
    first = 0
    for image, count in enumerate(counts):
        here = slice(first, first + count)
        noise.new_labels[image, ..., :count] = new_labels.view(groups, 2, -1)[:, :, here]
        noise.shifts[image, ..., :count, :] = shifts[:, :, here]
        first += count

    queries = noised(golden.targets, noise, settings["dn_box_noise_scale"], EPS)
    assert torch.equal(queries.labels, arrays["dn/labels"])
    torch.testing.assert_close(queries.reference_logits, arrays["dn/reference_logits"], rtol=0, atol=1e-4)
    hidden = ~allowed_pairs(queries.labels.shape[1], groups, settings["num_queries"], torch.device("cpu"))
    assert torch.equal(hidden, arrays["dn/attn_mask"])


@pytest.mark.parametrize(
    ("queries", "most", "groups"), [(100, 7, 14), (100, 100, 1), (100, 300, 1), (100, 0, 1), (1, 1, 1), (3, 2, 1)]
)
def test_groups_make_about_so_many_queries(queries: int, most: int, groups: int) -> None:
    assert groups_for(queries, most) == groups


def test_the_noise_of_an_image_depends_on_seed_step_and_place_alone() -> None:
    both = draw_noise([8, 9], [2, 4], INFO, 3, 50, 1.0)
    alone = draw_noise([9], [4], INFO, 3, 50, 1.0)
    for part, of_one in zip(both, alone, strict=True):
        assert np.array_equal(part[1], of_one[0]) and not np.array_equal(part[0], part[1])
    for other in (INFO._replace(seed=4), INFO._replace(step=8)):
        assert not np.array_equal(draw_noise([9], [4], other, 3, 50, 1.0).shifts, alone.shifts)


def test_noise_is_as_large_as_it_is_said_to_be() -> None:
    info = StepInfo(seed=0, step=0, most_boxes=40)
    noise = draw_noise([5], [40], info, 30, 1000, 0.5)
    near, far = np.abs(noise.shifts[0, :, 0]), np.abs(noise.shifts[0, :, 1])
    assert 0 <= near.min() < 0.01 and 0.99 < near.max() < 1 and 1 <= far.min() < 1.01 and 1.99 < far.max() <= 2
    assert abs((noise.shifts > 0).mean() - 0.5) < 0.02
    replaced = noise.new_labels >= 0
    assert abs(replaced.mean() - 0.25) < 0.02, "half of the share"
    assert set(np.unique(noise.new_labels[replaced] // 250)) == {0, 1, 2, 3}
    assert not (draw_noise([5], [40], info, 3, 1000, 0).new_labels >= 0).any()


def test_boxes_move_by_halves_of_their_own_sides() -> None:
    target = Target(labels=torch.tensor([3]), boxes=torch.tensor([[0.5, 0.4, 0.2, 0.1]]))
    info = StepInfo(seed=0, step=0, most_boxes=2)
    noise = draw_noise([0], [1], info, 1, 9, 0)
    noise.shifts[0, 0, 0, 0] = (1, -1, 0.5, 0)
    queries = noised([target], noise, 0.5, EPS)
    assert queries.labels.tolist() == [[3, -1, 3, -1]]
    box = queries.reference_logits[0, 0].sigmoid()  # left 0.45, top 0.325, right 0.625, bottom 0.45
    torch.testing.assert_close(box, torch.tensor([0.5375, 0.3875, 0.175, 0.125]))
    assert not queries.reference_logits[0, 1].any(), "a place without a box"
    unmoved = noised([target], noise, 0, EPS).reference_logits[0, 0].sigmoid()
    torch.testing.assert_close(unmoved, target["boxes"][0])


def test_the_other_queries_see_no_denoising_query() -> None:
    allowed = allowed_pairs(denoising=4, groups=2, others=3, device=torch.device("cpu"))
    expected = ["1100111", "1100111", "0011111", "0011111", "0000111", "0000111", "0000111"]
    assert ["".join(map(str, row)) for row in allowed.int().tolist()] == expected
    assert allowed_pairs(0, 1, 3, torch.device("cpu")) is None
