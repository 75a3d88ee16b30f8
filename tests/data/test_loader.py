"""Loading: what is planned is what lies in the batch, faults stay in their place, and tables hold batches unchanged."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from defaults import augmentation, draw_shapes
from PIL import Image
from samples import plain_plan, training_plans

from detr_ray.data.decoding import decode_image
from detr_ray.data.errors import DataError
from detr_ray.data.formats.coco import read_coco_index
from detr_ray.data.images import ImageReader
from detr_ray.data.index import DatasetIndex
from detr_ray.data.label_map import LabelMap
from detr_ray.data.loader import BatchLoader, from_table, to_table
from detr_ray.data.sample import Crop, Flip, Instances, Picture, Resize, SamplePlan
from detr_ray.structures import PaddedBatch

DTYPES = {
    "images": np.uint8,
    "sizes": np.int32,
    "orig_sizes": np.int32,
    "image_ids": np.int64,
    "positions": np.int64,
    "labels": np.int64,
    "boxes_cxcywh": np.float32,
    "counts": np.int64,
}


def open_index(root: Path) -> DatasetIndex:
    return read_coco_index(str(root / "annotations" / "instances_train2017.json"), str(root / "train2017"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    draw_shapes(folder, num_train=12, num_val=1, seed=0, image_size=(48, 80), empty_fraction=0.2)
    return folder


@pytest.fixture(scope="module")
def index(root: Path) -> DatasetIndex:
    return open_index(root)


def loader_of(index: DatasetIndex) -> BatchLoader:
    return BatchLoader(index, LabelMap.contiguous(index.categories))


def assert_equal(left: PaddedBatch, right: PaddedBatch) -> None:
    for name, dtype in DTYPES.items():
        a, b = getattr(left, name), getattr(right, name)
        assert a.dtype == b.dtype == dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert left.bad_images == right.bad_images


def test_a_batch_is_its_samples_one_by_one_padded_right_and_below(index: DatasetIndex) -> None:
    plans = training_plans(index)
    loader = loader_of(index)
    batch = loader.load(plans)
    assert batch.bad_images == []
    assert {name: getattr(batch, name).dtype for name in DTYPES} == DTYPES
    assert batch.images.shape == (12, 3, max(p.size[0] for p in plans), max(p.size[1] for p in plans))
    assert any(len(plan.steps) > 1 for plan in plans) and any(Flip(1) in plan.steps for plan in plans)
    ends = batch.counts.cumsum()
    for i, plan in enumerate(plans):
        stored = (int(index.heights[i]), int(index.widths[i]))
        pixels = decode_image(loader.reader.read(i), "x").permute(1, 2, 0)
        picture = plan.apply(Picture(pixels, index.training_instances(i, loader.label_map)))
        height, width = plan.size
        np.testing.assert_array_equal(batch.images[i, :, :height, :width], picture.pixels.permute(2, 0, 1).numpy())
        assert not batch.images[i, :, height:].any() and not batch.images[i, :, :, width:].any()
        rows = slice(ends[i] - batch.counts[i], ends[i])
        np.testing.assert_array_equal(batch.labels[rows], picture.instances.labels)
        np.testing.assert_array_equal(batch.boxes_cxcywh[rows], picture.instances.boxes_cxcywh())
        assert tuple(batch.sizes[i]) == plan.size and tuple(batch.orig_sizes[i]) == stored
    assert batch.positions.tolist() == [plan.position for plan in plans]
    assert batch.image_ids.tolist() == index.image_ids.tolist()
    assert ends[-1] == len(batch.labels) == len(batch.boxes_cxcywh)
    assert 0 in batch.counts


def test_pixels_lie_as_convolutions_take_them(index: DatasetIndex) -> None:
    """Also after the way through a table: nobody has to turn them round."""
    batch = loader_of(index).load(training_plans(index)[:3])
    for images in (batch.images, from_table(to_table(batch)).images):
        assert images.transpose(0, 2, 3, 1).flags.c_contiguous


@pytest.mark.parametrize("multiple", [16, 64])
def test_batches_may_have_sides_of_a_multiple(index: DatasetIndex, multiple: int) -> None:
    plans = training_plans(index)[:3]
    plain = loader_of(index).load(plans)
    batch = BatchLoader(index, LabelMap.contiguous(index.categories), pad_multiple=multiple).load(plans)
    height, width = plain.images.shape[2:]
    for padded, side in zip(batch.images.shape[2:], (height, width), strict=True):
        assert padded % multiple == 0 and 0 <= padded - side < multiple
    np.testing.assert_array_equal(batch.images[:, :, :height, :width], plain.images)
    assert not batch.images[:, :, height:].any() and not batch.images[:, :, :, width:].any()
    np.testing.assert_array_equal(batch.boxes_cxcywh, plain.boxes_cxcywh)
    np.testing.assert_array_equal(batch.sizes, plain.sizes)


@dataclasses.dataclass(frozen=True)
class Beside:
    """A step that puts the pictures of the partners below the first, all of one width."""

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        boxes, labels, height = [], [], 0
        for part in (picture, *partners):
            boxes.append(part.instances.boxes_xyxy_px + np.array([0, height, 0, height], np.float32))
            labels.append(part.instances.labels)
            height += part.instances.size[0]
        pixels = torch.cat([part.pixels for part in (picture, *partners)])
        return Picture(
            pixels, Instances(np.concatenate(boxes), np.concatenate(labels), (height, picture.instances.size[1]))
        )


def test_a_sample_may_be_made_of_several_images(index: DatasetIndex) -> None:
    first, second, third = (plain_plan(index, i, size=(40, 60)) for i in (0, 3, 5))
    second = dataclasses.replace(second, steps=(Flip(1),))
    together = dataclasses.replace(first, size=(120, 60), steps=(Resize((40, 60)), Beside()), partners=(second, third))
    other = plain_plan(index, 1, size=(40, 60))
    assert together.images == (0, 3, 5)
    parts, batch = loader_of(index).load([first, second, third]), loader_of(index).load([other, together, other])
    np.testing.assert_array_equal(batch.images[1], np.concatenate(list(parts.images), axis=1))
    np.testing.assert_array_equal(batch.images[0], batch.images[2])
    assert batch.counts.tolist()[1] == parts.counts.sum() and batch.counts[0] == batch.counts[2]
    mine = slice(batch.counts[0], batch.counts[:2].sum())
    np.testing.assert_array_equal(batch.labels[mine], parts.labels)
    moved = parts.boxes_cxcywh / [1, 3, 1, 3] + np.repeat([[0, k / 3, 0, 0] for k in range(3)], parts.counts, axis=0)
    np.testing.assert_allclose(batch.boxes_cxcywh[mine], moved, atol=1e-6)


def test_a_sample_with_an_unusable_partner_is_black_and_the_next_is_not(damaged: Path, index: DatasetIndex) -> None:
    bad = plain_plan(index, 1, steps=(Beside(),), partners=(plain_plan(index, 0), plain_plan(index, 3)))
    good = plain_plan(index, 5)
    batch = loader_of(open_index(damaged)).load([bad, good])
    assert len(batch.bad_images) == 1 and index.file_name(0) in batch.bad_images[0]
    assert not batch.images[0].any() and batch.counts[0] == 0
    alone = loader_of(index).load([good])
    np.testing.assert_array_equal(batch.images[1][:, : good.size[0], : good.size[1]], alone.images[0])


@pytest.mark.parametrize(
    ("steps", "first"),
    [((), (60, 80)), ((Flip(1), Resize((50, 70))), (50, 70)), ((Crop(0, 0, 9, 9), Resize((50, 70))), (480, 640))],
)
def test_an_image_is_decoded_small_only_where_it_is_resized_first(steps, first) -> None:
    assert SamplePlan(0, 0, 0, (60, 80), steps).first_size((480, 640)) == first


def test_large_photos_may_be_decoded_at_a_fraction_of_their_size(tmp_path: Path) -> None:
    """Only where it was asked for; waves as fine as the small image can hold change more than photos."""
    y, x = np.mgrid[0:960, 0:1280]
    waves = [127 + 120 * np.sin(x / a) * np.cos(y / b) for a, b in ((7, 11), (23, 5), (90, 40))]
    (tmp_path / "images").mkdir()
    Image.fromarray(np.stack(waves, axis=2).astype(np.uint8)).save(tmp_path / "images" / "a.jpg", quality=90)
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 960, "width": 1280}],
        "annotations": [],
        "categories": [{"id": 1, "name": "waves"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    index = read_coco_index(str(tmp_path / "a.json"), str(tmp_path / "images"))
    label_map = LabelMap.contiguous(index.categories)
    plans = [plain_plan(index, 0, size=size) for size in ((240, 320), (241, 322), (120, 160))]
    whole = [BatchLoader(index, label_map).load([plan]) for plan in plans]
    reduced = [BatchLoader(index, label_map, reduce=2.0).load([plan]) for plan in plans]
    differences = [np.abs(a.images.astype(int) - b.images) for a, b in zip(whole, reduced, strict=True)]
    assert differences[0].any() and differences[2].any()
    assert not differences[1].any()  # half of the photo is less than twice that size
    assert max(difference.mean() for difference in differences) < 1.5


def test_boxes_lie_where_augmentation_puts_the_pixels(tmp_path: Path) -> None:
    """A white rectangle on black: after any draw, its box is where the white pixels are, and gone where they are."""
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[10:30, 15:55] = 255
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    count = 60
    content = {
        "images": [{"id": i, "file_name": "a.png", "height": 60, "width": 90} for i in range(count)],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [15, 10, 40, 20]} for i in range(count)],
        "categories": [{"id": 1, "name": "white"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    index = read_coco_index(str(tmp_path / "a.json"), str(tmp_path / "images"))
    values = augmentation(scales=(60, 90, 120), max_size=200, crop_scales=(60, 80), crop_min=30, crop_max=50)
    plans = training_plans(index, values=values)
    batch = loader_of(index).load(plans)
    assert 0 < batch.counts.sum() < count
    boxes = iter(batch.boxes_cxcywh * np.tile(batch.sizes[:, ::-1], 2)[batch.counts > 0])
    for image, boxes_here in zip(batch.images, batch.counts, strict=True):
        ys, xs = np.nonzero(image[0] > 127)
        if boxes_here:
            cx, cy, w, h = next(boxes)
            found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            np.testing.assert_allclose(found, [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], atol=1.6)
        else:
            assert len(xs) == 0


def test_an_image_as_stored_comes_out_as_stored(index: DatasetIndex, root: Path) -> None:
    batch = loader_of(index).load([plain_plan(index, 0), plain_plan(index, 0, steps=(Flip(1),))])
    stored = np.asarray(Image.open(root / "train2017" / index.file_name(0))).transpose(2, 0, 1)
    np.testing.assert_array_equal(batch.images[0], stored)
    np.testing.assert_array_equal(batch.images[1], stored[:, :, ::-1])


@pytest.fixture
def damaged(root: Path, tmp_path: Path) -> Path:
    """The data set with six kinds of broken images, in the places 0, 2, 4, 6, 8 and 10."""
    shutil.copytree(root, tmp_path / "damaged")
    names = [open_index(root).file_name(i) for i in range(12)]
    folder = tmp_path / "damaged" / "train2017"
    (folder / names[0]).unlink()
    (folder / names[2]).write_bytes(b"")
    whole = (folder / names[4]).read_bytes()
    (folder / names[4]).write_bytes(whole[: len(whole) // 2])
    (folder / names[6]).write_bytes(b"<html>not found</html>")
    Image.new("RGB", (1, 1)).save(folder / names[8], "JPEG")
    (folder / names[10]).write_bytes(whole[:200] + bytes(len(whole) - 200))
    return tmp_path / "damaged"


def test_images_that_cannot_be_used_are_black_without_boxes_and_named(damaged: Path, index: DatasetIndex) -> None:
    plans = training_plans(index)
    good, batch = loader_of(index).load(plans), loader_of(open_index(damaged)).load(plans)
    reasons = ["no such file", "is empty", "truncated", "not an image", "the image is 1x1", ""]
    assert len(batch.bad_images) == len(reasons)
    for k, reason in enumerate(reasons):
        assert index.file_name(2 * k) in batch.bad_images[k] and reason in batch.bad_images[k]
    assert batch.images.shape == good.images.shape
    np.testing.assert_array_equal(batch.sizes, good.sizes)
    np.testing.assert_array_equal(batch.positions, good.positions)
    assert not batch.images[::2].any() and not batch.counts[::2].any()
    np.testing.assert_array_equal(batch.images[1::2], good.images[1::2])
    np.testing.assert_array_equal(batch.counts[1::2], good.counts[1::2])
    np.testing.assert_array_equal(batch.boxes_cxcywh, good.boxes_cxcywh[np.repeat(np.arange(12) % 2 == 1, good.counts)])


def test_a_category_that_the_label_map_lacks_is_an_error_not_a_bad_image(index: DatasetIndex) -> None:
    loader = BatchLoader(index, LabelMap.contiguous([(99, "unicorn")]))
    with pytest.raises(DataError, match="label map"):
        loader.load(training_plans(index))


def test_a_batch_of_nothing_is_an_error(index: DatasetIndex) -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        loader_of(index).load([])


def test_a_loader_can_be_sent_to_other_processes(index: DatasetIndex) -> None:
    plans = training_plans(index)[:3]
    loader = loader_of(index)
    expected = loader.load(plans)
    assert_equal(pickle.loads(pickle.dumps(loader)).load(plans), expected)


def test_tables_give_the_batch_back_without_copying_pixels(index: DatasetIndex) -> None:
    batch = loader_of(index).load(training_plans(index)[:5])
    table = to_table(batch)
    assert table.num_rows == 1
    back = from_table(table)
    assert_equal(back, batch)
    assert np.shares_memory(back.images, batch.images)
    assert np.shares_memory(back.boxes_cxcywh, batch.boxes_cxcywh)


def test_tables_survive_transport_and_slicing(index: DatasetIndex) -> None:
    plans = training_plans(index)
    batches = [loader_of(index).load(plans[k : k + 3]) for k in range(0, 12, 3)]
    sink = pa.BufferOutputStream()
    joined = pa.concat_tables([to_table(batch) for batch in batches])
    with pa.ipc.new_stream(sink, joined.schema) as writer:
        writer.write_table(joined.combine_chunks())
    received = pa.ipc.open_stream(sink.getvalue()).read_all()
    assert received.num_rows == 4
    for k, batch in enumerate(batches):
        assert_equal(from_table(received.slice(k, 1)), batch)
        assert_equal(from_table(joined.slice(k, 1)), batch)
    with pytest.raises(ValueError, match="one row"):
        from_table(received)


def test_tables_hold_batches_without_boxes_and_with_bad_images(index: DatasetIndex, damaged: Path) -> None:
    empty = int(np.flatnonzero(np.diff(index.first_box) == 0)[0])
    without_boxes = loader_of(index).load([plain_plan(index, empty)])
    assert without_boxes.boxes_cxcywh.shape == (0, 4) and without_boxes.labels.shape == (0,)
    assert_equal(from_table(to_table(without_boxes)), without_boxes)
    bad = loader_of(open_index(damaged)).load(training_plans(index)[:3])
    assert len(bad.bad_images) == 2
    assert_equal(from_table(to_table(bad)), bad)
    assert to_table(bad).schema == to_table(without_boxes).schema


def test_tables_of_noncontiguous_pixels_are_right_too(index: DatasetIndex) -> None:
    batch = loader_of(index).load(training_plans(index)[:2])
    turned = np.ascontiguousarray(batch.images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert_equal(from_table(to_table(dataclasses.replace(batch, images=turned))), batch)


def test_real_images_give_batches_with_the_boxes_of_their_annotations(coco128: Path) -> None:
    annotations = next(coco128.glob("**/instances*.json"))
    index = read_coco_index(str(annotations), str(coco128 / "train2017"))
    loader = BatchLoader(index, LabelMap.coco91(), ImageReader(index))
    content = json.loads(annotations.read_text())
    usual = [a for a in content["annotations"] if not a["iscrowd"]]
    plans = [plain_plan(index, i, size=(96, 128)) for i in range(8)]
    batch = loader.load(plans)
    assert batch.bad_images == [] and batch.images.shape == (8, 3, 96, 128)
    for image_id, count in zip(batch.image_ids, batch.counts, strict=True):
        assert count == sum(a["image_id"] == image_id for a in usual)
    assert (batch.images.reshape(8, -1).std(axis=1) > 10).all()
