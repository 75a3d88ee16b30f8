"""Names of the annotation file as paths: none leads out of the folder; one that misses its file says where that is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from coco_folder import CocoFolder, encoded

from detr_ray.check import main as check
from detr_ray.config import load_config
from detr_ray.data.errors import DataError
from detr_ray.data.formats import open_split
from detr_ray.data.image_headers import ImageError
from detr_ray.data.images import ImageReader
from detr_ray.data.inspection import inspect_images
from detr_ray.data.packing import write_shards
from detr_ray.prepare import main as prepare
from detr_ray.runtime.shared_places import sample_files


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "secret.txt").write_bytes(encoded())
    return CocoFolder(tmp_path / "set")


def reader_of(folder: CocoFolder, follow_links: bool = False) -> ImageReader:
    return ImageReader(open_split(str(folder.write()), None, "train", follow_links))


# Links


def link(folder: CocoFolder, name: str, target: Path) -> None:
    path = folder.root / "train2017" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    folder.add("train", name if target.is_file() else f"{name}/secret.txt", None)


@pytest.mark.parametrize("kind", ["file", "folder", "link to a link"])
def test_links_out_of_the_folder_are_refused_everywhere(folder, tmp_path, kind):
    folder.fill("val", 2)
    if kind == "file":
        link(folder, "a.jpg", tmp_path / "secret.txt")
    elif kind == "folder":
        link(folder, "sub", tmp_path)
    else:
        (folder.root / "train2017").mkdir(parents=True)
        (folder.root / "train2017" / "b.jpg").symlink_to(tmp_path / "secret.txt")
        link(folder, "a.jpg", folder.root / "train2017" / "b.jpg")
    reader = reader_of(folder)
    for read in (reader.read, reader.read_head, reader.read_header, lambda i: reader.read_end(i, 2)):
        with pytest.raises(ImageError, match=r"train2017/.*: a link that leads out .* set data\.follow_links=true"):
            read(0)
    index = open_split(str(folder.root), None, "train")
    assert len(inspect_images(index).bad) == 1
    with pytest.raises(DataError, match="a link that leads out"):
        write_shards(index, tmp_path / "shards")
    files, faults = sample_files(load_config(None, [f"data.root={folder.root}"]))
    assert list(files) == ["data.root (val)"]
    assert "a link that leads out" in faults["data.root (train)"]
    assert reader_of(folder, follow_links=True).read(0) == encoded()
    assert inspect_images(open_split(str(folder.root), None, "train", True)).bad == []


def test_links_that_stay_inside_and_a_folder_that_is_one_are_followed(folder, tmp_path):
    inside = folder.add("train", "a.jpg", encoded())
    (inside.parent / "sub").mkdir()
    (inside.parent / "sub" / "b.jpg").symlink_to(inside)
    folder.add("train", "sub/b.jpg", None)
    root = folder.write()
    (tmp_path / "elsewhere").symlink_to(root)
    index = open_split(str(tmp_path / "elsewhere"), None, "train")
    assert [ImageReader(index).read(i) for i in (0, 1)] == [encoded()] * 2
    assert inspect_images(index, decode=True).bad == []


def test_the_key_reaches_every_command(folder, tmp_path, capsys):
    folder.fill("val", 2)
    link(folder, "a.jpg", tmp_path / "secret.txt")
    keys = [f"data.root={folder.write()}", f"run.storage={tmp_path}/runs", "train.global_batch_size=1", "eval.size=48",
            "model.backbone_weights=none", "model.backbone_norm=batch", "tracking.enabled=false"]  # fmt: skip
    assert check(keys) == 1
    assert "set data.follow_links=true" in capsys.readouterr().out
    assert prepare([*keys, "--shards", f"{tmp_path}/shards"]) == 2
    assert "set data.follow_links=true" in capsys.readouterr().err
    assert prepare([*keys, "data.follow_links=true", "--shards", f"{tmp_path}/shards"]) == 0
    assert check([*keys, "data.follow_links=true"]) == 0


# Names


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret.txt", "sub/../../secret.txt", "", "a\0b", "se\udcf1or"])
def test_no_file_of_the_machine_is_sampled(folder, name):
    folder.fill("val", 1)
    folder.add("train", "a.jpg", encoded())
    folder.images["train"][0]["file_name"] = name
    files, faults = sample_files(load_config(None, [f"data.root={folder.write()}"]))
    assert list(files) == ["data.root (val)"]
    assert list(faults) == ["data.root (train)"]


def test_what_is_sampled_is_what_data_tasks_read(folder):
    folder.fill("val", 1)
    folder.add("train", "sub/a b.jpg", encoded())
    files, faults = sample_files(load_config(None, [f"data.root={folder.write()}"]))
    assert files["data.root (train)"] == f"{folder.root}/train2017/sub/a b.jpg"
    assert Path(files["data.root (train)"]).is_file() and not faults


def test_absolute_names_inside_of_the_folder_are_names_in_it(folder, tmp_path):
    path = folder.add("train", "sub/a.jpg", encoded())
    folder.images["train"][0]["file_name"] = str(path)
    assert reader_of(folder).read(0) == encoded()
    (tmp_path / "linked").symlink_to(folder.root)
    index = open_split(str(tmp_path / "linked"), None, "train")
    assert ImageReader(index).read(0) == encoded()
    assert inspect_images(index).bad == []
    files, _ = sample_files(load_config(None, [f"data.root={folder.root}", "data.max_images=1"]))
    assert files["data.root (train)"] == str(path)


MISNAMED = [
    ("sub\\img.jpg", "sub/img.jpg", "Windows paths: write /"),
    ("C:\\data\\x\\img.jpg", "img.jpg", "begins with other folders"),
    ("my%20img.jpg", "my img.jpg", "URL-encoded"),
    ("%E6%9C%88.jpg", "月.jpg", "URL-encoded"),
    ("train2017/img.jpg", "img.jpg", "begins with other folders"),
    ("/home/other/img.jpg", "img.jpg", "begins with other folders"),
    ("../train2017/img.jpg", "img.jpg", "begins with other folders"),
    ("img.jpg", "img.JPG", "extension is written in other letters"),
    ("img", "img.jpg", "lacks the extension"),
    ("sen\u0303or.jpg", "se\u00f1or.jpg", "Unicode's form NFC"),
]


@pytest.mark.parametrize(("given", "there", "advice"), MISNAMED)
def test_names_written_in_another_way_are_told_apart_from_missing_files(folder, tmp_path, capsys, given, there, advice):
    for split in ("train", "val"):
        folder.add(split, there, encoded())
        folder.images[split][0]["file_name"] = given
    reader = reader_of(folder)
    with pytest.raises(ImageError) as caught:
        reader.read(0)
    assert f", but {there} is there: " in str(caught.value)
    report = tmp_path / "report.json"
    keys = [f"data.root={folder.root}", f"run.storage={tmp_path}/runs", "train.global_batch_size=1", "eval.size=48",
            "model.backbone_weights=none", "model.backbone_norm=batch", "tracking.enabled=false"]  # fmt: skip
    assert check([*keys, "--json", str(report)]) == 1
    found = [f for f in json.loads(report.read_text())["findings"] if f["level"] == "error" and f["area"] == "images"]
    assert [advice in finding["advice"] for finding in found] == [True, True]
    assert prepare([*keys, "--shards", str(tmp_path / "shards")]) == 2
    assert advice in capsys.readouterr().err


def test_a_file_that_is_missing_is_just_missing(folder):
    folder.add("train", "sub/gone.jpg", None)
    with pytest.raises(ImageError, match=r"sub/gone\.jpg: no such file$"):
        reader_of(folder).read(0)
