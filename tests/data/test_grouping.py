"""Images of like shape are brought together."""

from __future__ import annotations

import numpy as np
import pytest

from detr_ray.data.grouping import order_by_shape


@pytest.mark.parametrize(("count", "group"), [(0, 4), (1, 1), (4, 4), (12, 4), (60, 5), (7, 7), (64, 1), (1000, 8)])
def test_order_by_shape_is_a_permutation(count, group):
    sizes = np.random.default_rng(count).integers(1, 1333, (count, 2)).astype(np.int32)
    order = order_by_shape(sizes, group)
    assert sorted(order.tolist()) == list(range(count))


def test_order_by_shape_finds_groups_that_need_no_padding():
    shapes = np.array([[480, 640], [640, 480], [800, 800], [480, 800]])
    sizes = np.repeat(shapes, 4, axis=0)[np.random.default_rng(0).permutation(16)]
    groups = sizes[order_by_shape(sizes, 4)].reshape(4, 4, 2)
    assert (groups == groups[:, :1]).all()


@pytest.mark.parametrize("group", [1, 3, 8])
def test_order_by_shape_cuts_like_the_rule_says(group):
    """The same halving, written as a recursion over one segment at a time."""
    rng = np.random.default_rng(group)
    sizes = rng.integers(100, 1000, (group * 13, 2))

    def halve(rows: np.ndarray) -> list[int]:
        if len(rows) == 1:
            return rows.tolist()
        left = len(rows) // group // 2 * group if len(rows) > group else len(rows) // 2
        heights, widths = sizes[rows].T
        cuts = []
        for measure in (heights, widths, heights / widths, heights * widths):
            ordered = rows[np.argsort(measure, kind="stable")]
            parts = (sizes[ordered[:left]], sizes[ordered[left:]])
            cuts.append((sum(len(part) * part[:, 0].max() * part[:, 1].max() for part in parts), ordered))
        _, ordered = min(cuts, key=lambda cut: cut[0])
        return halve(ordered[:left]) + halve(ordered[left:])

    # Equal measures may be ordered either way: what counts is the padded area of every group.
    def areas(order) -> list[int]:
        groups = sizes[np.array(order)].reshape(-1, group, 2)
        return groups.max(axis=1).prod(axis=1).tolist()

    assert areas(order_by_shape(sizes, group)) == areas(halve(np.arange(len(sizes))))
