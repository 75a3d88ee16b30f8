"""Each transform, from files to batches: where a coloured rectangle is found is where its box says.

Seven images have one rectangle each, of a colour and a label of its own. Run one: ``pytest -k mosaic``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pytest
import torch
from coco_folder import CocoFolder
from defaults import augmentation, sequence_of
from PIL import Image
from scipy.ndimage import binary_opening

from detr_ray.data.formats import open_split
from detr_ray.data.index import DatasetIndex
from detr_ray.data.label_map import LabelMap
from detr_ray.data.loader import BatchLoader
from detr_ray.data.planner import Planner
from detr_ray.data.sample import Instances, Picture, SamplePlan
from detr_ray.data.transforms.colour import (
    Blur,
    Grayscale,
    Jpeg,
    Photometric,
)
from detr_ray.data.transforms.cutout import CutOut
from detr_ray.data.transforms.geometry import (
    CropAroundObjects,
    IouCrop,
    Mirror,
    Rotate90,
    ScaleJitter,
    ZoomOut,
)
from detr_ray.data.transforms.sequence import Transform
from detr_ray.data.transforms.several import CopyPaste, Mixup, Mosaic, PasteBoxes

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255), (255, 255, 255))
SIZES = ((90, 120), (120, 90), (64, 160), (100, 100), (81, 77), (140, 70), (96, 128))
DETR = augmentation(scales=(90, 130), max_size=200, crop_scales=(80, 110), crop_min=50, crop_max=90)

MOVING: dict[str, Transform] = {
    "horizontal_flip": Mirror(1),
    "vertical_flip": Mirror(0),
    "rotate90": Rotate90((1, 2, 3)),
    "zoom_out": ZoomOut((1.0, 3.0), 0),
    "iou_crop": IouCrop((0.3, 1.0), (0.5, 2.0), (0.0, 0.3, 0.7)),
    "scale_jitter": ScaleJitter(110, (0.3, 2.0), 0),
    "cutout": CutOut((2, 3), (0.3, 0.6), 0, 0.3),
    "mosaic": Mosaic((0.3, 0.7), (1.0, 1.5), 0.2),
    "copy_paste": CopyPaste(2, 0.6),
}
KEEPING: dict[str, Transform] = {
    "photometric": Photometric(0.3, 0.5, 0.5, 0.1, 0.5),
    "grayscale": Grayscale(),
    "blur": Blur((0.1, 2.0)),
    "jpeg": Jpeg((30, 95)),
}


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    """One rectangle an image, on black."""
    folder = CocoFolder(tmp_path_factory.mktemp("coloured"), [(k + 1, f"colour {k}") for k in range(len(COLOURS))])
    rng = np.random.default_rng(5)
    for number, ((height, width), colour) in enumerate(zip(SIZES, COLOURS, strict=True)):
        pixels = np.zeros((height, width, 3), np.uint8)
        box_height, box_width = rng.integers(25, height // 2), rng.integers(25, width // 2)
        top, left = rng.integers(0, height - box_height), rng.integers(0, width - box_width)
        pixels[top : top + box_height, left : left + box_width] = colour
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        box = (number + 1, float(left), float(top), float(box_width), float(box_height))
        folder.add("train", f"{number}.png", file.getvalue(), (height, width), [box])
    folder.fill("val", 1)
    folder.write()
    return open_split(str(folder.root), None, "train")


def planned(index: DatasetIndex, *transforms: Transform, epochs: int = 8) -> list[SamplePlan]:
    """Plans of some epochs."""
    planner = Planner(
        index.heights, index.widths, index.image_ids,
        seed=11, global_batch_size=7, size_policy=sequence_of(*transforms),
    )  # fmt: skip
    return list(chain.from_iterable(planner.global_batch(step) for step in range(epochs)))


def loaded(index: DatasetIndex, plan: SamplePlan) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """``[H, W, 3]`` pixels, and the boxes of each label in pixels of the sample, ``[N, 4]`` xyxy."""
    batch = BatchLoader(index, LabelMap.contiguous(index.categories)).load([plan])
    height, width = plan.size
    centres, sides = batch.boxes_cxcywh[:, :2], batch.boxes_cxcywh[:, 2:]
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1) * [width, height, width, height]
    labels = batch.labels
    return batch.images[0].transpose(1, 2, 0), {k: boxes[labels == k] for k in np.unique(labels).tolist()}


def seen(pixels: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """``[H, W]``: where a colour is."""
    return np.abs(pixels.astype(int) - colour).max(axis=2) < 128


def extent(is_seen: np.ndarray) -> list[int]:
    """The box around what is seen, xyxy; without lines of less than three pixels, where two other colours mix."""
    rows, columns = np.nonzero(binary_opening(is_seen, np.ones((3, 3))))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("last", ["alone", "with detr"])
@pytest.mark.parametrize("name", [name for name in MOVING if name != "cutout"])
def test_a_coloured_rectangle_is_where_its_box_says(coloured: DatasetIndex, name: str, last: str) -> None:
    plans = planned(coloured, MOVING[name], *([DETR] if last == "with detr" else []))
    found, hidden = 0, 0
    for plan in plans:
        pixels, boxes = loaded(coloured, plan)
        for label, (box, *more) in boxes.items():
            assert not more, "each image has one"
            if min(box[2:] - box[:2]) < 4:  # a sliver at the edge: its colour may be mixed with black everywhere
                continue
            np.testing.assert_allclose(extent(seen(pixels, COLOURS[label])), box, atol=1.7)
            found += 1
        missing = [colour for label, colour in enumerate(COLOURS) if label not in boxes]
        hidden += sum(seen(pixels, colour).sum() > 20 for colour in missing)
    assert found >= (40 if last == "alone" else 30)
    if name not in ("iou_crop", "mosaic"):
        assert not hidden, "what can be seen has a box"
    if name == "mosaic":
        assert found > 1.5 * len(plans) and hidden < found / 5
    if name == "copy_paste":
        assert found > 1.3 * len(plans)


@pytest.mark.parametrize("name", [*MOVING, *KEEPING])
def test_the_steps_bring_a_picture_to_the_planned_size(coloured: DatasetIndex, name: str) -> None:
    """The last resize, which every sample gets, has nothing to do."""
    loader = BatchLoader(coloured, LabelMap.contiguous(coloured.categories))
    for plan in planned(coloured, (MOVING | KEEPING)[name], epochs=3):
        partners = [Picture(_pixels(coloured, p), _instances(loader, p)) for p in plan.partners]
        picture = Picture(_pixels(coloured, plan), _instances(loader, plan))
        given = [partner.apply(picture) for partner, picture in zip(plan.partners, partners, strict=True)]
        for step in plan.steps:
            picture = step.apply(picture, given)
        assert tuple(picture.pixels.shape) == (*plan.size, 3) and picture.pixels.dtype == torch.uint8
        assert picture.instances.size == plan.size


def _pixels(index: DatasetIndex, plan: SamplePlan) -> torch.Tensor:
    return torch.zeros(int(index.heights[plan.index]), int(index.widths[plan.index]), 3, dtype=torch.uint8)


def _instances(loader: BatchLoader, plan: SamplePlan) -> Instances:
    return loader.index.training_instances(plan.index, loader.label_map)


@pytest.mark.parametrize("name", list(KEEPING))
def test_changes_of_colour_leave_objects_in_their_place(coloured: DatasetIndex, name: str) -> None:
    changed = 0
    for plan in planned(coloured, KEEPING[name], epochs=4):
        pixels, boxes = loaded(coloured, plan)
        stored, its_boxes = loaded(coloured, SamplePlan(0, plan.index, plan.image_id, plan.size))
        ((label, box),) = boxes.items()
        np.testing.assert_array_equal(box, its_boxes[label])
        grey = pixels.astype(float).mean(axis=2)
        np.testing.assert_allclose(extent(grey > (grey.min() + grey.max()) / 2), box[0], atol=1.1)
        changed += int((pixels != stored).any())
    assert changed >= 20


def test_cutout_covers_and_forgets_what_is_mostly_covered(coloured: DatasetIndex) -> None:
    kept = forgotten = 0
    for plan in planned(coloured, MOVING["cutout"], epochs=10):
        pixels, boxes = loaded(coloured, plan)
        stored, its_boxes = loaded(coloured, SamplePlan(0, plan.index, plan.image_id, plan.size))
        ((label, box),) = its_boxes.items()
        visible = seen(pixels, COLOURS[label]).sum() / seen(stored, COLOURS[label]).sum()
        assert (label in boxes) == (visible >= 0.3)
        if label in boxes:
            np.testing.assert_array_equal(boxes[label], box)
        kept, forgotten = kept + (label in boxes), forgotten + (label not in boxes)
    assert kept > 20 and forgotten > 3


def test_mixup_blends_two_images_with_the_objects_of_both(coloured: DatasetIndex) -> None:
    told_apart = 0
    for plan in planned(coloured, Mixup((0.3, 0.6)), epochs=8):
        (partner,) = plan.partners
        pixels, boxes = loaded(coloured, plan)
        assert set(boxes) == {plan.index, partner.index}
        colours = np.array([COLOURS[plan.index], COLOURS[partner.index]])
        if colours.all(axis=0).any():  # a channel that both objects have
            continue
        (mixed,) = plan.steps
        weight = mixed.step.weight
        assert 0.3 <= weight <= 0.6
        for label, share in ((plan.index, weight), (partner.index, 1 - weight)):
            levels = pixels[..., np.flatnonzero(COLOURS[label])].min(axis=2)
            np.testing.assert_allclose(extent(levels > 127 * share), boxes[label][0], atol=1.7)
        left, top, right, bottom = np.rint(boxes[partner.index][0]).astype(int)
        inside = pixels[top + 1 : bottom - 1, left + 1 : right - 1].max(axis=2)
        assert np.abs(inside.astype(float) - 255 * (1 - weight)).min() <= 1
        told_apart += 1
    assert told_apart >= 8


def test_objects_whose_centre_is_cut_off_are_gone() -> None:
    boxes = np.array([[0, 0, 40, 40], [30, 30, 90, 90]], np.float32)
    picture = Picture(torch.zeros(100, 100, 3, dtype=torch.uint8), Instances(boxes, np.array([1, 2]), (100, 100)))
    labels = set()
    for seed in range(50):
        step = CropAroundObjects(50, 60, 0.3, seed)
        top, left = step.corner(picture.instances)
        after = step.apply(picture, ())
        assert 0 <= top <= 50 and 0 <= left <= 40 and after.instances.size == (50, 60)
        inside = [k for k, (x, y) in ((1, (20, 20)), (2, (60, 60))) if left < x < left + 60 and top < y < top + 50]
        assert after.instances.labels.tolist() == inside and inside
        labels.add(tuple(inside))
        ious = [_iou(boxes[k - 1], (left, top, left + 60, top + 50)) for k in inside]
        assert max(ious) >= 0.3
    assert labels == {(1,), (2,), (1, 2)} or labels == {(2,), (1, 2)}


def _iou(box: np.ndarray, other: tuple[int, int, int, int]) -> float:
    shared = np.prod(np.clip(np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2]), 0, None))
    areas = [np.prod(np.subtract(b[2:], b[:2])) for b in (box, other)]
    return float(shared / (sum(areas) - shared))


def test_a_crop_that_cannot_have_the_overlap_has_the_highest_of_those_tried() -> None:
    box = np.array([30, 30, 60, 60], np.float32)
    instances = Instances(box[None], np.array([1]), (100, 100))

    def overlap(min_iou: float, seed: int) -> float:
        top, left = CropAroundObjects(40, 40, min_iou, seed).corner(instances)
        return _iou(box, (left, top, left + 40, top + 40))

    pairs = [(overlap(0.0, seed), overlap(0.99, seed)) for seed in range(20)]
    assert all(first <= best for first, best in pairs) and sum(first < best for first, best in pairs) > 10
    assert min(best for _, best in pairs) > 0.35


def test_a_crop_for_which_no_place_is_found_is_around_an_object() -> None:
    boxes = np.array([[997, 3, 1000, 5]], np.float32)
    picture = Picture(torch.zeros(8, 1000, 3, dtype=torch.uint8), Instances(boxes, np.array([4]), (8, 1000)))
    for seed in range(8):
        after = CropAroundObjects(6, 5, 0.9, seed).apply(picture, ())
        assert after.instances.labels.tolist() == [4]
    empty = Picture(picture.pixels, picture.instances.select(np.zeros(0, int)))
    corners = {CropAroundObjects(6, 5, 0.9, seed).corner(empty.instances) for seed in range(8)}
    assert len(corners) > 4 and CropAroundObjects(6, 5, 0.9, 1).apply(empty, ()).instances.size == (6, 5)


def test_pasted_boxes_hide_little_and_bring_what_lies_in_them() -> None:
    own = Instances(np.array([[0, 0, 50, 100], [60, 10, 95, 40]], np.float32), np.array([1, 2]), (100, 100))
    pasted = Instances(np.array([[10.5, 10, 40, 50], [15, 20, 25, 30.5]], np.float32), np.array([3, 4]), (60, 80))
    picture = Picture(torch.zeros(100, 100, 3, dtype=torch.uint8), own)
    partner = Picture(torch.full((60, 80, 3), 255, dtype=torch.uint8), pasted)
    counts = set()
    for seed in range(40):
        after = PasteBoxes(1, 0.8, seed).apply(picture, [partner])
        labels = after.instances.labels.tolist()
        assert labels[:2] == [1, 2] and labels[2:] in ([], [3, 4], [4])
        for box in own.boxes_xyxy_px.astype(int):
            patch = after.pixels[box[1] : box[3], box[0] : box[2], 0].numpy()
            assert (patch == 0).mean() >= 0.8
        if 3 in labels:
            first, second = after.instances.boxes_xyxy_px[2:]
            np.testing.assert_allclose(second - first, np.subtract([15, 20, 25, 30.5], [10.5, 10, 40, 50]))
        counts.add(len(labels))
    assert 4 in counts and not picture.pixels.any()
    unlike = PasteBoxes(1, 1.0, 3).apply(Picture(picture.pixels, own.scale((100, 100))), [partner]).instances
    assert len(unlike.labels) >= 2
