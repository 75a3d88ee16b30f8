"""Formats: the same data set in each gives the same index and the same training; what is recognised; converting.

Run alone: ``pytest tests/data/test_formats.py``. What bad files give is in ``test_bad_formats.py``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from format_sets import (
    FORMATS,
    NAMES,
    SIZES,
    assert_same,
    data_set,
    put_images,
    voc_xml,
    write_coco,
    write_csv,
    write_voc,
    write_yolo,
)
from recorded import final_weights
from tiny import fit_here, tiny_config

from detr_ray.data.errors import DataError
from detr_ray.data.formats import Reading, open_split, open_undivided
from detr_ray.data.holdout import Holdout
from detr_ray.data.packing import write_shards


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("formats") / "coco")


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_same_index(tmp_path, coco, name):
    root = FORMATS[name](tmp_path / "a set")
    for split in ("train", "val"):
        expected = open_split(str(coco), None, split)
        found = open_split(str(root), None, split)
        assert_same(found, expected)
        assert dict(found.categories) == dict(enumerate(NAMES))
        for problem in ("boxes_clipped", "images_without_boxes"):
            assert found.problems.get(problem) == expected.problems.get(problem)


def test_each_format_trains_the_same(tmp_path, coco):
    """The whole way: what is recognised, planned and trained, to the bit of the last weight and box."""
    weights, fingerprints = {}, {}
    roots = {"coco": coco} | {name: FORMATS[name](tmp_path / name) for name in ("yolo", "voc", "csv", "open images")}
    for name, root in roots.items():
        keys = ("run.name=a", "train.global_batch_size=4", "train.epochs=1", "train.record_stream=true")
        result = fit_here(tiny_config(root, tmp_path / f"{name}-runs", *keys))
        weights[name] = final_weights(tmp_path / f"{name}-runs" / "a", 3)
        stream = tmp_path / f"{name}-runs" / "a" / "stream" / "rank-00000.jsonl"
        fingerprints[name] = (stream.read_text(), {k: v for k, v in result.metrics.items() if k.startswith("val/A")})
    assert fingerprints["coco"][1]
    for name in roots:
        assert fingerprints[name] == fingerprints["coco"]
        assert all(torch.equal(value, weights["coco"][key]) for key, value in weights[name].items())


# Recognition


def places_of(coco: Path) -> SimpleNamespace:
    annotations = str(coco / "annotations/instances_train2017.json")
    return SimpleNamespace(annotations=annotations, images=str(coco / "train2017"), shards=None)


def test_a_folder_of_shards_and_exported_coco_are_recognised(tmp_path, coco):
    exported = tmp_path / "exported"
    for split, name in (("train", "train"), ("val", "valid")):
        index = open_split(str(coco), None, split)
        write_shards(index, tmp_path / "shards" / split)
        shutil.copytree(coco / f"{split}2017", exported / name)
        shutil.copy(coco / f"annotations/instances_{split}2017.json", exported / name / "_annotations.coco.json")
        assert_same(open_split(str(exported), None, split), index)
        assert open_split(str(tmp_path / "shards"), None, split).fingerprint == index.fingerprint


def test_what_is_not_known_is_refused_with_what_each_format_needs(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no data set in a known format. There is photos") as error:
        open_split(str(tmp_path), None, "train")
    for word in (
        "instances_train2017.json",
        "data.yaml",
        "ImageSets",
        "train.csv",
        "index.parquet",
        "train-annotations-bbox.csv",
    ):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("made", "given", "said"),
    [
        ([], "nowhere", "nowhere: there is no such folder"),
        (["set/"], "set", "set is empty"),
        (["a.json"], "a.json", r"a.json is a file; .* data\.train\.annotations=FILE"),
        (["set/images/a.jpg", "set/labels/a.txt"], "set", r"It looks like YOLO without data\.yaml"),
        (["set/train/images/a.jpg", "set/train/labels/a.txt"], "set", r"It looks like YOLO without data\.yaml"),
        (["set/photos/a.jpg"], "set", r"There is photos. What lies in"),
        (["set/labels/a.txt", "set/classes.txt", "set/notes.json"], "set", "YOLO's labels without their images: put"),
        (["set/images/a.jpg", "set/boxes/a.txt", "set/classes.txt"], "set", "no label files: those of `images/a.jpg`"),
        (
            ["set/a.jpg", "set/a.json"],
            "set",
            r"There is .* a\.json: not recognised as COCO's .* export the set",
        ),
        (["set/my.zip"], "set", r"There is my\.zip\. Unpack my\.zip first\.$"),
        (["set/a.csv", "set/a.jpg"], "set", r"a\.csv, line 1: neither a header with path, x1, .*, but 1 cells"),
        (
            ["set/a/labels.csv", "set/a/images/1.jpg", "set/b.csv"],
            "set",
            r"A data set lies in .*/set/a: set data\.root",
        ),
        (["set/a/labels.csv", "set/a/1.jpg", "set/b/b.csv", "set/b/1.jpg"], "set", r"Data sets lie in .*/a, .*/b: set"),
        (["set/boxes/train.csv", "set/photos/1.jpg"], "set", r"There is boxes, photos\. What lies in"),
    ],
)
def test_what_is_not_there_is_said_plainly(made: list[str], given: str, said: str, tmp_path) -> None:
    for name in made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        row = {".csv": "1.jpg,1,2,9,9,cat", ".json": '{"categories": []}'}.get(Path(name).suffix, "0 0.5 0.5 0.1 0.1")
        row = "0" if name.endswith(("set/a.csv", "set/b.csv")) else row
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text(row)
    for split in ("train", "val"):
        with pytest.raises(DataError, match=said):
            open_split(str(tmp_path / given), None, split)


def test_two_formats_in_one_folder_need_to_be_told(tmp_path, coco):
    root = write_csv(tmp_path / "set")
    write_voc(root)
    with pytest.raises(DataError, match=r"looks like voc and csv: say which it is by data\.format"):
        open_split(str(root), None, "train")
    for name in ("voc", "csv"):
        assert_same(open_split(str(root), None, "train", data_format=name), open_split(str(coco), None, "train"))
    with pytest.raises(DataError, match=r"not in the format of data\.format=yolo; what it needs is YOLO: data\.yaml"):
        open_split(str(root), None, "train", data_format="yolo")
    with pytest.raises(
        DataError, match=r"data\.format: 'yolov5' is not known; one of coco, shards, yolo, voc, csv, open_images"
    ):
        open_split(str(root), None, "train", data_format="yolov5")
    with pytest.raises(DataError, match=r"data\.format=csv is the format of what lies in data\.root"):
        open_split(None, places_of(coco), "train", data_format="csv")


def test_a_set_without_validation_images_says_how_to_get_some(tmp_path):
    root = write_voc(tmp_path / "set")
    shutil.rmtree(root / "ImageSets")
    for split in ("train", "val"):
        with pytest.raises(DataError, match=r"no validation images of its own: hold out .* data\.split=\{val: 0\.1\}"):
            open_split(str(root), None, split)


def test_hidden_files_of_other_programs_are_no_images(tmp_path, coco):
    root = write_yolo(tmp_path / "set")
    (root / "images/train/._a.jpg").write_bytes(b"\0")
    (root / "images/train/Thumbs.db").write_bytes(b"\0")
    (root / "images/train/__MACOSX").mkdir()
    (root / "images/train/__MACOSX/b.jpg").write_bytes(b"\0")
    assert_same(open_split(str(root), None, "train"), open_split(str(coco), None, "train"))


# Single formats


def test_yolo_lists_of_images_and_several_folders(tmp_path, coco):
    root = write_yolo(tmp_path / "set")
    names = [f"./images/train/{image.name}" for image in data_set()["train"]]
    (root / "train.txt").write_text("\r\n".join([*names[:6], *(f"/other/machine/set/{n[2:]}" for n in names[6:])]))
    about = yaml.safe_load((root / "data.yaml").read_text())
    (root / "data.yaml").write_text(yaml.safe_dump(about | {"train": "train.txt"}))
    expected = open_split(str(coco), None, "train")
    listed = open_split(str(root), None, "train")
    assert listed.file_names.to_pylist() == [f"images/train/{name}" for name in expected.file_names.to_pylist()]
    assert np.array_equal(listed.boxes_xywh_px, expected.boxes_xywh_px)
    (root / "data.yaml").write_text(yaml.safe_dump(about | {"train": ["images/train", "images/val"]}))
    both = open_split(str(root), None, "train")
    assert len(both) == 17 and both.images_root == str(root / "images")


def test_yolo_without_a_data_file(tmp_path, coco):
    """As labelling tools export it: classes.txt, images and labels, and no split."""
    root = write_yolo(tmp_path / "set", "images")
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    parts = [Holdout(0.3).part(open_undivided(str(root), None), split) for split in ("train", "val")]
    assert sum(map(len, parts)) == 17 and min(map(len, parts)) > 1
    assert all(dict(part.categories) == dict(enumerate(NAMES)) for part in parts)


def test_yolo_rows_may_have_keypoints(tmp_path, coco):
    root = write_yolo(tmp_path / "set")
    about = yaml.safe_load((root / "data.yaml").read_text())
    (root / "data.yaml").write_text(yaml.safe_dump(about | {"kpt_shape": [2, 3]}))
    for path in (root / "labels").rglob("*.txt"):
        path.write_text("\n".join(f"{row} 0.1 0.1 2 0.9 0.9 1" for row in path.read_text("utf-8-sig").splitlines()))
    assert_same(open_split(str(root), None, "train"), open_split(str(coco), None, "train"))


def test_voc_difficult_objects_are_crowds(tmp_path):
    root = write_voc(tmp_path / "set")
    image = data_set()["train"][0]
    path = (root / "Annotations" / image.name).with_suffix(".xml")
    path.write_text(voc_xml(image).replace("<difficult>0", "<difficult>1", 1), encoding="utf-8")
    index = open_split(str(root), None, "train")
    assert index.is_crowd.tolist().count(True) == 1 and index.is_crowd[0]
    assert index.problems["boxes_difficult"] == 1


def test_the_original_voc_counts_pixels_from_one(tmp_path):
    root = write_voc(tmp_path / "set")
    plain = open_split(str(root), None, "val").boxes_xywh_px
    for path in (root / "Annotations").iterdir():
        source = "<source><database>The VOC2007 Database</database></source>"
        path.write_text(path.read_text(encoding="utf-8").replace("<size>", f"{source}<size>"), encoding="utf-8")
    plain[:] += [-1, -1, 1, 1]
    assert np.array_equal(open_split(str(root), None, "val").boxes_xywh_px, plain)


def test_voc_finds_images_by_the_name_of_their_file(tmp_path, coco):
    """What <filename> says is often left from before the images were renamed."""
    root = write_voc(tmp_path / "set", lists=False)
    for path in root.rglob("*.xml"):
        path.write_text(path.read_text(encoding="utf-8").replace("<filename>", "<filename>old/"), encoding="utf-8")
    assert_same(open_split(str(root), None, "train"), open_split(str(coco), None, "train"))


@pytest.mark.parametrize("form", ["classes.txt", "classes.csv"])
def test_class_files_say_which_number_a_class_has(tmp_path, form):
    for write in (write_csv, write_voc):
        root = write(tmp_path / write.__name__)
        names = [*NAMES[::-1], "a new one"]
        rows = names if form == "classes.txt" else [f'"{name}",{number}' for number, name in enumerate(names)]
        (root / form).write_text("\n".join(rows), encoding="utf-8")
        if form == "classes.csv" and write is write_voc:
            continue
        for split in ("train", "val"):
            assert dict(open_split(str(root), None, split).categories) == dict(enumerate(names))


def test_categories_are_those_of_all_splits(tmp_path):
    """A class that only validation images have is in the training set's list, at the same number."""
    root = write_csv(tmp_path / "set")
    with (root / "val.csv").open("a", encoding="utf-8") as file:
        file.write(f"{data_set()['val'][0].name},1,1,9,9,aardvark\n")
    names = {split: dict(open_split(str(root), None, split).categories) for split in ("train", "val")}
    assert names["train"] == names["val"] and names["train"][2] == "aardvark"


