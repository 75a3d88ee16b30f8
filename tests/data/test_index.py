"""COCO JSON into columns: the real file, every quirk that is put right, every fault that is refused."""

from __future__ import annotations

import copy
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from pycocotools.coco import COCO

from detr_ray.config import SplitConfig
from detr_ray.data.errors import DataError
from detr_ray.data.formats import open_split
from detr_ray.data.formats.coco import read_coco_index
from detr_ray.data.index import PROBLEMS, DatasetIndex
from detr_ray.data.label_map import LabelMap
from detr_ray.data.packing import write_shards


def small_file() -> dict:
    """Three images (not in the order of their ids), the last without boxes, and four boxes."""
    return {
        "images": [
            {"id": 20, "file_name": "b.jpg", "height": 100, "width": 200},
            {"id": 10, "file_name": "a.jpg", "height": 50, "width": 60},
            {"id": 30, "file_name": "c/d.jpg", "height": 10, "width": 10},
        ],
        "annotations": [
            {"id": 1, "image_id": 20, "category_id": 5, "bbox": [10, 20, 30, 40], "area": 900.5, "iscrowd": 0},
            {"id": 2, "image_id": 10, "category_id": 2, "bbox": [0, 0, 60, 50], "area": 3000, "iscrowd": 0},
            {"id": 3, "image_id": 20, "category_id": 2, "bbox": [1.5, 2.5, 3, 4], "area": 12, "iscrowd": 1},
            {"id": 4, "image_id": 20, "category_id": 2, "bbox": [100, 50, 5, 5], "area": 25, "iscrowd": 0},
        ],
        "categories": [{"id": 5, "name": "star"}, {"id": 2, "name": "moon"}],
    }


@pytest.fixture
def read(tmp_path):
    def write_and_read(content) -> DatasetIndex:
        path = tmp_path / "annotations.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_coco_index(str(path), str(tmp_path))

    return write_and_read


def test_columns_are_grouped_by_image_and_ordered_by_id(read, tmp_path):
    index = read(small_file())
    assert len(index) == 3
    assert index.image_ids.tolist() == [10, 20, 30]
    assert index.heights.tolist() == [50, 100, 10]
    assert index.widths.tolist() == [60, 200, 10]
    assert [index.file_name(i) for i in range(3)] == ["a.jpg", "b.jpg", "c/d.jpg"]
    assert index.first_box.tolist() == [0, 1, 4, 4]
    assert index.annotation_ids.tolist() == [2, 1, 3, 4]
    assert index.boxes_xywh_px.tolist() == [[0, 0, 60, 50], [10, 20, 30, 40], [1.5, 2.5, 3, 4], [100, 50, 5, 5]]
    assert index.areas.tolist() == [3000, 900.5, 12, 25]
    assert index.is_crowd.tolist() == [False, False, True, False]
    assert index.categories == ((2, "moon"), (5, "star"))
    assert index.images_root == str(tmp_path)
    assert index.problems == {"images_without_boxes": 1}


def test_training_boxes_leave_crowds_out(read):
    index = read(small_file())
    instances = index.training_instances(1, LabelMap.contiguous(index.categories))
    assert instances.labels.tolist() == [1, 0]
    assert instances.boxes_xyxy_px.tolist() == [[10, 20, 40, 60], [100, 50, 105, 55]]
    assert (instances.labels.dtype, instances.boxes_xyxy_px.dtype) == (np.int64, np.float32)
    assert instances.size == (index.heights[1], index.widths[1])
    instances = index.training_instances(2, LabelMap.contiguous(index.categories))
    assert (instances.labels.shape, instances.boxes_xyxy_px.shape) == ((0,), (0, 4))


def test_real_file_says_what_pycocotools_says(coco128):
    path = coco128 / "annotations/instances_train2017.json"
    index = read_coco_index(str(path), str(coco128 / "train2017"))
    reference = COCO(str(path))
    assert index.image_ids.tolist() == sorted(reference.imgs)
    assert len(index.annotation_ids) == len(reference.anns)
    assert index.is_crowd.sum() == 10
    for i, image_id in enumerate(index.image_ids.tolist()):
        rows = slice(index.first_box[i], index.first_box[i + 1])
        annotations = reference.imgToAnns[image_id]
        assert index.annotation_ids[rows].tolist() == [a["id"] for a in annotations]
        assert index.boxes_xywh_px[rows].tolist() == [a["bbox"] for a in annotations]
        assert index.areas[rows].tolist() == [a["area"] for a in annotations]
        assert index.category_ids[rows].tolist() == [a["category_id"] for a in annotations]
        assert index.file_name(i) == reference.imgs[image_id]["file_name"]
    assert index.problems == {"images_without_boxes": 2}


