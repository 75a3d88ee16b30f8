"""The check command: faults that are made on disk, what is said of them, the report as JSON, exit codes.

Run alone: ``pytest tests/test_check.py``. Most tests call the command in this process; none starts Ray.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from coco_folder import CocoFolder, encoded, sound_folder
from data.format_sets import FORMATS
from ports import free_port
from terminal import COLOUR, terminal

from detr_ray.check import main
from detr_ray.config import load_config
from detr_ray.data.formats import open_split
from detr_ray.data.packing import write_shards
from detr_ray.engine.preflight import training
from detr_ray.engine.preflight.storage import checkpoint_bytes
from detr_ray.engine.preflight.writing import within
from detr_ray.engine.reporting.progress import Pace
from detr_ray.engine.training_step.optimizer import build_optimizer
from detr_ray.model import build_model
from detr_ray.runtime.shared_places import sample_files

ROOT = Path(__file__).parents[1]

SMALL = [
    "model.backbone=resnet18", "model.backbone_norm=batch", "model.backbone_weights=none", "model.hidden_dim=32",
    "model.dim_feedforward=32", "model.encoder_layers=1", "model.decoder_layers=1", "model.num_queries=10",
    "data.augment.scales=[48]", "data.augment.crop=0", "eval.size=48", "train.global_batch_size=4",
    "train.num_workers=2", "train.epochs=10000",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_tracking_in_the_environment(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


CHECK_MEMORY = training.check_memory


@pytest.fixture(autouse=True)
def no_estimate_of_memory(monkeypatch):
    """It takes half a second each time; its own tests are in ``engine/test_memory_estimate.py``."""
    monkeypatch.setattr(training, "check_memory", lambda *arguments: None)


class Outcome:
    """What a run of the command gave."""

    def __init__(self, code: int, out: str, report: dict) -> None:
        self.code, self.out, self.report = code, out, report

    def messages(self, level: str, area: str | None = None) -> list[str]:
        return [
            f"{finding['message']} | {finding['advice']}"
            for finding in self.report["findings"]
            if finding["level"] == level and area in (None, finding["area"])
        ]

    def only(self, level: str, area: str) -> str:
        (message,) = self.messages(level, area)
        return message


@pytest.fixture
def check(tmp_path, capsys):
    """Runs the command on a small model, with the keys given, and reads its report back."""

    def run(root: Path | None, *argv: str) -> Outcome:
        report = tmp_path / "report" / "report.json"
        data = [] if root is None else [f"data.root={root}"]
        code = main([*SMALL, *data, f"run.storage={tmp_path}/runs", *argv, "--json", str(report)])
        return Outcome(code, capsys.readouterr().out, json.loads(report.read_text()))

    return run


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
    del folder.annotations["train"][0]["area"]
    outcome = check(folder.write())
    assert outcome.code == 0
    assert outcome.report["splits"]["train"]["problems"] == {
        "areas_missing": 1,
        "boxes_clipped": 1,
        "boxes_outside": 1,
        "boxes_without_area": 1,
        "images_without_boxes": 1,
    }
    warning = outcome.only("warning", "data")
    assert "1 boxes wholly outside" in warning and "1 boxes without area" in warning
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


# The training plan


def test_steps_and_shapes_are_those_of_training(check, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "check_memory", CHECK_MEMORY)
    root = sound_folder(tmp_path / "set", num_train=13)
    messages = check(root, "train.epochs=4000", "data.augment.scales=[96]", "eval.batch_size=3").messages(
        "ok", "training"
    )
    assert messages[0].startswith("steps: 3 an epoch, 12000 in all, of 4 images each")
    assert "largest training image 96x128 (height x width)" in messages[1]
    assert "forward pass 2 x 96x128 (2 workers); in validation 3 x 48x64" in messages[1]
    assert "a step of the largest batch takes about" in messages[2]
    one_by_one = check(root, "train.num_workers=null", "train.micro_batch_size=3").messages("ok", "training")
    assert "forward pass 2 x 48x64 (one worker" in one_by_one[1]


def test_transforms_that_do_not_end_before_the_training_are_named(check, tmp_path):
    root = sound_folder(tmp_path / "set", num_train=12)
    transforms = "data.augment.transforms=[mosaic: {until_epoch: 9}, mixup: {until_epoch: 8}, grayscale, detr]"
    (said,) = (m for m in check(root, transforms, "train.epochs=9").messages("warning", "training") if "mosaic" in m)
    assert "mosaic (until_epoch: 9) would be on until the end: train.epochs is 9" in said and "mixup" not in said
    assert not any(
        "until_epoch" in m for m in check(root, transforms, "train.epochs=10").messages("warning", "training")
    )


def test_what_an_epoch_takes_is_counted(check, tmp_path):
    root = sound_folder(tmp_path / "set", num_train=12)
    outcome = check(root, "data.balance={repeat_threshold: 1, background: 0}")
    message = next(line for line in outcome.messages("ok", "training") if "data.balance" in line)
    assert "samples of 12 images (data.balance); 0.0% of them have no box" in message
    assert not any("data.balance" in line for line in check(root).messages("ok", "training"))
    weights = check(root, "data.balance={class_weights: {dgo: 3}}").only("error", "training")
    assert "data.balance.class_weights: there is no class 'dgo'; did you mean 'dog'?" in weights


def test_what_an_epoch_takes_of_each_source_is_counted(check, tmp_path):
    first, second = (sound_folder(tmp_path / name, num_train=count) for name, count in (("a", 12), ("b", 4)))
    val = f"data.val={{annotations: {first}/annotations/instances_val2017.json, images: {first}/val2017}}"
    outcome = check(None, f"data.sources=[{{root: {first}}}, {{root: {second}, weight: 3}}]", val)
    (found,) = (f for f in outcome.report["findings"] if "2 data sets (data.sources)" in f["message"])
    assert [name.rpartition(".json: ")[2] for name in found["names"]] == [
        "12 images: 12 samples (50%)", "4 images: 12 samples (50%)",
    ]  # fmt: skip
    assert not any("data.sources" in line for line in check(first).messages("ok", "training"))


def test_names_of_parameters_are_those_of_the_model(check, tmp_path):
    root = sound_folder(tmp_path / "set", num_train=12)
    outcome = check(root, "optim.freeze=[backbon.*]", "optim.lr_factors={nothing: 2}")
    faults = "\n".join(outcome.messages("error", "training"))
    assert "fits 'backbon.*'; nearest: backbone" in faults and "has a name with nothing" in faults


def test_too_few_images_for_a_step_is_an_error(check, tmp_path):
    root = sound_folder(tmp_path / "set", num_train=5)
    outcome = check(root, "train.global_batch_size=6")
    assert outcome.code == 1
    assert "set train.global_batch_size to 5 or less" in outcome.only("error", "training")
    assert "1 of 5 images are left out of each epoch" in check(root).only("warning", "training")


def test_training_that_cannot_lead_anywhere_is_a_warning(check, tmp_path):
    root = sound_folder(tmp_path / "set")
    assert "sees 120 images (12, 10 times each)" in check(root, "train.epochs=10").only("warning", "training")
    assert "sees 1200 images" in check(root, "train.max_steps=300").only("warning", "training")
    large = check(root, "data.augment.scales=[256]", "data.augment.max_size=512", "train.epochs=3000")
    enlarged, short = large.messages("warning", "training")
    assert "enlarges its images 5.3 times" in enlarged
    assert "detr usually needs about 1000000" in short
    other = check(root, "train.epochs=10", "model.architecture=dino", "model.num_feature_levels=2")
    assert "dino usually needs about 4000 before" in other.only("warning", "training")


def test_validating_on_the_training_set_and_not_at_all_are_warnings(check, tmp_path):
    root = sound_folder(tmp_path / "set")
    train = [
        f"data.train.annotations={root}/annotations/instances_train2017.json",
        f"data.train.images={root}/train2017",
    ]
    same = [item.replace("data.train.", "data.val.") for item in train]
    assert "the same data" in check(None, *train, *same).only("warning", "data")
    assert "no validation data is given" in check(None, *train).only("warning", "data")


# Storage


@pytest.mark.parametrize("place", ["file/below", "file"])
def test_storage_that_cannot_be_written_is_an_error(check, tmp_path, place):
    root = sound_folder(tmp_path / "set")
    (tmp_path / "file").write_text("")
    outcome = check(root, f"run.storage={tmp_path}/{place}", "tracking.enabled=false")
    assert outcome.code == 1
    assert f"run.storage: {tmp_path}/{place} cannot be used" in outcome.only("error", "storage")
    assert (tmp_path / "file").read_text() == ""


def test_storage_may_be_an_address(check, tmp_path):
    root = sound_folder(tmp_path / "set")
    outcome = check(root, f"run.storage=file://{tmp_path}/runs/deep", "tracking.enabled=false")
    assert outcome.code == 0
    assert not (tmp_path / "runs").exists()
    outcome = check(root, "run.storage=nowhere://bucket/runs", "tracking.enabled=false")
    assert "nowhere://bucket/runs cannot be used" in outcome.only("error", "storage")


def test_a_disk_too_small_for_the_checkpoints_is_an_error(check, tmp_path):
    root = sound_folder(tmp_path / "set")
    assert "GB free" in check(root, "train.keep_last=10000000").only("error", "storage")
    assert "GB free" in check(root).messages("ok", "storage")[1]


def test_the_size_of_a_checkpoint_is_estimated_from_the_model(tmp_path):
    config = load_config(None, [*SMALL, "optim.ema_decay=0.9"])
    model = build_model(config.model, 3)
    optimizer = build_optimizer(model, {"lr": 1e-4, "lr_backbone": 1e-4}, weight_decay=0)
    torch.stack([value.sum() for value in model.parameters() if value.requires_grad]).sum().backward()
    optimizer.step()
    copies = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "ema": copies}, tmp_path / "model.pt")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    model_file, optimizer_file = ((tmp_path / name).stat().st_size for name in ("model.pt", "optimizer.pt"))
    whole, model_alone = checkpoint_bytes(config, 3)
    assert model_alone == pytest.approx(model_file, rel=0.05)
    assert whole == pytest.approx(model_file + optimizer_file, rel=0.05)


def test_work_that_does_not_end_is_not_waited_for():
    never = threading.Event()
    with pytest.raises(TimeoutError, match="no answer within"):
        within(0.05, lambda: never.wait() and None)
    never.set()
    with pytest.raises(OSError, match="disk on fire"):
        within(5, lambda: (_ for _ in ()).throw(OSError("disk on fire")))


# Weights


def save_weights(path: Path, names: list[str], *overrides: str) -> None:
    config = load_config(None, [*SMALL, *overrides])
    model = build_model(config.model, len(names))
    content = {"format": "detr_ray", "model": model.state_dict(), "config": config.model_dump(mode="json")}
    torch.save({**content, "label_map": {"names": names, "category_ids": list(range(len(names)))}}, path)


def test_first_weights_are_compared_with_model_and_classes(check, tmp_path):
    root = sound_folder(tmp_path / "set")
    weights = tmp_path / "weights.pth"
    save_weights(weights, ["dog", "horse", "cow"])
    outcome = check(root, f"model.init_from={weights}", "train.epochs=1")
    assert outcome.code == 0
    assert outcome.messages("warning") == [], "weights to start from need no long training"
    (finding,) = [finding for finding in outcome.report["findings"] if finding["area"] == "weights"]
    assert "2 rebuilt, 0 missing" in finding["message"]
    assert "1 of 2 classes copied by name; fresh: cat" in finding["names"][0]
    outcome = check(root, f"model.init_from={weights}", "model.hidden_dim=64")
    assert "does not fit" in outcome.only("error", "weights")


def test_weights_that_cannot_be_read_are_errors(check, tmp_path):
    root = sound_folder(tmp_path / "set")
    (tmp_path / "text.pth").write_text("not weights")
    for key in ("model.init_from", "model.backbone_weights"):
        assert "there is no file" in check(root, f"{key}={tmp_path}/none.pth").only("error", "weights")
        assert "damaged or no torch file" in check(root, f"{key}={tmp_path}/text.pth").only("error", "weights")
    assert check(root, f"model.init_from={tmp_path}/text.pth/below").code == 1


def test_backbone_weights_from_a_file(check, tmp_path):
    root = sound_folder(tmp_path / "set")
    body = build_model(load_config(None, SMALL).model, 2).body.state_dict()
    torch.save(body, tmp_path / "resnet18.pth")
    assert "fits resnet18" in check(root, f"model.backbone_weights={tmp_path}/resnet18.pth").only("ok", "weights")
    outcome = check(root, f"model.backbone_weights={tmp_path}/resnet18.pth", "model.backbone=resnet34")
    assert "is no resnet34" in outcome.only("error", "weights")


def test_weights_on_a_server_are_asked_for_and_not_fetched(check, tmp_path, monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        methods: list[str] = []

        def do_HEAD(self):
            self.methods.append("HEAD")
            found = self.path == "/there.pth"
            self.send_response(200 if found else 405 if self.path == "/no-head.pth" else 404)
            if found:
                self.send_header("Content-Length", "158000000")
            self.end_headers()

        def do_GET(self):
            self.methods.append("GET")

        def log_message(self, *arguments):
            pass

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    root = sound_folder(tmp_path / "set")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        space = "data.label_space=contiguous"
        there = check(root, f"model.init_from={address}/there.pth", space)
        assert "is fetched when training starts (158 MB)" in there.only("ok", "weights")
        gone = check(root, f"model.init_from={address}/gone.pth", space)
        assert "the server answers 404" in gone.only("error", "weights")
        unknown = check(root, f"model.init_from={address}/no-head.pth", space)
        assert (unknown.code, len(unknown.messages("warning", "weights"))) == (0, 1)
        server.shutdown()
    assert set(Handler.methods) == {"HEAD"}
    dead = check(root, f"model.init_from=http://127.0.0.1:{free_port()}/a.pth", space)
    assert "cannot be fetched" in dead.only("error", "weights")
    kept = tmp_path / "hub" / "checkpoints" / "kept.pth"
    kept.parent.mkdir(parents=True)
    save_weights(kept, ["cat", "dog"])
    fetched = check(root, "model.init_from=http://127.0.0.1:1/kept.pth", space)
    assert f"{kept} can be read" in fetched.only("ok", "weights")


# Tracking


def test_a_dead_tracking_server_is_an_error(check, tmp_path, monkeypatch):
    root = sound_folder(tmp_path / "set")
    dead = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead)
    outcome = check(root)
    assert outcome.code == 1
    assert f"{dead} does not answer" in outcome.only("error", "tracking")
    assert check(root, "tracking.enabled=false").code == 0


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


# The command


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        ([], "error: data.root: no training data is given"),
        (["data.rot=here"], "error: unknown key 'data.rot'; did you mean 'data.root'?"),
        (["data.root=here", "--decod"], "error: '--decod' is neither an option nor key=value"),
    ],
)
def test_an_unusable_configuration_is_exit_code_2(argv, error, capsys):
    assert main([*SMALL, *argv]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith(error)


def test_the_report_can_go_to_standard_output(tmp_path, capsys):
    root = sound_folder(tmp_path / "set")
    assert main([*SMALL, f"data.root={root}", f"run.storage={tmp_path}/runs", "--json", "-"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["ok"] is True
    assert "0 errors, 0 warnings" in output.err


def test_work_on_many_images_is_a_bar_in_a_terminal_and_lines_in_a_log(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("detr_ray.data.image_sizes._GROUP_IMAGES", 4)
    monkeypatch.setattr("detr_ray.data.inspection._GROUP_IMAGES", 4)
    monkeypatch.setattr(Pace.__init__, "__defaults__", (0.0,))
    root = FORMATS["yolo"](tmp_path / "set")  # whose sizes are in the images' headers alone
    argv = [*SMALL, f"data.root={root}", f"run.storage={tmp_path}/runs", "train.global_batch_size=2"]
    pieces = ["read the sizes of", "read the headers of"]
    assert main(argv) == 0
    logged = capsys.readouterr().out
    assert main([*argv, "--json", "-"]) == 0
    piped = capsys.readouterr()
    with terminal(monkeypatch) as shown:
        assert main(argv) == 0
    drawn = b"".join(shown).decode()
    plain = re.sub(COLOUR, "", drawn)
    for piece in pieces:
        assert re.search(rf"\n  train: {piece} 4 of 12 images, \d+ images/s, left ", logged), logged
        assert f"train: {piece}" in piped.err and "{" in piped.out[:2]
        assert re.search(rf"train: {piece} +\d+/12 ━", plain), plain
    assert len(re.findall(" ━+ ", plain)) == 4, "a bar is gone when its work is done"
    assert "\x1b" not in logged + piped.err and "images/s" not in plain
    assert re.search(r"\n0 errors, \d warnings?:", plain.replace("\r", "")), "lines are above the bar"


def test_a_report_that_cannot_be_written_is_told(tmp_path, capsys):
    root = sound_folder(tmp_path / "set")
    (tmp_path / "file").write_text("")
    argv = [f"data.root={root}", f"run.storage={tmp_path}/runs", "--json", f"{tmp_path}/file/report.json"]
    assert main([*SMALL, *argv]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_as_a_process(tmp_path):
    root = sound_folder(tmp_path / "set")
    argv = [f"data.root={root}", f"run.storage={tmp_path}/runs", "train.global_batch_size=100"]
    command = [sys.executable, "-m", "detr_ray.check", *SMALL, *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert result.returncode == 1
    assert "error    12 training images are too few for one step" in result.stdout
    assert "Traceback" not in result.stderr
