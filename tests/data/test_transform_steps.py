"""What single steps do to pixels and boxes; torchvision's v2 functionals are the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from detr_ray.data.sample import Crop, Flip, Instances, Margin, Picture, Place
from detr_ray.data.transforms.colour import (
    BlurPixels,
    ChangeColours,
    CompressJpeg,
    MakeGrey,
)
from detr_ray.data.transforms.colour_arithmetic import change_colours
from detr_ray.data.transforms.cutout import Cover
from detr_ray.data.transforms.geometry import (
    Turn,
)
from detr_ray.data.transforms.several import Blend, Tile


@pytest.fixture
def noise() -> Picture:
    pixels = torch.randint(0, 256, (37, 52, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    boxes = np.array([[3, 4, 20.5, 30], [0, 0, 52, 37]], np.float32)
    return Picture(pixels, Instances(boxes, np.array([1, 2]), (37, 52)))


def _chw(picture: Picture) -> torch.Tensor:
    return picture.pixels.permute(2, 0, 1)


def same(picture: Picture, expected: torch.Tensor) -> bool:
    return torch.equal(_chw(picture), expected)


@pytest.mark.parametrize(
    ("factors", "most"),
    [
        ((1.2, 1.0, 1.0, 0.0), 0.51),
        ((0.3, 1.0, 1.0, 0.0), 0.51),
        ((1.0, 0.7, 1.0, 0.0), 0.51),
        ((1.0, 1.8, 1.0, 0.0), 0.51),
        ((1.0, 1.0, 1.4, 0.0), 0.51),
        ((1.0, 1.0, 0.0, 0.0), 0.51),
        ((1.0, 1.0, 1.0, 0.1), 0.51),
        ((1.0, 1.0, 1.0, -0.5), 0.51),
        ((1.0, 1.0, 1.0, 0.31), 0.51),
        ((1.2, 0.7, 1.4, -0.04), 3.0),  # levels are rounded after the second
        ((0.9, 1.5, 0.5, 0.05), 3.0),
    ],
)
def test_colours_are_changed_as_torchvision_does(noise: Picture, factors: tuple[float, ...], most: float) -> None:
    """Held to its functionals of float images: those of bytes cut off after each step."""
    before = noise.pixels.clone()
    grey = before[:, :, :1].repeat(1, 1, 3)
    for pixels in (before, grey, before.flip(1)[:, ::2], torch.full((2, 2, 3), 255, dtype=torch.uint8)):
        expected = pixels.permute(2, 0, 1) / 255
        for change, factor in zip(
            (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue),
            factors, strict=True,
        ):  # fmt: skip
            expected = change(expected, factor)
        changed = ChangeColours(*factors, None).apply(Picture(pixels, noise.instances), ())
        assert (_chw(changed).float() - 255 * expected).abs().max() <= most
    assert torch.equal(noise.pixels, before), "a step writes into no picture that it is given"


def test_channels_change_places_as_torchvision_does(noise: Picture) -> None:
    expected = reference.permute_channels(_chw(noise), [2, 0, 1])
    assert same(ChangeColours(1.0, 1.0, 1.0, 0.0, (2, 0, 1)).apply(noise, ()), expected)
    assert same(ChangeColours(1.0, 1.0, 1.0, 0.0, None).apply(noise, ()), _chw(noise))


def test_large_images_are_changed_block_by_block() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (300, 250, 3), dtype=np.uint8)
    whole = change_colours(pixels, 1.0, 1.0, 1.3, 0.1)
    rows = [change_colours(pixels[row : row + 1], 1.0, 1.0, 1.3, 0.1) for row in range(300)]
    np.testing.assert_array_equal(whole, np.concatenate(rows))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torchvision's JPEG encoder
def test_grey_blur_and_jpeg_are_those_of_torchvision(noise: Picture) -> None:
    before = _chw(noise)
    assert same(MakeGrey().apply(noise, ()), reference.rgb_to_grayscale(before, 3))
    for sigma, reach in ((0.3, 1), (1.0, 3), (1.7, 6)):
        expected = reference.gaussian_blur(before, [2 * reach + 1] * 2, [sigma])
        assert same(BlurPixels(sigma).apply(noise, ()), expected)
    thread = Picture(noise.pixels[:2], Instances(np.zeros((0, 4), np.float32), np.zeros(0, int), (2, 52)))
    assert BlurPixels(2.0).apply(thread, ()).pixels.shape == (2, 52, 3), "a kernel must not reach beyond the picture"
    for quality in (1, 60, 100):
        assert same(CompressJpeg(quality).apply(noise, ()), reference.jpeg(before.contiguous(), quality))


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_right_angles_are_those_of_torchvision(noise: Picture, quarters: int) -> None:
    turned = Turn(quarters).apply(noise, ())
    assert same(turned, reference.rotate(_chw(noise), 90 * quarters, expand=True))
    boxes = tv_tensors.BoundingBoxes(noise.instances.boxes_xyxy_px, format="XYXY", canvas_size=(37, 52))
    expected = reference.rotate(boxes, 90 * quarters, expand=True)
    np.testing.assert_allclose(turned.instances.boxes_xyxy_px, expected.numpy(), atol=1e-3)
    assert turned.instances.size == expected.canvas_size == tuple(turned.pixels.shape[:2])


def test_a_canvas_is_that_of_torchvision(noise: Picture) -> None:
    placed = Place((37, 52), Margin((60, 90), 7, 20, 114)).apply(noise, ())
    assert same(placed, reference.pad(_chw(noise), [20, 7, 90 - 52 - 20, 60 - 37 - 7], fill=114))
    boxes = tv_tensors.BoundingBoxes(noise.instances.boxes_xyxy_px, format="XYXY", canvas_size=(37, 52))
    expected = reference.pad(boxes, [20, 7, 18, 16])
    np.testing.assert_array_equal(placed.instances.boxes_xyxy_px, expected.numpy())


def filled(picture: Picture) -> Picture:
    """The same with its canvas made."""
    return Picture(picture.pixels, picture.instances)


def test_what_is_done_to_a_canvas_is_done_without_making_it(noise: Picture) -> None:
    placed = Place((37, 52), Margin((120, 150), 30, 64, 9)).apply(noise, ())
    for step in (Flip(0), Flip(1), Crop(20, 60, 40, 30), Crop(50, 0, 60, 150), Crop(0, 0, 120, 100), Crop(0, 0, 9, 9)):
        fast, slow = step.apply(placed, ()), step.apply(filled(placed), ())
        assert torch.equal(fast.pixels, slow.pixels)
        np.testing.assert_array_equal(fast.instances.boxes_xyxy_px, slow.instances.boxes_xyxy_px)
        assert fast.instances.size == slow.instances.size and fast.inner.numel() <= max(noise.pixels.numel(), 3 * 9 * 9)


@pytest.mark.parametrize("size", [(90, 113), (300, 301), (7, 9), (120, 150)])
def test_a_canvas_is_resized_by_what_is_on_it(noise: Picture, size: tuple[int, int]) -> None:
    """What is on it lies on whole pixels then, and boxes are where it lies."""
    placed = Place((37, 52), Margin((120, 150), 30, 64, 0)).apply(noise, ())
    fast, slow = placed.resize(size), filled(placed).resize(size)
    np.testing.assert_allclose(fast.instances.boxes_xyxy_px, slow.instances.boxes_xyxy_px, atol=0.51)
    assert fast.instances.size == size == tuple(fast.pixels.shape[:2]) and fast.margin is not None
    height, width = fast.inner.shape[:2]
    corner = (fast.margin.left, fast.margin.top)
    np.testing.assert_allclose(
        fast.instances.boxes_xyxy_px[1], [*corner, corner[0] + width, corner[1] + height], atol=1e-3
    )
    assert (fast.pixels.float() - slow.pixels.float()).abs().mean() < 6


def test_blending_is_mixup(noise: Picture) -> None:
    """torchvision's mixup blends images in floats."""
    other = noise.pixels.flip(0)
    instances = Instances(np.zeros((0, 4), np.float32), np.zeros(0, int), (37, 52))
    mixed = Blend(0.3, 0, 0).apply(noise, [Picture(other, instances)])
    pair = torch.stack([_chw(noise), other.permute(2, 0, 1)]).float()
    mixup = v2.MixUp(num_classes=2)
    expected = mixup.transform(pair, {"lam": 0.3, "labels": None, "batch_size": 2})[0]
    assert (_chw(mixed).float() - expected).abs().max() <= 0.5001