QUIRKS = {
    "areas_missing": ({"area": None}, [[0, 0, 60, 50]], [3000.0]),
    "iscrowd_missing": ({"iscrowd": None}, [[0, 0, 60, 50]], [3000.0]),
    "annotation_ids_renumbered": ({"id": 4}, [[0, 0, 60, 50]], [3000.0]),
    "boxes_clipped": ({"bbox": [-10, 40, 30, 40]}, [[0, 40, 20, 50]], [3000.0]),
    "boxes_outside": ({"bbox": [60, 10, 5, 5]}, [], []),
    "boxes_without_area": ({"bbox": [6, 10, 0, 5]}, [], []),
    "boxes_not_finite": ({"bbox": [6, float("nan"), 5, 5]}, [], []),
}


@pytest.mark.parametrize("problem", QUIRKS)
def test_quirks_are_put_right_and_counted(read, problem):
    change, boxes_xyxy_px, areas = QUIRKS[problem]
    content = small_file()
    content["annotations"][1] |= change
    index = read(content)
    count = 4 if problem == "annotation_ids_renumbered" else 1
    assert index.problems[problem] == count
    assert problem in PROBLEMS
    instances = index.training_instances(0, LabelMap.contiguous(index.categories))
    assert instances.boxes_xyxy_px.tolist() == boxes_xyxy_px
    assert index.areas[: len(areas)].tolist() == areas
    assert len(np.unique(index.annotation_ids)) == len(index.annotation_ids)


@pytest.mark.parametrize("key", ["area", "iscrowd", "id"])
def test_keys_that_may_be_absent(read, key):
    content = small_file()
    del content["annotations"][1][key]
    index = read(content)
    instances = index.training_instances(0, LabelMap.contiguous(index.categories))
    assert instances.boxes_xyxy_px.tolist() == [[0, 0, 60, 50]]
    assert index.areas[0] == 3000
    assert sum(index.problems.values()) > 1


@pytest.mark.parametrize("bbox", [[1, 2, float("inf"), 4], [1, float("nan"), 3, 4], [None, 2, 3, 4]])
def test_boxes_that_are_not_finite_are_gone_for_evaluation_too(read, bbox):
    content = small_file()
    content["annotations"][0]["bbox"] = bbox
    index = read(content)
    assert index.annotation_ids.tolist() == [2, 3, 4]
    assert index.first_box.tolist() == [0, 1, 3, 3]
    assert np.isfinite(index.boxes_xywh_px).all()
    assert index.problems["boxes_not_finite"] == 1


@pytest.mark.parametrize("bbox", [[60, 10, 5, 5], [6, 10, 0, 5], [-10, 40, 30, 40], [6, 10, -3, 5]])
def test_odd_boxes_stay_as_they_are_for_evaluation(read, bbox):
    content = small_file()
    content["annotations"][1]["bbox"] = bbox
    assert read(content).boxes_xywh_px[0].tolist() == bbox


def without(content: dict, path: str) -> None:
    kind, place, key = path.split("/")
    del content[kind][int(place)][key]


def change(content: dict, path: str, value) -> None:
    kind, place, key = path.split("/")
    content[kind][int(place)][key] = value


