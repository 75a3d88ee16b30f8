"""Layouts of real exports: which image an annotation file belongs to, which files are a split, and where classes lie.

Run alone: ``pytest tests/data/test_layouts.py``. The formats themselves are in ``test_formats.py``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from coco_folder import encoded
from format_sets import (
    FORMATS,
    NAMES,
    assert_same,
    data_set,
    put_images,
    voc_xml,
    write_coco,
    write_csv,
    write_voc,
    write_yolo,
    yolo_rows,
)

from detr_ray.data.errors import DataError
from detr_ray.data.formats import Reading, first_image, image_names, open_split, open_undivided
from detr_ray.data.formats.folder import stem
from detr_ray.data.images import ImageReader


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("layouts") / "coco")


# Pascal VOC


def lay_voc(root: Path, annotations: str, images: str, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """Images and XML files in folders with ``{split}`` in their names; files state names from before a renaming."""
    for split in splits:
        put_images(root / images.format(split=split), data_set()[split])
        above = root / annotations.format(split=split)
        above.mkdir(parents=True, exist_ok=True)
        for image in data_set()[split]:
            text = voc_xml(image).replace("<filename>", "<filename>old ")
            (above / image.name).with_suffix(".xml").write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("Annotations/{split}", "JPEGImages/{split}"), ("Annotations/{split}", "images/{split}"),
        ("annotations/{split}", "JPEGImages"), ("labels/{split}", "data/{split}"), ("{split}/labels", "{split}/data"),
        ("Annotations/{split}", "photos/{split}"), ("{split}", "images/{split}"),
    ],
)  # fmt: skip
def test_xml_files_find_their_images_in_parallel_folders(tmp_path, coco, annotations, images):
    root = lay_voc(tmp_path / "set", annotations, images)
    for split in ("train", "val"):
        index = open_split(str(root), None, split)
        assert_same(index, open_split(str(coco), None, split))
        assert "images_not_annotated" not in index.problems, "those of the other split are annotated"
        folder, name, _ = first_image(str(root), None, split, follow_links=False)
        assert Path(folder, name).is_file()


@pytest.mark.parametrize(("annotations", "images"), [("annotations/xmls", "images"), ("labels", "data")])
def test_a_set_of_voc_that_is_not_divided(tmp_path, coco, annotations, images):
    """With masks of the same names, and an image without an XML file."""
    root = lay_voc(tmp_path / "set", annotations, images, ("train",))
    masks = root / "annotations/trimaps"
    masks.mkdir(parents=True)
    for image in data_set()["train"]:
        (masks / image.name).with_suffix(".png").write_bytes(encoded("PNG"))
    put_images(root / images, data_set()["val"][:1])
    index = open_undivided(str(root), None)
    assert index.problems["images_not_annotated"] == 1
    assert_same(index, open_split(str(coco), None, "train"))
    missing = data_set()["train"][0].name
    (root / images / missing).unlink()
    assert f"old {missing}" in open_undivided(str(root), None).file_names.to_pylist(), "its mask is not taken for it"


def test_equal_names_in_parallel_folders_are_told_apart(tmp_path):
    first, second = data_set()["train"][:2]
    for folder, image in (("cam1", first), ("cam2", second)):
        for place, name, content in (
            ("JPEGImages", "f.jpg", image.content), ("Annotations", "f.xml", voc_xml(image).encode())
        ):  # fmt: skip
            path = tmp_path / place / folder / name
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
    index = open_undivided(str(tmp_path), None)
    assert index.file_names.to_pylist() == ["cam1/f.jpg", "cam2/f.jpg"]
    assert index.images_root == str(tmp_path / "JPEGImages")
    assert [ImageReader(index).read(i) for i in range(2)] == [first.content, second.content]
    assert np.diff(index.first_box).tolist() == [len(first.boxes), len(second.boxes)]
    for other in ("JPEGImages/f.jpg", "images/cam1/f.jpg"):  # the same path counts for more, and then JPEGImages
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_bytes(encoded())
    assert open_undivided(str(tmp_path), None).fingerprint == index.fingerprint
    shutil.copy(tmp_path / "JPEGImages/cam1/f.jpg", tmp_path / "JPEGImages/cam1/f.png")
    with pytest.raises(DataError, match=r"Annotations/cam1/f\.xml: may be of .*cam1/f\.jpg, .*cam1/f\.png: rename"):
        open_undivided(str(tmp_path), None)


def test_frames_of_many_videos_are_matched_with_one_look_at_each_name(monkeypatch):
    frames = [f"v{video}/{frame}" for video in range(40) for frame in range(5)]
    folder = SimpleNamespace(images=lambda: [f"JPEGImages/{frame}.jpg" for frame in frames])
    split: list[str] = []
    monkeypatch.setattr(image_names, "stem", lambda name: (split.append(name), stem(name))[1])
    matcher = image_names.ImageMatcher(folder, [f"Annotations/{frame}.xml" for frame in frames])
    for above in ("", "more/"):
        found = [matcher.find(f"Annotations/{above}{frame}.xml") for frame in frames]
        assert found == [f"JPEGImages/{frame}.jpg" for frame in frames]
    assert matcher.find("Annotations/other/0.xml") is None
    assert len(split) <= 3 * len(frames) + 1, "each name is looked at once"


def test_images_of_one_split_alone_are_counted_as_not_annotated(tmp_path):
    """XML files beside images, in several folders of a split."""
    for split, image in zip(("train", "train", "val"), data_set()["train"], strict=False):
        folder = tmp_path / split / f"cam{image.name[-6:-4]}"
        put_images(folder, [image])
        (folder / image.name).with_suffix(".xml").write_text(voc_xml(image), encoding="utf-8")
    put_images(tmp_path / "test", data_set()["val"])
    index = open_split(str(tmp_path), None, "train")
    assert index.file_names.to_pylist() == ["cam00/train ü00.jpg", "cam01/train ü01.png"]
    assert "images_not_annotated" not in index.problems
    put_images(tmp_path / "train/cam01", data_set()["val"][:2])
    assert open_split(str(tmp_path), None, "train").problems["images_not_annotated"] == 2


def test_an_image_of_another_folder_is_not_taken(tmp_path):
    root = lay_voc(tmp_path / "set", "Annotations/{split}", "JPEGImages/{split}", ("train",))
    name = data_set()["train"][0].name
    (root / "JPEGImages/val").mkdir()
    (root / "JPEGImages/train" / name).rename(root / "JPEGImages/val" / name)
    index = open_split(str(root), None, "train")
    with pytest.raises(DataError, match=f"JPEGImages/train/old {name}: no such file"):
        ImageReader(index).read(index.file_names.to_pylist().index(f"old {name}"))


def test_xml_files_without_any_image_are_refused(tmp_path):
    root = lay_voc(tmp_path / "set", "Annotations/{split}", "pictures_of_{split}")
    message = r"set \(train\): none of its 12 XML files has its image in .*: that of Annotations/train/.* is old"
    with pytest.raises(DataError, match=message):
        open_split(str(root), None, "train")


# YOLO


def test_folders_and_suffixes_in_other_letters(tmp_path, coco):
    """As they come from Windows and some labelling tools."""
    root = write_yolo(tmp_path / "yolo")
    for old, new in (("images", "Images"), ("labels", "Labels")):
        (root / old).rename(root / new)
    (root / "Labels/train/gone.txt").write_text("")
    about = yaml.safe_load((root / "data.yaml").read_text(encoding="utf-8"))
    for places in ({"train": "Images/train", "val": "Images/val"}, {"train": None, "val": None}):
        text = "\ufeff" + yaml.safe_dump(about | places, allow_unicode=True).replace("\n", "\r\n")
        (root / "data.yaml").write_text(text, encoding="utf-8")
        index = open_split(str(root), None, "train")
        assert_same(index, open_split(str(coco), None, "train"))
        assert index.problems["labels_without_image"] == 1
    root = lay_voc(tmp_path / "voc", "{split}", "{split}")
    for path in root.rglob("*.xml"):
        path.rename(path.with_suffix(".XML"))
    assert_same(open_split(str(root), None, "train"), open_split(str(coco), None, "train"))


def lay_darknet(root: Path) -> Path:
    """As CVAT writes YOLO 1.1."""
    for split, name in (("train", "train"), ("val", "valid")):
        folder = root / f"obj_{name}_data"
        put_images(folder, data_set()[split])
        for image in data_set()[split]:
            (folder / image.name).with_suffix(".txt").write_text(yolo_rows(image))
        lines = [f"data/obj_{name}_data/{image.name}" for image in data_set()[split]]
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (root / "obj.names").write_text("\n".join(NAMES), encoding="utf-8")
    (root / "obj.data").write_text(
        "classes = 4\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n"
    )
    return root


def test_lists_beside_obj_names_are_the_splits(tmp_path, coco):
    root = lay_darknet(tmp_path / "set")
    for split, name in (("train", "train"), ("val", "valid")):
        index, expected = (open_split(str(place), None, split) for place in (root, coco))
        assert index.file_names.to_pylist() == [f"obj_{name}_data/{n}" for n in expected.file_names.to_pylist()]
        assert np.array_equal(index.boxes_xywh_px, expected.boxes_xywh_px) and index.categories == expected.categories
    (root / "valid.txt").unlink()
    with pytest.raises(DataError, match=r"has no validation images of its own"):
        open_split(str(root), None, "val")
    assert len(open_undivided(str(root), None)) == 12


@pytest.mark.parametrize("place", ["labels/classes.txt", "labels/train/classes.txt"])
def test_classes_that_lie_beside_the_labels(tmp_path, coco, place):
    """As labelImg leaves them."""
    root = write_yolo(tmp_path / "set")
    (root / "data.yaml").unlink()
    (root / place).write_text("\n".join(NAMES), encoding="utf-8")
    (root / "classes.txt").write_text("\n".join(NAMES), encoding="utf-8")
    for _ in range(2):
        index = open_split(str(root), None, "train")
        assert_same(index, open_split(str(coco), None, "train"))
        assert "labels_without_image" not in index.problems
        (root / "classes.txt").unlink(missing_ok=True)
    (root / "labels/val/classes.txt").write_text("\n".join(NAMES[::-1]), encoding="utf-8")
    (root / "classes.txt").write_text("\n".join(NAMES), encoding="utf-8")  # this one alone counts
    assert_same(open_split(str(root), None, "train"), open_split(str(coco), None, "train"))
    (root / "classes.txt").unlink()
    with pytest.raises(
        DataError, match=r"classes\.txt, .*val/classes\.txt list different classes, or in another order"
    ):
        open_split(str(root), None, "train")


def test_stray_lists_of_classes_do_not_matter_to_other_formats(tmp_path, coco):
    root = write_voc(tmp_path / "set")
    for place in ("labels", "train"):
        (root / place).mkdir()
        (root / place / "classes.txt").write_text("" if place == "train" else "other", encoding="utf-8")
    assert_same(open_split(str(root), None, "train"), open_split(str(coco), None, "train"))


def test_paths_that_are_found_as_one_folder_are_refused(tmp_path, coco):
    root = write_yolo(tmp_path / "set")
    about = yaml.safe_load((root / "data.yaml").read_text())

    def given(train: str, val: str) -> None:
        (root / "data.yaml").write_text(yaml.safe_dump(about | {"train": train, "val": val}))

    for train, val in (("train/images", "valid/images"), ("../old/images", "images/val")):
        given(train, val)
        message = f"data.yaml: train is '{train}' and val is '{val}', of which there is only .*/images, which"
        with pytest.raises(DataError, match=message):
            open_split(str(root), None, "train")
    given("/content/set/images/train", "/content/set/images/val")
    assert_same(open_split(str(root), None, "train"), open_split(str(coco), None, "train"))
    given("images/train", "images/train")
    assert len(open_split(str(root), None, "val")) == 12, "meant: the file says it twice"
    given("/content/set/images/train", "/content/set/images/train")
    assert len(open_split(str(root), None, "val")) == 12


def test_a_table_in_another_encoding_is_no_annotation_of_a_set(tmp_path, coco):
    root = write_yolo(tmp_path / "set")
    (root / "notes.csv").write_bytes("Größe,b,c,d,e,f\n".encode("latin-1"))
    assert_same(open_split(str(root), None, "train"), open_split(str(coco), None, "train"))


# CSV


def test_images_without_a_row_are_counted(tmp_path, coco):
    root = write_csv(tmp_path / "set")
    put_images(root / "train", data_set()["val"][:3])
    index = open_split(str(root), None, "train")
    assert_same(index, open_split(str(coco), None, "train"))
    assert index.problems["images_not_annotated"] == 3
    assert "images_not_annotated" not in open_split(str(root), None, "val").problems
    shared = write_csv(tmp_path / "shared")
    (shared / "images").mkdir()
    for split in ("train", "val"):
        for path in (shared / split).iterdir():
            path.rename(shared / "images" / path.name)
        (shared / split).rmdir()
    assert "images_not_annotated" not in open_split(str(shared), None, "train").problems, "validation images are there"


@pytest.mark.parametrize("names", ["{}_labels.csv", "Boxes ({}) 2.CSV"])
def test_tables_with_a_split_in_their_name(tmp_path, coco, names):
    """As in TensorFlow's tutorials, with a table of test images and one of something else."""
    root = write_csv(tmp_path / "set", ("filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"))
    for split in ("train", "val"):
        (root / f"{split}.csv").rename(root / names.format(split))
    shutil.copy(root / names.format("train"), root / names.format("test"))
    (root / "train_cameras.csv").write_text("id,camera\n1,2\n")
    for split in ("train", "val"):
        assert_same(open_split(str(root), None, split), open_split(str(coco), None, split))
    (root / names.format("val")).unlink()
    assert len(open_undivided(str(root), None)) == 12
    (root / names.format("train")).rename(root / "train_val.csv")
    assert len(open_undivided(str(root), None)) == 12, "not both splits"
    (root / "train_val.csv").rename(root / names.format("train"))
    text = (root / names.format("train")).read_text(encoding="utf-8-sig")
    (root / names.format("train")).unlink()
    (root / "train").rename(root / "images")
    for encoding in ("utf-8", "utf-16"):
        (root / "boxes.csv").write_bytes(text.encode(encoding))
        assert_same(open_undivided(str(root), None), open_split(str(coco), None, "train"))


