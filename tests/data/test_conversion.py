"""Writing data sets in other formats: round trips keep ids, names, boxes and images; what cannot be written is refused.

Run alone: ``pytest tests/data/test_conversion.py``. The command is tested in ``test_prepare.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from coco_folder import SIZE, encoded
from format_sets import FORMATS, write_coco

from detr_ray.data.errors import DataError
from detr_ray.data.formats import open_split
from detr_ray.data.formats.coco import read_coco_index
from detr_ray.data.formats.conversion import SHARDS, WRITTEN, convert
from detr_ray.data.images import ImageReader
from detr_ray.data.index import DatasetIndex
from detr_ray.data.merging import merge
from detr_ray.data.packing import write_shards

BOXES = {
    "plain": [1.5, 2.25, 30, 20], "many digits": [1.1, 2.7, 10.123456, 9.87], "more digits": [3.12345678912, 2, 9, 9],
    "over the border": [50, 40, 30, 20], "outside": [100, 4, 9, 9], "without area": [4, 4, 0, 9],
    "negative": [9, 9, -4, 3], "whole": [0, 0, 64, 48], "left of the border": [-5, -3, 20, 20],
}  # fmt: skip


def odd_set(root: Path) -> dict[str, DatasetIndex]:
    """A COCO data set with all that YOLO cannot say: ids with gaps and in no order, crowds, areas of outlines."""
    indexes = {}
    for split, first in (("train", 40), ("val", 7)):
        (root / split / "sub").mkdir(parents=True)
        names = ["b.jpg", "a ü%20.png", "sub/b.jpg", "empty.jpeg"]
        for number, name in enumerate(names):
            (root / split / name).write_bytes(encoded(seed=number, orientation=6 if name == "b.jpg" else None))
        images = [
            {"id": first - 3 * i, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
            for i, name in enumerate(names)
        ]
        rows = [
            {"id": 1000 - 7 * i, "image_id": first - 3 * (i % 3), "category_id": (90, 3)[i % 2], "bbox": box,
             "area": box[2] * box[3] if i % 3 else 17.25, "iscrowd": int(name == "whole")}
            for i, (name, box) in enumerate(BOXES.items())
        ]  # fmt: skip
        rows.append(rows[0] | {"id": 5})  # twice the same box is two boxes here
        categories = [{"id": 90, "name": " no "}, {"id": 3, "name": "a: b\n#c"}, {"id": 17, "name": "never"}]
        path = root / f"{split}.json"
        path.write_text(json.dumps({"images": images, "annotations": rows, "categories": categories}))
        indexes[split] = read_coco_index(str(path), str(root / split))
    return indexes


def assert_same(root: Path, indexes: dict[str, DatasetIndex]) -> None:
    for split, index in indexes.items():
        back = open_split(str(root), None, split)
        assert back.fingerprint == index.fingerprint
        images, theirs = ImageReader(back), ImageReader(index)
        assert [images.read(i) for i in range(len(back))] == [theirs.read(i) for i in range(len(back))]


def test_round_trips_lose_nothing(tmp_path):
    indexes = odd_set(tmp_path / "odd")
    here = indexes
    for number, name in enumerate(("yolo", "coco", "shards", "yolo", "shards", "coco")):
        root = tmp_path / f"{number}"
        if name == "shards":
            for split, index in here.items():
                write_shards(index, root / split)
        else:
            convert(here, str(root), name)
        assert_same(root, indexes)
        here = {split: open_split(str(root), None, split) for split in indexes}
        assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["coco", "yolo", "yolo, outlines", "voc", "csv", "open images"])
def test_every_format_can_become_another(tmp_path, name):
    root = write_coco(tmp_path / "set") if name == "coco" else FORMATS[name](tmp_path / "set")
    indexes = {split: open_split(str(root), None, split) for split in ("train", "val")}
    for target in WRITTEN:
        if target == SHARDS:
            for split, index in indexes.items():
                write_shards(index, tmp_path / target / split)
        else:
            convert(indexes, str(tmp_path / target), target)
        assert_same(tmp_path / target, indexes)


@pytest.mark.parametrize("name", ["coco", "yolo"])
def test_images_of_equal_names_stay_those_of_their_boxes(tmp_path, name):
    """Two data sets whose images are called the same, as one."""
    parts = []
    for number in range(2):
        files = {"id": 1, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]}
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4 + number, 4, 9, 9], "area": 81, "iscrowd": 0}
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({"images": [files], "annotations": [box], "categories": [{"id": 1, "name": "x"}]}))
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "a.jpg").write_bytes(encoded(seed=number))
        parts.append(read_coco_index(str(path), str(tmp_path / f"{number}")))
    convert({"train": merge(parts)}, str(tmp_path / "out"), name)
    back = open_split(str(tmp_path / "out"), None, "train")
    assert back.file_names.to_pylist() == ["1/a.jpg", "2/a.jpg"]
    assert back.boxes_xywh_px[:, 0].tolist() == [4, 5]
    assert [ImageReader(back).read(i) for i in range(2)] == [encoded(seed=number) for number in range(2)]


def test_other_programs_find_yolo_as_they_want_it(tmp_path):
    """Rows lie within the image and have area, classes count from 0, and crowds are no rows."""
    convert(odd_set(tmp_path / "odd"), str(tmp_path / "yolo"), "yolo")
    about = yaml.safe_load((tmp_path / "yolo" / "data.yaml").read_text())
    assert about == {"train": "images/train", "val": "images/val", "names": {0: "a: b\n#c", 1: "never", 2: " no "}}
    files = sorted((tmp_path / "yolo" / "labels" / "train").rglob("*.txt"))
    assert [str(path.relative_to(tmp_path / "yolo/labels/train")) for path in files] == [
        "a ü%20.txt", "b.txt", "empty.txt", "sub/b.txt",
    ]  # fmt: skip
    rows = np.array([[float(v) for v in line.split()] for path in files for line in path.read_text().splitlines()])
    assert len(rows) == 6 and set(rows[:, 0]) <= {0, 2}
    corners = np.concatenate([rows[:, 1:3] - rows[:, 3:] / 2, rows[:, 1:3] + rows[:, 3:] / 2])
    assert corners.min() > -1e-9 and corners.max() < 1 + 1e-9 and (rows[:, 3:] > 0).all()


def test_rows_that_were_changed_since_are_what_counts(tmp_path):
    indexes = odd_set(tmp_path / "odd")
    root = tmp_path / "yolo"
    convert(indexes, str(root), "yolo")
    (root / "labels/train/empty.txt").write_text("1 0.5 0.5 0.25 0.25\n")
    index = open_split(str(root), None, "train")
    assert index.problems["annotation_ids_renumbered"] == 1
    assert index.image_ids.tolist() == indexes["train"].image_ids.tolist()
    assert len(index.annotation_ids) == 1 + len(indexes["train"].annotation_ids)
    (row,) = np.flatnonzero(index.category_ids == 17)
    assert index.boxes_xywh_px[row].tolist() == [24, 18, 16, 12] and index.annotation_ids[row] == 1001
    about = yaml.safe_load((root / "data.yaml").read_text())
    (root / "data.yaml").write_text(yaml.safe_dump(about | {"names": ["one"]}))
    with pytest.raises(DataError, match=r"ids\.json has ids of 3 classes, .*data\.yaml has 1: delete ids\.json"):
        open_split(str(root), None, "train")
    for content in ("{}", '{"format": 1}', '{"format": 1, "category_ids": [1], "splits": {"train": {"images": 3}}}'):
        (root / "ids.json").write_text(content)
        with pytest.raises(DataError, match=r"ids\.json: not what prepare wrote: delete it"):
            open_split(str(root), None, "train")


def one_set(root: Path, box: list[float]) -> Path:
    """A YOLO data set of one image, made from COCO: two boxes with areas of outlines, a plain one, a crowd."""
    (root / "images").mkdir(parents=True)
    (root / "images" / "a.jpg").write_bytes(encoded())
    boxes = [(box, 300.5, 0), ([8, 6, 20, 20], 401, 0), ([30, 20, 9, 9], 81, 0), ([0, 0, 9, 9], 81, 1)]
    content = {
        "images": [{"id": 4, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]}],
        "annotations": [
            {"id": 10 + i, "image_id": 4, "category_id": 7, "bbox": b, "area": area, "iscrowd": crowd}
            for i, (b, area, crowd) in enumerate(boxes)
        ],
        "categories": [{"id": 7, "name": "old"}, {"id": 9, "name": "new"}],
    }
    (root / "set.json").write_text(json.dumps(content))
    convert({"train": read_coco_index(str(root / "set.json"), str(root / "images"))}, str(root / "yolo"), "yolo")
    return root / "yolo"


@pytest.mark.parametrize("box", [[10, 10, 20, 20], [50, 40, 30, 20]], ids=["inside", "over the border"])
def test_a_row_that_was_changed_replaces_what_is_stored_of_its_box(tmp_path, box):
    root = one_set(tmp_path, box)
    label = root / "labels/train/a.txt"
    rows = label.read_text().splitlines()
    for first, category_id, xywh in (
        ("1 0.5 0.5 0.25 0.25", 9, [24, 18, 16, 12]),
        ("0 0.5 0.5 0.25 0.25", 7, [24, 18, 16, 12]),
        ("1" + rows[0][1:], 9, [50, 40, 14, 8] if box[0] == 50 else box),
    ):
        label.write_text("\n".join([first, *rows[1:]]))
        index = open_split(str(root), None, "train")
        assert index.annotation_ids.tolist() == [14, 11, 12, 13]
        assert index.category_ids.tolist() == [category_id, 7, 7, 7]
        assert index.boxes_xywh_px.tolist() == [xywh, [8, 6, 20, 20], [30, 20, 9, 9], [0, 0, 9, 9]]
        assert index.areas.tolist() == [xywh[2] * xywh[3], 401, 81, 81]
        assert index.is_crowd.tolist() == [False, False, False, True]
        assert index.problems["annotation_ids_renumbered"] == 1
    label.write_text("\n".join([rows[2], *rows[:2]]))  # in another order
    index = open_split(str(root), None, "train")
    assert index.boxes_xywh_px[[0, 2]].tolist() == [[30, 20, 9, 9], [8, 6, 20, 20]]
    assert index.areas[[0, 2]].tolist() == [81, 400] and index.problems["annotation_ids_renumbered"] == 2
    # Other programs write six digits.
    label.write_text("\n".join(" ".join([r[0], *(f"{float(v):.6f}" for v in r.split()[1:])]) for r in rows))
    index = open_split(str(root), None, "train")
    assert index.annotation_ids.tolist() == [10, 11, 12, 13] and "annotation_ids_renumbered" not in index.problems
    assert index.boxes_xywh_px[0].tolist() == box and index.areas.tolist() == [300.5, 401, 81, 81]


def change(list_name: str, key: str, *values: object):
    def apply(part: dict) -> None:
        for record, value in zip(part[list_name], values, strict=False):
            record[key] = value
            if value is Ellipsis:
                del record[key]

    return apply


BROKEN_IDS = {
    "no iscrowd": change("annotations", "iscrowd", ...), "no area": change("annotations", "area", ...),
    "null for iscrowd": change("annotations", "iscrowd", None), "text for area": change("annotations", "area", "9"),
    "null for area": change("annotations", "area", None), "NaN": change("annotations", "area", float("nan")),
    "an area with too many digits": change("annotations", "area", 10**400),
    "another image": change("annotations", "image_id", 5), "nulls in a box": change("annotations", "bbox", [None] * 4),
    "a number as text": change("annotations", "in_label_file", "no"), "another box": change("annotations", "id", 99),
    "an id twice": change("images", "annotation_ids", [10, 10, 11, 12, 13]),
    "part of an id": change("images", "annotation_ids", [10, 11, 12.5, 13]),
    "text for ids": change("images", "annotation_ids", "1234"),
    "null for an id": change("images", "annotation_ids", [10, None]),
    **{f"{key} {size}": change("images", key, size) for key, size in (("height", 0), ("width", -4), ("height", 2**40))},
    "an image twice": lambda part: part["images"].append(part["images"][0] | {"id": 5, "annotation_ids": []}),
    "a box of the image before": lambda part: part["images"].append(
        {**part["images"][0], "id": 5, "file_name": "b", "annotation_ids": [part["images"][0]["annotation_ids"].pop(0)]}
    ),
}  # fmt: skip


def test_ids_that_were_changed_by_hand_are_refused(tmp_path):
    root = one_set(tmp_path, [10, 10, 20, 20])
    written = (root / "ids.json").read_text()
    for what, apply in BROKEN_IDS.items():
        content = json.loads(written)
        apply(content["splits"]["train"])
        (root / "ids.json").write_text(json.dumps(content))
        with pytest.raises(DataError) as refused:
            open_split(str(root), None, "train")
        assert "/ids.json: not what prepare wrote: delete it, and" in str(refused.value), what
    for category_ids in ([7, 7], [7, 9.5], [7, None]):
        (root / "ids.json").write_text(json.dumps(json.loads(written) | {"category_ids": category_ids}))
        with pytest.raises(DataError, match=r"/ids\.json: not what prepare wrote"):
            open_split(str(root), None, "train")
    (root / "ids.json").write_text(written)
    assert open_split(str(root), None, "train").annotation_ids.tolist() == [10, 11, 12, 13]


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    root = tmp_path / "odd"
    indexes = odd_set(root)
    (root / "train" / "b.jpg").unlink()
    for name in ("coco", "yolo"):
        with pytest.raises(DataError, match=r"train/b\.jpg: no such file"):
            convert(indexes, str(tmp_path / "out"), name)
    (root / "train" / "b.jpg").write_bytes(encoded())
    (root / "train" / "b.png").write_bytes(encoded("PNG"))
    content = json.loads((root / "train.json").read_text())
    for name, message in {"b.png": "b.png and b.jpg would have one label file", "b": "YOLO finds images by"}.items():
        (root / "train" / name).write_bytes(encoded("PNG"))
        image = {"id": 1, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
        (root / "other.json").write_text(json.dumps(content | {"images": [*content["images"], image]}))
        other = read_coco_index(str(root / "other.json"), str(root / "train"))
        with pytest.raises(DataError, match=message):
            convert({"train": other}, str(tmp_path / "out"), "yolo")
    with pytest.raises(DataError, match=r"odd exists already: give a new or an empty folder"):
        convert(indexes, str(root), "coco")
    with pytest.raises(DataError, match=r"s3://bucket/x: give a folder of this machine"):
        convert(indexes, "s3://bucket/x", "yolo")
    (tmp_path / "a file").write_text("")
    for below in ("out", "between/out"):
        with pytest.raises(DataError, match=r"/a file is a file, not a folder: give another folder than .*/out$"):
            convert(indexes, str(tmp_path / "a file" / below), "coco")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a file", "odd"]
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(DataError, match=r"/\.out\.partial exists: an attempt was killed, or one is running; delete it"):
        convert(indexes, str(tmp_path / "out"), "coco")


def test_every_name_of_a_class_can_be_written(tmp_path):
    """Also one with what YAML takes for a line break; without such, they stay as people read them."""
    names = ["Größe", "点 1", "next\x85line", "a\u2028b", "a\ufeffb", "\U0001f600", "no", "tab\t"]
    (tmp_path / "a.jpg").write_bytes(encoded())
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 0, "bbox": [4, 4, 9, 9], "area": 81, "iscrowd": 0}],
    }
    for number, some in enumerate((names[:2], names)):
        categories = [{"id": place, "name": name} for place, name in enumerate(some)]
        (tmp_path / "set.json").write_text(json.dumps(content | {"categories": categories}))
        index = read_coco_index(str(tmp_path / "set.json"), str(tmp_path))
        convert({"train": index}, str(tmp_path / f"{number}"), "yolo")
        assert_same(tmp_path / f"{number}", {"train": index})
    assert "Größe" in (tmp_path / "0" / "data.yaml").read_text() and "点 1" in (tmp_path / "0/data.yaml").read_text()