def test_an_image_that_exif_turns_has_the_size_that_people_see(tmp_path):
    from coco_folder import encoded

    root = write_csv(tmp_path / "set")
    name = data_set()["train"][0].name
    (root / "train" / name).write_bytes(encoded(size=SIZES[0], orientation=6))
    index = open_split(str(root), None, "train")
    assert (index.heights[0], index.widths[0]) == SIZES[0][::-1]


def test_progress_of_reading_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("detr_ray.data.formats.folder._GROUP_FILES", 5)
    told: dict[str, list[tuple[int, int]]] = {}
    reading = Reading(pace=lambda what: lambda *counts: told.setdefault(what, []).append(counts))
    open_split(str(write_yolo(tmp_path / "yolo")), None, "train", reading=reading)
    assert told.pop("read the sizes of") == [(12, 12)]
    (counts,) = told.values()
    assert set(told) == {"read the labels of"} and [done for done, _ in counts] == [5, 10, counts[-1][1]]
    told.clear()
    open_split(str(write_voc(tmp_path / "voc")), None, "train", reading=reading)
    assert told["read the labels of"] == [(5, 12), (10, 12), (12, 12), (5, 5)], "of both splits: they share classes"


# Dividing


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """A CSV of frames of videos; each video has one class of its own, and one that all have."""
    root = tmp_path_factory.mktemp("frames")

    def write(num_videos: int, num_frames: int) -> Path:
        folder = root / f"{num_videos}-{num_frames}"
        if not folder.exists():
            (folder / "images").mkdir(parents=True)
            rows = []
            for video in range(num_videos):
                for frame in range(num_frames):
                    name = f"video{video:03d}_{frame:04d}.jpg"
                    rows += [f"{name},1,1,9,9,all,50,40", f"{name},2,2,9,9,rare{video % 5},50,40"]
            header = "path,x1,y1,x2,y2,class,width,height"
            (folder / "labels.csv").write_text("\n".join([header, *rows]))
        return folder

    return write


