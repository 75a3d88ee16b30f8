"""What is drawn, and what that does to pixels and boxes: the published code's rules, and its golden values."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from defaults import augmentation
from PIL import Image
from torchvision.transforms.v2 import functional as reference

from detr_ray.data.augmentation import LONGEST_UNCUT_PX, DetrAugmentation, Draws, share_draws
from detr_ray.data.formats.coco import read_coco_index
from detr_ray.data.label_map import LabelMap
from detr_ray.data.sample import Crop, Flip, Instances, Picture, Resize, SamplePlan, resized_sizes

DRAWS = DetrAugmentation.draws_per_sample


def plan(size, flip=False, resize=None, crop=None) -> SamplePlan:
    steps = [*([Flip(1)] if flip else []), *([Resize(resize), Crop(*crop)] if resize and crop else [])]
    return SamplePlan(position=0, index=0, image_id=1, size=size, steps=tuple(steps))


def applied(image: torch.Tensor, plan: SamplePlan, boxes=(), labels=None) -> tuple[torch.Tensor, Instances]:
    """``[3, H, W]`` pixels and the objects after a plan."""
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    labels = np.arange(len(boxes)) if labels is None else labels
    picture = plan.apply(Picture(image.permute(1, 2, 0), Instances(boxes, labels, tuple(image.shape[1:]))))
    return picture.pixels.permute(2, 0, 1), picture.instances


def random_sizes(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1500, (count, 2))


@pytest.mark.parametrize(
    ("size", "short", "max_size", "expected"),
    [
        ((480, 640), 736, 1333, (736, 981)),  # the seed's golden image
        ((480, 640), 800, 1333, (800, 1066)),
        ((640, 480), 800, 1333, (1066, 800)),
        ((480, 640), 480, 1333, (480, 640)),  # the short side has that length already
        ((427, 640), 800, 1333, (800, 1199)),
        ((300, 640), 800, 1333, (625, 1333)),  # the long side rules: 1333 * 300 / 640 = 624.8
        ((300, 640), 800, None, (800, 1706)),
        ((500, 500), 608, 1333, (608, 608)),
        ((2, 5), 3, 5, (2, 5)),
        ((1, 5000), 800, 1333, (1, 5000)),  # a short side of 0.27 is rounded to 0, and kept at 1
    ],
)
def test_resized_size(size, short, max_size, expected):
    assert tuple(resized_sizes(np.array([size]), np.array(short), max_size)[0]) == expected


def test_resized_sizes_round_as_python_does():
    sizes = random_sizes(3000, 0)
    sizes = sizes[sizes.max(1) < 200 * sizes.min(1)]
    shorts = np.random.default_rng(1).choice([400, 480, 512, 736, 800], len(sizes))
    for max_size in (None, 900, 1333):
        got = resized_sizes(sizes, shorts, max_size).tolist()
        for (height, width), side, result in zip(sizes.tolist(), shorts.tolist(), got, strict=True):
            low, high = float(min(height, width)), float(max(height, width))
            if max_size is not None and high / low * side > max_size:
                side = round(max_size * low / high)
            other = int(high) if low == side else int(side * int(high) / int(low))
            assert result == ([side, other] if height <= width else [other, side])


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, Draws]:
    rng = np.random.default_rng(3)
    sizes = np.tile([[480, 640], [640, 427], [50, 1000], [1, 1]], (5000, 1))
    return sizes, augmentation().draw(sizes, rng.random((len(sizes), DRAWS)))


def test_draws_stay_within_the_rules(drawn):
    sizes, draws = drawn
    cut = draws.resize[:, 0] > 0
    assert (draws.crop[~cut] == 0).all()
    assert set(draws.resize[cut].min(axis=1)) == {400, 500, 600}
    top, left, height, width = draws.crop[cut].T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= draws.resize[cut, 0]).all()
    assert (left + width <= draws.resize[cut, 1]).all()
    for side, full in ((height, draws.resize[cut, 0]), (width, draws.resize[cut, 1])):
        assert side.min() >= 384
        assert side.max() == 600
        assert (side <= full).all()
    before = np.where(cut[:, None], draws.crop[:, 2:], sizes)
    scales = {tuple(sizes) for sizes in draws.size.tolist()}
    assert len(scales) > 1000
    possible = np.stack([resized_sizes(before, scale, 1333) for scale in augmentation().scales])
    assert (possible == draws.size).all(axis=2).any(axis=0).all()


def test_every_value_comes_as_often_as_it_should(drawn):
    sizes, draws = drawn
    cut = draws.resize[:, 0] > 0
    assert abs(draws.flip.mean() - 0.5) < 0.02
    assert abs(cut.mean() - 0.5) < 0.02
    squares = draws.size[(sizes == 1).all(axis=1)][:, 0]
    values, counts = np.unique(squares, return_counts=True)
    assert set(augmentation().scales) <= set(values.tolist())
    wide = draws.size[(sizes == [480, 640]).all(axis=1) & ~cut, 0]
    values, counts = np.unique(wide, return_counts=True)
    assert values.tolist() == list(augmentation().scales)
    assert counts.min() > 0.7 * counts.mean()
    heights = draws.crop[cut & (sizes == [480, 640]).all(axis=1) & (draws.resize[:, 0] == 400), 2]
    values, counts = np.unique(heights, return_counts=True)
    assert values.tolist() == list(range(384, 401))  # both ends come
    assert counts.max() < 2.5 * counts.mean()


def test_probabilities_of_nothing_and_always():
    sizes = random_sizes(500, 1)
    uniform = np.random.default_rng(2).random((500, DRAWS))
    never = augmentation(flip=0, crop=0).draw(sizes, uniform)
    assert not never.flip.any()
    assert not never.resize.any()
    always = augmentation(flip=1, crop=1).draw(sizes, uniform)
    assert always.flip.all()
    short_enough = sizes.max(axis=1) / sizes.min(axis=1) < 30
    assert always.resize[short_enough].all()


def test_images_that_are_smaller_than_the_least_crop_are_taken_whole():
    values = augmentation(crop=1.0, crop_scales=(100,), crop_min=384, crop_max=600)
    draws = values.draw(np.array([[50, 60]]), np.full((1, DRAWS), 0.99))
    assert draws.resize.tolist() == [[100, 120]]
    assert draws.crop.tolist() == [[0, 0, 100, 120]]


def test_a_thread_of_an_image_is_not_blown_up():
    draws = augmentation(crop=1.0).draw(np.array([[1, 5000], [4000, 2]]), np.zeros((2, DRAWS)))
    assert not draws.resize.any()
    assert (draws.size.max(axis=1) <= LONGEST_UNCUT_PX).all()


def test_shared_draws_change_who_draws_but_not_what():
    rng = np.random.default_rng(4)
    sizes = rng.integers(300, 700, (64, 2))
    uniform = rng.random((64, DRAWS))
    np.testing.assert_array_equal(share_draws(uniform, sizes, 1), uniform)
    shared = share_draws(uniform, sizes, 8)
    np.testing.assert_array_equal(shared[:, [0, 6, 7]], uniform[:, [0, 6, 7]])
    rows, members = np.unique(shared[:, 1:6], axis=0, return_inverse=True)
    assert len(rows) == 8
    assert {tuple(row) for row in rows} <= {tuple(row) for row in uniform[:, 1:6]}
    aspects = sizes[:, 0] / sizes[:, 1]
    spans = sorted((aspects[members == k].min(), aspects[members == k].max()) for k in range(8))
    assert all(one[1] <= other[0] for one, other in pairwise(spans))


SEED_BOXES = [
    [0.5205, 0.6888, 0.9556, 0.5955],
    [0.2635, 0.2472, 0.4989, 0.4764],
    [0.3629, 0.7329, 0.4941, 0.5106],
    [0.6606, 0.4189, 0.6789, 0.7815],
    [0.3532, 0.1326, 0.1180, 0.0969],
    [0.2269, 0.1298, 0.0907, 0.0972],
    [0.3317, 0.2269, 0.1313, 0.1469],
    [0.3571, 0.0792, 0.1481, 0.1481],
]


def test_seed_golden(coco128):
    index = read_coco_index(str(coco128 / "annotations/instances_train2017.json"), str(coco128 / "train2017"))
    row = int(np.flatnonzero(index.image_ids == 9)[0])
    stored = index.training_instances(row, LabelMap.coco91())
    assert stored.size == (480, 640)
    instances = stored.flip(1).scale((736, 981))
    assert instances.labels.tolist() == [51, 51, 56, 51, 55, 55, 55, 55]
    assert instances.boxes_cxcywh().dtype == np.float32
    assert instances.boxes_cxcywh().round(4).tolist() == np.array(SEED_BOXES, np.float32).tolist()


def test_a_crop_clips_boxes_and_drops_those_of_which_nothing_is_left():
    boxes = [[10, 10, 30, 30], [0, 0, 10, 10], [5, 20, 15, 60], [40, 0, 50, 20]]
    steps = plan((80, 60), resize=(100, 50), crop=(20, 20, 40, 30))  # enlarged 2x upright, 1x across
    _, instances = applied(torch.zeros(3, 50, 50, dtype=torch.uint8), steps, boxes, np.array([1, 2, 3, 4]))
    # Resized: [10 20 30 60] [0 0 10 20] [5 40 15 120] [40 0 50 40]; in the crop only the first and the last are left.
    assert instances.labels.tolist() == [1, 4]
    assert instances.size == (80, 60)
    np.testing.assert_allclose(
        instances.boxes_cxcywh(), [[5 / 30, 20 / 40, 10 / 30, 1], [25 / 30, 10 / 40, 10 / 30, 0.5]]
    )


@pytest.mark.parametrize(("axis", "expected"), [(0, [[1, 12, 3, 20]]), (1, [[17, 0, 19, 8]])])
def test_boxes_are_mirrored_along_either_axis(axis, expected):
    boxes = np.array([[1, 0, 3, 8]], np.float32)
    instances = Instances(boxes, np.array([5]), (20, 20))
    assert instances.flip(axis).boxes_xyxy_px.tolist() == expected
    assert instances.flip(axis).flip(axis).boxes_xyxy_px.tolist() == boxes.tolist() == [[1, 0, 3, 8]]


def test_no_boxes_stay_no_boxes():
    steps = plan((80, 60), flip=True, resize=(100, 50), crop=(20, 20, 40, 30))
    _, instances = applied(torch.zeros(3, 50, 50, dtype=torch.uint8), steps)
    assert (instances.labels.shape, instances.boxes_cxcywh().shape) == ((0,), (0, 4))


def random_steps(rng: random.Random, height: int, width: int) -> SamplePlan:
    size = (rng.randint(1, 120), rng.randint(1, 120))
    if rng.random() < 0.3:
        return plan(size, flip=rng.random() < 0.5)
    resize = (rng.randint(2, 120), rng.randint(2, 120)) if rng.random() < 0.8 else (height, width)
    crop = (rng.randint(1, resize[0]), rng.randint(1, resize[1]))
    return plan(
        size,
        flip=rng.random() < 0.5,
        resize=resize,
        crop=(rng.randint(0, resize[0] - crop[0]), rng.randint(0, resize[1] - crop[1]), *crop),
    )


@pytest.mark.parametrize("layout", ["hwc", "chw"])
def test_pixels_are_those_of_torchvision(layout):
    rng = random.Random(5)
    for _ in range(60):
        height, width = rng.randint(1, 90), rng.randint(1, 90)
        image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).permute(2, 0, 1)
        image = image.contiguous() if layout == "chw" else image
        before = image.clone()
        steps = random_steps(rng, height, width)
        expected = image
        for step in (*steps.steps, Resize(steps.size)):
            match step:
                case Flip():
                    expected = reference.horizontal_flip(expected)
                case Resize(size):
                    expected = reference.resize(expected, list(size), antialias=True)
                case Crop(top, left, height, width):
                    expected = reference.crop(expected, top, left, height, width)
        result, _ = applied(image, steps)
        assert result.dtype == torch.uint8
        assert result.shape == (3, *steps.size)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        torch.testing.assert_close(image, before, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(300, 400), (120, 90), (97, 131), (61, 47), (33, 200), (121, 160)])
def test_pixels_are_those_of_pillow_within_one_level(size):
    """The published code resizes with Pillow: bilinear with its antialiasing, larger and smaller."""
    rng = np.random.default_rng(size[0])
    pixels = rng.integers(0, 256, (120, 160, 3), dtype=np.uint8)
    resized = applied(torch.from_numpy(pixels).permute(2, 0, 1), plan(size))[0].permute(1, 2, 0).numpy()
    expected = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
    difference = np.abs(resized.astype(int) - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.25


def test_boxes_follow_the_pixels():
    """A bright rectangle is where the box says, after any steps."""
    rng = random.Random(6)
    for _ in range(40):
        height, width = 200, 240
        left, top = rng.randint(0, 150), rng.randint(0, 120)
        right, bottom = left + rng.randint(40, 80), top + rng.randint(40, 80)
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        image[:, top:bottom, left:right] = 255
        resize = (rng.randint(200, 400), rng.randint(200, 400))
        crop = (rng.randint(0, 40), rng.randint(0, 40), resize[0] - 80, resize[1] - 80)
        steps = plan((300, 350), rng.random() < 0.5, *((resize, crop) if rng.random() < 0.7 else (None, None)))
        pixels, instances = applied(image, steps, [left, top, right, bottom])
        boxes_cxcywh = instances.boxes_cxcywh()
        rows, columns = torch.nonzero(pixels[0] > 127, as_tuple=True)
        if not len(boxes_cxcywh):
            assert not len(rows)
            continue
        cx, cy, w, h = (boxes_cxcywh[0] * [350, 300, 350, 300]).tolist()
        seen = [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]
        np.testing.assert_allclose(seen, [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], atol=1.6)


def test_importing_it_does_not_import_torchvision():
    code = "import sys, detr_ray.data.planner; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
