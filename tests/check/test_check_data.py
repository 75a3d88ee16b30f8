"""The check of data: faults that are made on disk, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from coco_folder import CocoFolder, encoded, sound_folder
from data.format_sets import FORMATS
from ports import free_port

from detr_ray.config import load_config
from detr_ray.data.formats import open_split
from detr_ray.data.packing import write_shards
from detr_ray.runtime.shared_places import sample_files


def test_a_sound_set_passes_and_nothing_is_left_behind(check, tmp_path):
    root = sound_folder(tmp_path / "set")
    outcome = check(root)
    assert outcome.code == 0
    assert outcome.report["ok"] is True
    assert outcome.messages("error") == [] and outcome.messages("warning") == []
    assert outcome.out.splitlines()[-2:] == [
        "0 errors, 0 warnings: nothing found that stands in the way of training",
        f"the whole report   {tmp_path}/report/report.json",
    ]
    areas = [line for line in outcome.out.splitlines() if line and not line.startswith(" ")]
    assert areas[:-2] == ["data", "labels", "training", "weights", "storage", "tracking", "images"]
    train = outcome.report["splits"]["train"]
    assert (train["images"], train["annotations"], train["images_seen"], train["decoded"]) == (12, 24, 12, False)
    assert train["boxes_per_image"] == {"mean": 2.0, "p99": 2, "max": 2}
    assert train["boxes_per_category"][1] == {"id": 2, "name": "dog", "boxes": 12}
    assert train["bad_images"] == [] and train["formats"] == {"JPEG": 12}
    assert train["fingerprint"] == open_split(str(root), None, "train").fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "set"]


# Formats


@pytest.mark.parametrize("name", ["yolo", "voc", "csv", "open images"])
def test_other_formats_are_checked_like_coco(check, tmp_path, name):
    root = FORMATS[name](tmp_path / "set")
    outcome = check(root, "train.global_batch_size=2")
    assert outcome.code == 0 and outcome.messages("error") == []
    train = outcome.report["splits"]["train"]
    assert (train["images"], train["categories"], train["images_seen"]) == (12, 4, 12)
    assert train["problems"]["boxes_clipped"] == 1
    files, faults = sample_files(load_config(None, [f"data.root={root}"]))
    assert list(files) == ["data.root (train)", "data.root (val)"] and not faults
    assert all(Path(file).is_file() and str(root) in file for file in files.values())
    file = sorted(
        root.rglob(
            {"yolo": "labels/train/*.txt", "voc": "*.xml", "csv": "train.csv", "open images": "*train*.csv"}[name]
        )
    )[0]
    file.write_bytes(b"\xff\xfe\xff")
    outcome = check(root)
    assert outcome.code == 1 and file.name in " ".join(outcome.messages("error", "data"))


# Images


@pytest.mark.parametrize("options", [[], ["--decode"]])
def test_all_bad_images_are_told_in_one_go(check, tmp_path, options):
    folder = CocoFolder(tmp_path / "set")
    folder.fill("train", 10)
    folder.fill("val", 4)
    folder.add("train", "missing.jpg", None)
    folder.add("train", "empty.jpg", b"")
    folder.add("train", "cut.jpg", encoded()[:-500])
    folder.add("train", "other-size.jpg", encoded(size=(32, 32)))
    folder.add("train", "really-a-png.jpg", encoded("PNG"))
    folder.add("train", "cmyk.jpg", encoded(mode="CMYK"))
    folder.add("train", "on-its-side.jpg", encoded(orientation=6, size=(64, 48)))
    folder.add("val", "missing-too.jpg", None)
    outcome = check(folder.write(), *options)
    assert outcome.code == 1
    assert outcome.report["ok"] is False
    splits = outcome.report["splits"]
    reasons = {Path(bad["file"]).name: bad["reason"] for bad in splits["train"]["bad_images"]}
    assert list(reasons) == ["missing.jpg", "empty.jpg", "cut.jpg", "other-size.jpg"]
    assert reasons["missing.jpg"] == "no such file"
    assert reasons["other-size.jpg"] == "the image is 32x32 (height x width) but the annotations say 48x64"
    assert [bad["image_id"] for bad in splits["val"]["bad_images"]] == [1005]
    assert splits["train"]["formats"] == {"JPEG": 12, "PNG": 1}
    assert splits["train"]["modes"]["CMYK"] == 1
    assert splits["train"]["images_turned"] == 1
    messages = outcome.messages("error", "images")
    assert messages[0].startswith("train: 4 of 17 images cannot be used | replace these files")
    assert "data.on_bad_image=skip" in messages[0]
    assert messages[1].startswith("val: 1 of 5 images cannot be used")
    assert f"{tmp_path}/set/train2017/missing.jpg: no such file" in outcome.out
    assert outcome.out.splitlines()[-2] == "2 errors, 0 warnings: training would fail, now or later"


def test_long_lists_are_cut_for_people_and_whole_for_programs(check, tmp_path):
    folder = CocoFolder(tmp_path / "set")
    folder.fill("train", 10)
    folder.fill("val", 4)
    for number in range(25):
        folder.add("train", f"missing{number:02d}.jpg", None)
    outcome = check(folder.write())
    assert outcome.out.count("no such file") == 10
    assert "and 15 more" in outcome.out
    (finding,) = [finding for finding in outcome.report["findings"] if finding["level"] == "error"]
    assert len(finding["names"]) == len(outcome.report["splits"]["train"]["bad_images"]) == 25


def test_skipping_bad_images_makes_them_warnings_as_far_as_training_bears_them(check, tmp_path):
    folder = CocoFolder(tmp_path / "set")
    folder.fill("train", 10)
    folder.fill("val", 4)
    folder.add("train", "empty1.jpg", b"")
    folder.add("train", "empty2.jpg", b"")
    root = folder.write()
    skip = ["data.on_bad_image=skip", "train.epochs=50", "data.max_bad_images="]
    enough = check(root, *skip[:2], skip[2] + "2")
    assert enough.code == 0
    assert "2 of 12 images cannot be used" in enough.only("warning", "images")
    too_few = check(root, *skip[:2], skip[2] + "1")
    assert too_few.code == 1
    assert "or set data.max_bad_images to 2" in too_few.only("error", "images")
    folder.add("val", "empty.jpg", b"")
    root = folder.write()
    assert check(root, *skip[:2], skip[2] + "2").code == 0, "it counts as without detections"
    refused = check(root)
    assert refused.code == 1
    assert "data.on_bad_image=skip counts them as images without" in refused.messages("error", "images")[1]


def test_a_wrong_images_folder_is_one_error(check, tmp_path):
    root = sound_folder(tmp_path / "set")
    places = [
        f"data.{split}.{key}={root}/{place}"
        for split in ("train", "val")
        for key, place in (("annotations", f"annotations/instances_{split}2017.json"), ("images", "val2017"))
    ]
    outcome = check(None, *places, f"data.train.images={root}/annotations")
    assert outcome.code == 1
    assert outcome.only("error", "images") == (
        "train: 12 of 12 images cannot be used | none of the images is usable: is the folder right (data.train.images, "
        "or data.root)?"
    )
    outcome = check(None, *places, f"data.train.images={root}/nowhere")
    assert outcome.only("error", "images") == (
        f"train: {root}/nowhere: no such folder | set data.train.images, or data.root"
    )


def test_orientation_that_the_size_does_not_show_is_a_warning(check, tmp_path):
    folder = CocoFolder(tmp_path / "set")
    folder.fill("train", 10)
    folder.fill("val", 4)
    folder.add("train", "upside-down.jpg", encoded(orientation=3))
    outcome = check(folder.write())
    assert outcome.code == 0
    assert "1 of 11 images have an EXIF orientation" in outcome.only("warning", "images")


# Annotations and labels


def test_an_annotation_file_of_no_use_does_not_end_the_check(check, tmp_path):
    folder = CocoFolder(tmp_path / "set")
    folder.fill("train", 10)
    folder.fill("val", 3)
    folder.add("train", "of-unknown-category.jpg", encoded(), boxes=[(99, 1, 1, 10, 10)])
    folder.add("val", "missing.jpg", None)
    outcome = check(folder.write(), f"tracking.uri=http://127.0.0.1:{free_port()}")
    assert outcome.code == 1
    assert "category_id" in outcome.only("error", "data") and "99" in outcome.only("error", "data")
    assert outcome.only("error", "images").startswith("val: 1 of 4")
    assert "does not answer" in outcome.only("error", "tracking")
    assert "can be written and read" in outcome.messages("ok", "storage")[0]
    assert list(outcome.report["splits"]) == ["val"]


def test_missing_annotation_files_are_all_told(check, tmp_path):
    (tmp_path / "set" / "annotations").mkdir(parents=True)
    for root, options, said in [
        (tmp_path / "nowhere", (), f"{tmp_path}/nowhere: there is no such folder"),
        (tmp_path / "set", ("data.format=coco",), "no such annotation file"),
    ]:
        outcome = check(root, *options)
        assert outcome.code == 1
        assert len(outcome.messages("error", "data")) == 2
        assert all(said in message for message in outcome.messages("error", "data"))


def test_quirks_are_counted_and_losses_warned_of(check, tmp_path):
    folder = CocoFolder(tmp_path / "set")
    folder.fill("train", 10)
    folder.fill("val", 4)
    folder.add("train", "odd.jpg", encoded(), boxes=[(1, 100, 4, 9, 9), (1, 4, 4, 0, 9), (1, 60, 4, 9, 9)])
    folder.add("train", "bare.jpg", encoded(), boxes=[])
    folder.add("train", "odd.jpg", encoded(), boxes=[(2, 4, 4, 9, 9)])
    del folder.annotations["train"][0]["area"]
    outcome = check(folder.write())
    assert outcome.code == 0
    assert outcome.report["splits"]["train"]["problems"] == {
        "areas_missing": 1,
        "boxes_clipped": 1,
        "boxes_outside": 1,
        "boxes_without_area": 1,
        "files_repeated": 1,
        "images_without_boxes": 1,
    }
    warning = outcome.only("warning", "data")
    assert "1 boxes wholly outside" in warning and "1 boxes without area" in warning
    assert "1 images whose file is that of another image" in warning
    assert "without a usable area" not in warning
    assert outcome.report["splits"]["train"]["images_without_boxes"] == 1


def test_labels_that_do_not_fit_are_errors(check, tmp_path):
    folder = CocoFolder(tmp_path / "set")
    folder.fill("train", 10)
    folder.fill("val", 4)
    folder.categories["val"] = ((1, "cat"), (2, "dog"), (3, "horse"))
    root = folder.write()
    assert "3 'horse' is not known" in check(root).only("error", "labels")
    assert "its categories are not COCO's" in check(root, "data.label_space=coco91").only("error", "labels")


def test_classes_without_boxes_are_named(check, tmp_path):
    categories = ((1, "cat"), (2, "dog"), (3, "horse"), (4, "cow"))
    folder = CocoFolder(tmp_path / "set", categories)
    folder.fill("train", 10)
    folder.fill("val", 3)
    folder.add("train", "one-cow.jpg", encoded(), boxes=[(4, 5, 5, 20, 20)])
    folder.add("val", "a-horse.jpg", encoded(), boxes=[(3, 5, 5, 20, 20)])
    outcome = check(folder.write())
    assert outcome.code == 0
    findings = {finding["message"]: finding["names"] for finding in outcome.report["findings"]}
    assert findings["1 of 4 classes have boxes in val and none in train"] == ["horse: 1"]
    assert findings["1 of 4 classes have no training box"] == ["horse"]
    assert findings["1 of 4 classes have fewer than 10 training boxes"] == ["cow: 1"]


def test_classes_whose_names_are_nearly_alike_are_named(check, tmp_path):
    folder = CocoFolder(tmp_path / "set", ((1, "RBC"), (2, "rust spot"), (3, "rbc"), (4, "Rustspot"), (5, "RBC")))
    folder.fill("train", 10)
    folder.fill("val", 3)
    findings = {finding["message"]: finding["names"] for finding in check(folder.write()).report["findings"]}
    alike = "4 classes have names that differ from another's in blanks or case alone"
    assert findings[alike] == ["RBC", "rust spot", "rbc", "Rustspot"]


def test_boxes_are_held_against_queries_and_detections(check, tmp_path):
    folder = CocoFolder(tmp_path / "set")
    folder.fill("train", 10)
    folder.fill("val", 4)
    for split in ("train", "val"):
        folder.add(split, "crowded.jpg", encoded(), boxes=[(1, x, 4, 8, 8) for x in range(12)])
    root = folder.write()
    few_queries = check(root)
    assert few_queries.code == 0
    train, val = few_queries.messages("warning", "labels")
    assert "train: 1 of 11 images have more boxes than model.num_queries=10 (at most 12)" in train
    assert "set model.num_queries to more than 12" in train
    assert "val: 1 of 5 images have more boxes than model.num_queries=10 (at most 12)" in val
    few_detections = check(root, "model.num_queries=20", "eval.max_detections=5")
    assert "more boxes than eval.max_detections=5" in few_detections.only("warning", "labels")
    assert check(root, "model.num_queries=12").messages("warning", "labels") == []


def test_a_set_without_any_box_is_an_error(check, tmp_path):
    folder = CocoFolder(tmp_path / "set")
    for number in range(5):
        folder.add("train", f"{number}.jpg", encoded(), boxes=[])
    folder.fill("val", 4)
    assert "not one box to learn from" in check(folder.write()).only("error", "labels")


# Other forms of data


def test_shards_are_checked_as_folders_are(check, tmp_path):
    root = sound_folder(tmp_path / "set")
    places = []
    for split in ("train", "val"):
        write_shards(open_split(str(root), None, split), tmp_path / "shards" / split)
        places.append(f"data.{split}.shards={tmp_path}/shards/{split}")
    outcome = check(None, *places, "--decode")
    assert outcome.code == 0
    assert outcome.report["splits"]["train"]["images_seen"] == 12
    (tmp_path / "shards" / "train" / "shard-00000.parquet").unlink()
    outcome = check(None, *places)
    assert outcome.code == 1
    assert "1 of 1 shards cannot be used" in outcome.only("error", "images")
    assert outcome.report["splits"]["train"]["images_seen"] == 0
    assert outcome.report["splits"]["val"]["images_seen"] == 4


def test_data_that_is_yet_to_be_drawn(check, tmp_path):
    root = tmp_path / "drawn"
    keys = ["data.generate.num_train=8", "data.generate.num_val=2"]
    outcome = check(root, *keys)
    assert outcome.code == 0
    assert "10 images are drawn into it when training starts" in outcome.messages("ok", "data")[0]
    assert outcome.report["splits"] == {}
    assert not root.exists()
    (tmp_path / "file").write_text("")
    assert "cannot be written" in check(tmp_path / "file" / "drawn", *keys).only("error", "data")
    other = check(sound_folder(tmp_path / "set"), *keys)
    assert "it is not a generated data set" in other.only("error", "data")