def divided(root: Path, **values) -> dict[str, set[str]]:
    parts = {
        split: Holdout(**values).part(open_undivided(str(root), None), split).file_names.to_pylist()
        for split in ("train", "val")
    }
    assert not set(parts["train"]) & set(parts["val"])
    return {split: set(names) for split, names in parts.items()}


def test_about_the_share_is_held_out_and_more_images_move_no_other(frames):
    before, after = divided(frames(20, 40), val=0.2), divided(frames(30, 60), val=0.2)
    assert 0.15 < len(before["val"]) / 800 < 0.25
    assert before["val"] <= after["val"] and before["train"] <= after["train"]
    assert divided(frames(20, 40), val=0.2, seed=1) != before
    assert divided(frames(20, 40), val=0.2) == before


def test_groups_stay_together(frames):
    parts = divided(frames(30, 60), val=0.2, group_by=r"^(video\d+)_")
    videos = {split: {name[:8] for name in names} for split, names in parts.items()}
    assert not videos["train"] & videos["val"] and len(videos["train"] | videos["val"]) == 30
    assert divided(frames(30, 60), val=0.2, group_by=r"^video\d+") == parts


def test_each_class_is_on_both_sides_if_it_can_be(frames):
    root = frames(10, 1)  # 5 classes of two images each
    for seed in range(6):
        for split in ("train", "val"):
            index = Holdout(0.2, seed=seed).part(open_undivided(str(root), None), split)
            assert len(set(index.category_ids.tolist())) == 6
            assert len(index.categories) == 6