def test_four_pictures_fill_a_canvas() -> None:
    def plain(value: int, height: int, width: int) -> Picture:
        boxes = np.array([[0, 0, width, height]], np.float32)
        return Picture(
            torch.full((height, width, 3), value, dtype=torch.uint8),
            Instances(boxes, np.array([value]), (height, width)),
        )

    pictures = [plain(1, 3, 4), plain(2, 3, 6), plain(3, 5, 4), plain(4, 5, 6)]
    tiled = Tile((8, 10)).apply(pictures[0], pictures[1:])
    assert tiled.pixels[..., 0].unique().tolist() == [1, 2, 3, 4] and tiled.instances.labels.tolist() == [1, 2, 3, 4]
    for value, (left, top, right, bottom) in zip((1, 2, 3, 4), tiled.instances.boxes_xyxy_px.astype(int), strict=True):
        assert (tiled.pixels[top:bottom, left:right] == value).all() and (tiled.pixels[..., 0] == value).sum() == (
            right - left
        ) * (bottom - top)


def test_covering_writes_into_no_other_picture(noise: Picture) -> None:
    before = noise.pixels.clone()
    covered = Cover(((2, 3, 10, 20), (30, 40, 7, 12)), 9, 0.0).apply(noise, ())
    assert torch.equal(noise.pixels, before)
    is_changed = (covered.pixels == 9).all(dim=2)
    assert is_changed[2:12, 3:23].all() and is_changed[30:, 40:].all() and is_changed.sum() < 10 * 20 + 7 * 12 + 20