FAULTS = {
    "no images key": (lambda c: c.pop("images"), "no list under 'images'"),
    "no annotations key": (lambda c: c.pop("annotations"), "no list under 'annotations'"),
    "categories no list": (lambda c: c.update(categories={"1": "a"}), "no list under 'categories'"),
    "no image": (lambda c: c.update(images=[]), "no image in it"),
    "no category": (lambda c: c.update(categories=[]), "no category in it"),
    "image is a name": (lambda c: c["images"].append("x.jpg"), r"image no\. 3 is not an object"),
    "duplicate image": (lambda c: change(c, "images/1/id", 20), "image ids used more than once: 20"),
    "duplicate category": (lambda c: change(c, "categories/1/id", 5), "category ids used more than once: 5"),
    "no image id": (lambda c: without(c, "images/1/id"), r"image no\. 1 has no 'id'"),
    "image id text": (lambda c: change(c, "images/1/id", "x"), "image x has a 'id' that is not a whole number"),
    "width below 0": (
        lambda c: change(c, "images/1/width", -1),
        "image 10 has a 'width' below 0.*write",
    ),
    "no file name": (lambda c: without(c, "images/1/file_name"), "image 10 has no 'file_name'"),
    "empty file name": (lambda c: change(c, "images/1/file_name", ""), "image 10 has no 'file_name'"),
    "no bbox": (lambda c: without(c, "annotations/2/bbox"), "annotation 3 has no 'bbox'.*instance file"),
    "bbox of 3": (lambda c: change(c, "annotations/2/bbox", [1, 2, 3]), "annotation 3 has a 'bbox' that is not 4 num"),
    "bbox null": (lambda c: change(c, "annotations/2/bbox", None), "annotation 3 has a 'bbox' that is not 4 numbers"),
    "bbox text": (lambda c: change(c, "annotations/2/bbox", ["a", 1, 1, 1]), "annotation 3 has a 'bbox' that is not"),
    "unknown image": (
        lambda c: change(c, "annotations/2/image_id", 99),
        r"annotation 3 has a 'image_id' that is not among the file's images \(99\)",
    ),
    "unknown category": (
        lambda c: change(c, "annotations/2/category_id", 9),
        r"annotation 3 has a 'category_id' that is not among the file's categories \(9\)",
    ),
    "no category id": (lambda c: without(c, "annotations/2/category_id"), "annotation 3 has no 'category_id'"),
    "fraction": (lambda c: change(c, "annotations/2/category_id", 2.5), "annotation 3 .*not a whole number"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_the_file_and_the_ids(read, tmp_path, fault):
    damage, message = FAULTS[fault]
    content = small_file()
    damage(content)
    with pytest.raises(DataError, match=message) as caught:
        read(content)
    assert str(tmp_path / "annotations.json") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is empty\. Was the file copied completely"),
        (json.dumps(small_file())[:300], r"broken JSON \(300 bytes\).*copied completely"),
        ("[1, 2]", "not a COCO file: a list"),
        ('{"info": 1}', r"no list under 'images' \(its keys: info\)"),
    ],
)
def test_files_that_are_not_coco(read, text, message):
    with pytest.raises(DataError, match=message):
        read(text)