@pytest.mark.parametrize("form", ["image_id without a suffix", "suffix in other letters"])
def test_images_of_a_table_are_found_whatever_their_suffix(tmp_path, coco, form):
    root = write_csv(tmp_path / "set", ("path", "x1", "y1", "x2", "y2", "class"))
    for split in ("train", "val"):
        text = (root / f"{split}.csv").read_text(encoding="utf-8")
        if "image_id" in form:
            text = text.replace("path,", "image_id,").replace(".jpg", "").replace(".png", "")
        else:
            text = text.replace(".jpg", ".JPEG").replace(".png", ".PNG")
        (root / f"{split}.csv").write_text(text, encoding="utf-8")
        assert_same(open_split(str(root), None, split), open_split(str(coco), None, split))
    name = data_set()["train"][0].name
    (root / "train" / name).with_suffix(".bmp").write_bytes(encoded("BMP"))
    if "image_id" not in form:
        assert_same(open_split(str(root), None, "train"), open_split(str(coco), None, "train"))
        (root / "train" / name).unlink()  # the other file, which may be a mask, is not taken for it
    with pytest.raises(DataError, match=f"the size of 1 of 12 images cannot be read .*{Path(name).stem}"):
        open_split(str(root), None, "train")


# COCO


def export(coco: Path, root: Path, annotations: str, images: str, names: tuple[str, str], prefix: str = "") -> Path:
    """The COCO set with files and folders that have ``{split}`` in their names."""
    for split, name in zip(("train", "val"), names, strict=True):
        shutil.copytree(coco / f"{split}2017", root / images.format(split=name), dirs_exist_ok=True)
        content = json.loads((coco / f"annotations/instances_{split}2017.json").read_text())
        content["images"] = [image | {"file_name": prefix + image["file_name"]} for image in content["images"]]
        path = root / annotations.format(split=name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("annotations", "images", "names"),
    [
        ("annotations/instances_{split}.json", "images", ("train", "val")),
        ("annotations/instances_{split}.json", "images/{split}", ("train", "validation")),
        ("{split}.json", "{split}", ("train", "val")),
        ("{split}/labels.json", "{split}/data", ("train", "validation")),
    ],
)
def test_coco_as_other_tools_export_it(tmp_path, coco, annotations, images, names):
    root = export(coco, tmp_path / "set", annotations, images, names)
    beside = (root / annotations.format(split=names[0])).with_name(f"person_keypoints_{names[0]}.json")
    if "instances" in annotations:
        beside.write_text('{"images": [], "annotations": []}')
    for split in ("train", "val"):
        for data_format in (None, "coco"):
            index = open_split(str(root), None, split, data_format=data_format)
            assert_same(index, open_split(str(coco), None, split))
    if "instances" not in annotations:
        beside.write_text('{"images": [], "annotations": []}')
        with pytest.raises(
            DataError, match=r"may all be annotations in COCO's format: keep one of them, or set data\."
        ):
            open_split(str(root), None, "train")


