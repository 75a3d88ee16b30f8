from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.ops as ops
from torch import Tensor

from detr_ray import box_arrays
from detr_ray.boxes import area, cxcywh_to_xyxy, generalized_iou, iou


def corner_boxes(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.rand(2, *shape, 2, generator=generator) * scale
    return torch.cat((torch.minimum(first, second), torch.maximum(first, second)), dim=-1)


def overlaps_by_hand(a: list[float], b: list[float]) -> tuple[float, float]:
    """IoU and GIoU of two boxes, from intervals on each axis."""
    shared, hull = 1.0, 1.0
    for axis in (0, 1):
        shared *= max(min(a[axis + 2], b[axis + 2]) - max(a[axis], b[axis]), 0.0)
        hull *= max(a[axis + 2], b[axis + 2]) - min(a[axis], b[axis])
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union, shared / union - (hull - union) / hull


def test_formats_by_hand() -> None:
    corners = torch.tensor([[10.0, 20.0, 40.0, 100.0], [0.0, 0.0, 1.0, 1.0]])
    centres = torch.tensor([[25.0, 60.0, 30.0, 80.0], [0.5, 0.5, 1.0, 1.0]])
    assert torch.equal(cxcywh_to_xyxy(centres), corners)


@pytest.mark.parametrize("shape", [(0,), (7,), (2, 3), (2, 0, 5)], ids=str)
def test_corners_are_those_of_torchvision(shape: tuple[int, ...]) -> None:
    centres = corner_boxes(*shape, seed=1, scale=640.0)
    expected = ops.box_convert(centres.view(-1, 4), "cxcywh", "xyxy").view(centres.shape)
    torch.testing.assert_close(cxcywh_to_xyxy(centres), expected)


def test_area_is_zero_for_boxes_inside_out() -> None:
    corners = torch.tensor([[1.0, 2.0, 4.0, 6.0], [4.0, 2.0, 1.0, 6.0], [4.0, 6.0, 1.0, 2.0], [3.0, 3.0, 3.0, 9.0]])
    assert area(corners).tolist() == [12.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("scale", [1.0, 1333.0])
def test_all_pairs_equal_loops_and_torchvision(scale: float) -> None:
    a, b = corner_boxes(9, seed=2, scale=scale), corner_boxes(6, seed=3, scale=scale)
    found_iou, found_giou = iou(a[:, None], b[None]), generalized_iou(a[:, None], b[None])
    by_hand = torch.tensor([[overlaps_by_hand(x, y) for y in b.tolist()] for x in a.tolist()])
    torch.testing.assert_close(found_iou, by_hand[..., 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_giou, by_hand[..., 1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_iou, ops.box_iou(a, b))
    torch.testing.assert_close(found_giou, ops.generalized_box_iou(a, b))
    assert (found_iou > 0).any()
    assert (found_giou < 0).any()


def test_row_by_row_is_the_diagonal_of_all_pairs() -> None:
    a, b = corner_boxes(2, 5, seed=4), corner_boxes(2, 5, seed=5)
    for overlap in (iou, generalized_iou):
        pairs = overlap(a[:, :, None], b[:, None])
        assert pairs.shape == (2, 5, 5)
        torch.testing.assert_close(overlap(a, b), pairs.diagonal(dim1=1, dim2=2))


def test_the_same_box_and_boxes_far_apart() -> None:
    box = torch.tensor([0.1, 0.2, 0.3, 0.5])
    assert iou(box, box) == pytest.approx(1.0)
    assert generalized_iou(box, box) == pytest.approx(1.0)
    far = torch.tensor([[0.0, 0.0, 1.0, 1.0], [999.0, 999.0, 1000.0, 1000.0]])
    assert iou(far[0], far[1]) == 0
    assert generalized_iou(far[0], far[1]) == pytest.approx(-1.0, abs=1e-5)
    touching = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 2.0, 1.0]])
    assert generalized_iou(touching[0], touching[1]) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]),
        ([0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.2, 0.2]),
        ([0.5, 0.1, 0.5, 0.9], [0.5, 0.1, 0.5, 0.9]),
        ([0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.9, 0.9]),
        ([0.6, 0.6, 0.4, 0.4], [0.1, 0.1, 0.9, 0.9]),
    ],
)
def test_boxes_without_area_give_finite_values_and_gradients(a: list[float], b: list[float]) -> None:
    first, second = torch.tensor(a, requires_grad=True), torch.tensor(b, requires_grad=True)
    for overlap in (iou, generalized_iou):
        value = overlap(first, second)
        assert value.isfinite()
        assert -1 <= value <= 1
        for gradient in torch.autograd.grad(value, (first, second)):
            assert gradient.isfinite().all()
    assert iou(first, second) == 0


def test_no_boxes_at_all() -> None:
    a, b = torch.zeros(0, 4), corner_boxes(3, seed=6)
    assert iou(a[:, None], b[None]).shape == (0, 3)
    assert generalized_iou(a[:, None], b[None]).shape == (0, 3)


def test_the_gradient_of_generalized_iou_is_that_of_finite_differences() -> None:
    a, b = corner_boxes(4, seed=7).double(), corner_boxes(4, seed=8).double()
    assert torch.autograd.gradcheck(generalized_iou, (a.requires_grad_(), b.requires_grad_()))


def test_arrays_are_converted_as_tensors_are() -> None:
    boxes_cxcywh = np.random.default_rng(0).random((20, 4))
    corners = box_arrays.cxcywh_to_xyxy(boxes_cxcywh)
    np.testing.assert_allclose(corners, cxcywh_to_xyxy(torch.from_numpy(boxes_cxcywh)).numpy(), rtol=1e-12)
    assert box_arrays.xywh_to_xyxy(np.array([[1, 2, 30, 40]])).tolist() == [[1, 2, 31, 42]]
    assert box_arrays.xyxy_to_xywh(np.array([[1, 2, 31, 42]])).tolist() == [[1, 2, 30, 40]]
    assert box_arrays.xyxy_to_xywh(np.zeros((0, 4))).shape == (0, 4)
