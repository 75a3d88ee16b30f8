"""Which cells propose, and which of them become queries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detr_ray.model.proposals import best_cells, cell_anchors
from detr_ray.model.pyramid import Pyramid, valid_ratios


def pyramid(mask: Tensor) -> Pyramid:
    """One map with this padding ``[1, h, w]``."""
    cells = torch.zeros(1, mask[0].numel(), 4)
    padding = mask if bool(mask.any()) else None
    sizes = ((mask.shape[1], mask.shape[2]),)
    ratios = valid_ratios([padding], cells.device)
    return Pyramid(cells, cells, None if padding is None else padding.flatten(1), sizes, ratios)


@pytest.mark.parametrize(("rows", "padded_rows"), [(7, 51), (50, 51), (50, 53), (50, 60), (150, 156)])
def test_padding_does_not_change_which_cells_propose(rows: int, padded_rows: int) -> None:
    """With 50 or 150 rows the middle of one lies at 0.01, where proposals begin: a short side of 800 pixels has 50."""
    mask = torch.ones(1, padded_rows, 4, dtype=torch.bool)
    mask[:, :rows, :3] = False
    expected_anchors, expected = cell_anchors(pyramid(torch.zeros(1, rows, 3, dtype=torch.bool)))
    anchors, is_usable = cell_anchors(pyramid(mask))
    found = is_usable.view(padded_rows, 4)
    assert torch.equal(found[:rows, :3].flatten(), expected[0]) and not found[rows:].any() and not found[:, 3:].any()
    assert torch.equal(anchors.view(padded_rows, 4, 4)[:rows, :3].flatten(0, 1), expected_anchors[0])


def test_cells_at_the_very_border_and_those_too_large_do_not_propose() -> None:
    """At 0.01 itself they do not, as published."""
    _, is_usable = cell_anchors(pyramid(torch.zeros(1, 50, 3, dtype=torch.bool)))
    assert is_usable.view(50, 3).all(1).tolist() == [False] + [True] * 48 + [False]
    sizes = ((1, 1),) * 6
    cells = torch.zeros(1, 6, 4)
    anchors, is_usable = cell_anchors(Pyramid(cells, cells, None, sizes, torch.ones(1, 6, 2)))
    assert is_usable[0].tolist() == [True] * 5 + [False], "1.6 times the image"
    torch.testing.assert_close(anchors[0, :5, 2].sigmoid(), torch.tensor([0.05, 0.1, 0.2, 0.4, 0.8]))


def test_the_best_cells_serve_again_where_there_are_too_few() -> None:
    scores = torch.tensor([[1.0, 9.0, 3.0, 5.0], [1.0, 2.0, 3.0, 4.0]])
    is_usable = torch.tensor([[True, False, True, True], [False] * 4])
    chosen = best_cells(scores, is_usable, 5)
    assert chosen[0].tolist() == [3, 2, 0, 3, 2]
    assert len(chosen[1].unique()) == 1, "no cell may be chosen: one of them serves for all queries"