@pytest.mark.parametrize(
    ("annotations", "images", "prefix"),
    [
        ("annotations/instances_default.json", "images/default", ""), ("result.json", "images", "images/"),
        ("labels.json", "data", ""), ("my boxes.json", "pictures", "pictures/"),
    ],
)  # fmt: skip
def test_a_coco_file_alone_is_a_set_that_is_not_divided(tmp_path, coco, annotations, images, prefix):
    root = export(coco, tmp_path / "set", annotations, images, ("", ""), prefix)
    index, expected = open_undivided(str(root), None), open_split(str(coco), None, "val")
    assert index.file_names.to_pylist() == [prefix + name for name in expected.file_names.to_pylist()]
    assert np.array_equal(index.boxes_xywh_px, expected.boxes_xywh_px)
    assert ImageReader(index).read(0) == ImageReader(expected).read(0)
    with pytest.raises(DataError, match=r"no validation images of its own: hold out"):
        open_split(str(root), None, "train")


def test_other_formats_and_json_of_others_are_not_taken_for_coco(tmp_path, coco):
    root = write_yolo(tmp_path / "set")
    shutil.copy(coco / "annotations/instances_val2017.json", root / "result.json")
    assert_same(open_split(str(root), None, "train"), open_split(str(coco), None, "train"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "package.json").write_text('{"name": "x"}')
    with pytest.raises(DataError, match="holds no data set in a known format"):
        open_split(str(other), None, "train")


@pytest.mark.parametrize("size", [{}, {"height": None, "width": None}, {"height": 0, "width": 64}])
def test_sizes_that_a_coco_file_lacks_are_read_from_headers(tmp_path, coco, size):
    root = tmp_path / "set"
    shutil.copytree(coco, root)
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    first = content["images"][0]
    content["images"][0] = {key: first[key] for key in ("id", "file_name")} | size
    path.write_text(json.dumps(content))
    assert_same(open_split(str(root), None, "train"), open_split(str(coco), None, "train"))
    (root / "train2017" / first["file_name"]).unlink()
    with pytest.raises(DataError, match=r"the size of 1 of 12 images cannot be read \(.*no such file\)\. Replace"):
        open_split(str(root), None, "train")
    index = open_split(str(root), None, "train", reading=Reading(skip_unreadable=True))
    assert index.problems["images_without_size"] == 1 and first["id"] not in index.image_ids
    whole = open_split(str(coco), None, "train").take(np.arange(1, 12))
    assert index.fingerprint == whole.fingerprint


# Splits


@pytest.mark.parametrize("name", ["coco", "yolo", "voc, split folders", "csv", "open images"])
def test_a_set_of_validation_images_alone_is_refused_for_training(tmp_path, coco, name):
    writers: dict[str, Callable[[Path], Path]] = {"coco": write_coco, **FORMATS}
    root = writers[name](tmp_path / "set")
    for path in list(root.glob("*train*")) + list(root.glob("annotations/*train*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    about = root / "data.yaml"
    if about.exists():
        about.write_text(yaml.safe_dump({"val": "images/val", "names": list(NAMES)}, allow_unicode=True))
    advice = r"set has no training images, but only some that are called validation images: put training images beside"
    for call in (
        lambda: open_split(str(root), None, "train"), lambda: open_undivided(str(root), None),
        lambda: first_image(str(root), None, "train", follow_links=False),
    ):  # fmt: skip
        with pytest.raises(DataError, match=advice):
            call()
    assert len(open_split(str(root), None, "val")) == 5


def test_voc_lists_are_a_split_of_their_own(tmp_path):
    root = write_voc(tmp_path / "set")
    (root / "ImageSets/Main/train.txt").unlink()
    with pytest.raises(DataError, match="has no training images, but only some that are called validation images"):
        open_split(str(root), None, "train")