def test_what_cannot_be_divided_is_refused(frames, tmp_path, coco):
    with pytest.raises(DataError, match=r"cannot divide it: its 40 images are one group, 'v'"):
        divided(frames(10, 4), val=0.2, group_by="^v")
    with pytest.raises(DataError, match=r"group_by \(cat\) matches no file name; the first is video000_0000\.jpg"):
        divided(frames(10, 4), val=0.2, group_by="cat")
    with pytest.raises(DataError, match=r"has validation images of its own: set data\.split=null"):
        divided(coco, val=0.2)


def test_a_divided_set_is_its_images_and_nothing_else(coco, tmp_path):
    """Also of a COCO file that is named by itself, and of shards."""
    places = places_of(coco)
    whole = open_split(None, places, "train")
    write_shards(whole, tmp_path / "shards")
    packed = SimpleNamespace(annotations=None, images=None, shards=str(tmp_path / "shards"))
    for split in ("train", "val"):
        part = Holdout(0.4).part(open_undivided(None, places), split)
        assert 0 < len(part) < 12
        content = json.loads((coco / "annotations/instances_train2017.json").read_text())
        boxes = [entry["bbox"] for entry in content["annotations"] if entry["image_id"] in part.image_ids]
        assert part.boxes_xywh_px.tolist() == boxes
        assert_same(Holdout(0.4).part(open_undivided(None, packed), split), part)


def test_links_out_of_the_folder_are_read_only_if_that_is_meant(tmp_path, coco):
    """A folder of images that is a link is followed; links to images or labels elsewhere are not."""
    root = write_yolo(tmp_path / "set")
    (root / "images/val").rename(tmp_path / "val")
    (root / "images/val").symlink_to(tmp_path / "val")
    assert_same(open_split(str(root), None, "val"), open_split(str(coco), None, "val"))
    image = root / "images/train" / data_set()["train"][0].name
    label = (root / "labels/train" / image.name).with_suffix(".txt")
    for path in (image, label):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
        with pytest.raises(DataError, match=rf"{path.name}: a link that leads out .*; .*data\.follow_links=true"):
            open_split(str(root), None, "train")
        assert_same(open_split(str(root), None, "train", follow_links=True), open_split(str(coco), None, "train"))


def test_images_that_are_not_annotated_are_left_out_and_counted(tmp_path, coco):
    root = write_voc(tmp_path / "set", lists=False)
    put_images(root / "train", data_set()["val"][:2])
    index = open_split(str(root), None, "train")
    assert_same(index, open_split(str(coco), None, "train"))
    assert index.problems["images_not_annotated"] == 2