def test_missing_file_and_folder_in_its_place(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: no such annotation file"):
        read_coco_index(str(tmp_path / "none.json"), str(tmp_path))
    with pytest.raises(DataError, match="cannot be read"):
        read_coco_index(str(tmp_path), str(tmp_path))
    with pytest.raises(DataError, match="no file system for this address"):
        read_coco_index("nowhere://bucket/file.json", "nowhere://bucket")


def test_address_of_a_file_system_is_read_like_a_path(read, tmp_path):
    index = read(small_file())
    again = read_coco_index((tmp_path / "annotations.json").as_uri(), "file:///elsewhere")
    assert again.fingerprint == index.fingerprint


def test_panoptic_file_is_told_apart(coco128):
    with pytest.raises(DataError, match=r"has no 'bbox'.*not panoptic"):
        read_coco_index(str(coco128 / "annotations/panoptic_train2017.json"), "x")


def test_fingerprint_is_of_the_content(read):
    content = small_file()
    fingerprint = read(content).fingerprint
    shuffled = copy.deepcopy(content)
    shuffled["images"].reverse()
    shuffled["info"] = {"version": 2}
    assert read(shuffled).fingerprint == fingerprint
    for kind, place, key, value in [
        ("annotations", 0, "bbox", [10, 20, 30, 40.5]),
        ("annotations", 0, "category_id", 2),
        ("annotations", 0, "iscrowd", 1),
        ("images", 0, "width", 201),
        ("images", 0, "file_name", "e.jpg"),
        ("categories", 0, "name", "sun"),
    ]:
        other = copy.deepcopy(content)
        other[kind][place][key] = value
        assert read(other).fingerprint != fingerprint, key


def test_pickles_out_of_band(read):
    index = read(small_file())
    buffers: list[pickle.PickleBuffer] = []
    again = pickle.loads(pickle.dumps(index, protocol=5, buffer_callback=buffers.append), buffers=buffers)
    assert len(buffers) >= 9
    assert again.fingerprint == index.fingerprint
    assert again.problems == index.problems
    assert again.file_names.equals(index.file_names)
    np.testing.assert_array_equal(again.boxes_xywh_px, index.boxes_xywh_px)


def test_no_annotations_at_all(read):
    content = small_file() | {"annotations": []}
    index = read(content)
    assert index.first_box.tolist() == [0, 0, 0, 0]
    assert index.boxes_xywh_px.shape == (0, 4)
    assert index.problems == {"images_without_boxes": 3}


def test_splits_by_layout_or_by_name(tmp_path):
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    (root / "annotations/instances_val2017.json").write_text(json.dumps(small_file()))
    index = open_split(str(root), None, "val")
    assert index.images_root == str(root / "val2017")

    named = SimpleNamespace(annotations=index.source, images="s3://bucket/images", shards=None)
    elsewhere = open_split(str(root), named, "val")
    assert elsewhere.images_root == "s3://bucket/images"
    assert elsewhere.fingerprint == index.fingerprint
    with pytest.raises(DataError, match=r"has no training images, but only some that are called validation images"):
        open_split(str(root), None, "train")
    with pytest.raises(DataError, match=r"no val data is given: set data\.root"):
        open_split(None, None, "val")


def test_the_first_images_are_a_data_set_of_their_own(coco128):
    index = read_coco_index(str(coco128 / "annotations/instances_train2017.json"), str(coco128 / "train2017"))
    few = index.first(8)
    label_map = LabelMap.contiguous(index.categories)
    assert few.image_ids.tolist() == index.image_ids[:8].tolist() and few.fingerprint != index.fingerprint
    for i in range(8):
        mine, theirs = few.training_instances(i, label_map), index.training_instances(i, label_map)
        assert np.array_equal(mine.boxes_xyxy_px, theirs.boxes_xyxy_px) and np.array_equal(mine.labels, theirs.labels)
        assert few.file_name(i) == index.file_name(i)
    assert len(few.category_ids) == few.first_box[-1]
    assert len(index.first(1000)) == len(index)


def test_a_part_counts_its_own_boxes(read):
    content = small_file()
    content["annotations"][0] |= {"bbox": [190, 20, 30, 40], "area": None}
    content["annotations"][1]["bbox"] = [60, 0, 5, 5]
    whole = read(content)
    expected = {"areas_missing": 1, "boxes_clipped": 1, "boxes_outside": 1, "images_without_boxes": 1}
    assert whole.problems == expected
    part = whole.take(np.array([0, 2]))
    assert part.problems == {"areas_missing": 1, "boxes_outside": 1, "images_without_boxes": 1}


def test_an_index_is_made_of_columns_in_any_order(read, tmp_path):
    """What a reader of any format has to give, here in reverse order, is the index that COCO's file gives."""
    index = read(small_file())
    image_of = np.repeat(index.image_ids, np.diff(index.first_box))
    # Annotations of an image keep the order they come in.
    order = np.argsort(-image_of, kind="stable")
    columns = ("boxes_xywh_px", "category_ids", "areas", "is_crowd", "annotation_ids")
    made = DatasetIndex.of_annotations(
        image_ids=index.image_ids[::-1],
        heights=index.heights[::-1],
        widths=index.widths[::-1],
        file_names=index.file_names.to_pylist()[::-1],
        annotated_ids=image_of[order],
        **{name: getattr(index, name)[order] for name in columns},
        categories=index.categories,
        source="columns",
        images_root=str(tmp_path),
    )
    assert made.fingerprint == index.fingerprint


def test_places_choose_the_format(read, tmp_path):
    index = read(small_file())
    for i in range(len(index)):
        path = tmp_path / index.file_name(i)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"bytes are not looked at")
    write_shards(index, tmp_path / "shards")
    coco = SplitConfig(annotations=str(tmp_path / "annotations.json"), images=str(tmp_path))
    opened = open_split(None, coco, "train"), open_split(None, SplitConfig(shards=str(tmp_path / "shards")), "train")
    assert {one.fingerprint for one in opened} == {index.fingerprint}
    assert (opened[0].shards is None, opened[1].images_root is None) == (True, True)
