"""The prepare command: drawing data, packing it into shards, going on, refusing, and the command that it prints.

Run alone: ``pytest tests/test_prepare.py``. Most tests call the command in this process; none starts Ray.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from coco_folder import CocoFolder, encoded, sound_folder
from defaults import draw_shapes

from detr_ray.config import load_config
from detr_ray.data.formats import open_split
from detr_ray.data.images import ImageReader
from detr_ray.engine.reporting import progress
from detr_ray.engine.reporting.progress import Pace
from detr_ray.prepare import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def prepare(capsys):
    """Runs the command; gives its exit code, its lines and its errors."""

    def run(*argv: object) -> tuple[int, list[str], str]:
        code = main([str(item) for item in argv])
        output = capsys.readouterr()
        return code, output.out.splitlines(), output.err

    return run


def printed_config(lines: list[str]):
    """The configuration that the printed command loads."""
    program, module, name, *rest = shlex.split(lines[-1])
    assert (program, module, name) == ("python", "-m", "detr_ray.train")
    files = [rest[place + 1] for place, item in enumerate(rest) if item == "--config"]
    return load_config(files, [item for item in rest if "=" in item])


def test_nothing_asked_for_is_nothing_to_do(prepare, tmp_path):
    assert prepare(f"data.root={tmp_path}/set") == (
        0, ["nothing to do: data.generate is not set, and neither --shards nor --to is given"], ""
    )  # fmt: skip


# Generated data


def test_generated_data_is_drawn_once(prepare, tmp_path):
    keys = (f"data.root={tmp_path}/drawn", "data.generate.num_train=5", "data.generate.num_val=3")
    code, lines, _ = prepare(*keys)
    assert code == 0
    assert lines[0].startswith(f"drew 8 images into {tmp_path}/drawn in ")
    assert lines[1].startswith("train: 5 images, ") and lines[2].startswith("val: 3 images, ")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").rglob("*")}
    code, lines, _ = prepare(*keys)
    assert code == 0
    assert lines[0] == f"nothing to draw: {tmp_path}/drawn holds the generated data set already"
    assert lines[1].startswith("train: 5 images, ")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").rglob("*")} == before


def test_drawn_data_is_what_the_configuration_says(prepare, tmp_path):
    values = {"num_train": 3, "num_val": 2, "seed": 7, "image_size": (40, 60)}
    keys = [f"data.generate.{name}={list(v) if isinstance(v, tuple) else v}" for name, v in values.items()]
    assert prepare(f"data.root={tmp_path}/drawn", *keys)[0] == 0
    draw_shapes(tmp_path / "expected", **values)
    for path in (tmp_path / "expected").rglob("*.jpg"):
        drawn = tmp_path / "drawn" / path.relative_to(tmp_path / "expected")
        assert drawn.read_bytes() == path.read_bytes()


def test_other_data_in_the_folder_is_left_alone(prepare, tmp_path):
    root = sound_folder(tmp_path / "set")
    code, _, errors = prepare(f"data.root={root}", "data.generate={}")
    assert code == 2
    assert "it is not a generated data set and is left as it is" in errors
    keys = ["data.generate.num_train=3", "data.generate.num_val=2"]
    assert prepare(f"data.root={tmp_path}/drawn", *keys)[0] == 0
    code, _, errors = prepare(f"data.root={tmp_path}/drawn", *keys, "data.generate.seed=1")
    assert code == 2
    assert "seed is 0, wanted 1" in errors


def test_a_place_that_cannot_be_written_is_told(prepare, tmp_path):
    (tmp_path / "file").write_text("")
    code, lines, errors = prepare(f"data.root={tmp_path}/file/drawn", "data.generate.num_train=3")
    assert (code, lines) == (2, [])
    assert errors.startswith(f"error: data.root: {tmp_path}/file/drawn cannot be written: ")
    code, _, errors = prepare(f"data.root={sound_folder(tmp_path / 'set')}", "--shards", tmp_path / "file" / "shards")
    assert code == 2
    assert f"{tmp_path}/file/shards/train cannot be written: " in errors


# Shards


def test_shards_hold_the_data_and_the_printed_command_loads_them(prepare, tmp_path):
    root = sound_folder(tmp_path / "a set", num_train=6, num_val=2)
    file = tmp_path / "a config.yaml"
    file.write_text(f"data: {{root: '{root}'}}\ntrain: {{global_batch_size: 2}}\n")
    code, lines, errors = prepare("--config", file, "--shards", tmp_path / "the shards")
    assert (code, errors) == (0, "")
    size = sum(path.stat().st_size for path in (root / "train2017").iterdir())
    assert f"train: packed 6 images, {size / 1e6:.1f} MB, into 1 shard" in "\n".join(lines)
    config = printed_config(lines)
    assert config.train.global_batch_size == 2
    assert config.data.root is None
    for split, places in (("train", config.data.train), ("val", config.data.val)):
        original = open_split(str(root), None, split)
        packed = open_split(config.data.root, places, split)
        assert packed.fingerprint == original.fingerprint
        images, stored = ImageReader(original), ImageReader(packed)
        assert [stored.read(i) for i in range(len(packed))] == [images.read(i) for i in range(len(original))]


@pytest.mark.parametrize("kind", ["generated", "split places", "other shards"])
def test_the_printed_command_takes_other_places_away(prepare, tmp_path, kind):
    file = tmp_path / "config.yaml"
    if kind == "generated":
        file.write_text(f"data: {{root: {tmp_path}/drawn, generate: {{num_train: 3, num_val: 2}}}}\n")
    elif kind == "split places":
        root = sound_folder(tmp_path / "set")
        places = [
            f"{split}: {{annotations: {root}/annotations/instances_{split}2017.json, images: {root}/{split}2017}}"
            for split in ("train", "val")
        ]
        file.write_text(f"data: {{{', '.join(places)}}}\n")
    else:
        assert prepare(f"data.root={sound_folder(tmp_path / 'set')}", "--shards", tmp_path / "first")[0] == 0
        file.write_text(f"data: {{train: {{shards: {tmp_path}/first/train}}, val: {{shards: {tmp_path}/first/val}}}}\n")
    code, lines, _ = prepare("--config", file, "--shards", tmp_path / "shards")
    assert code == 0
    config = printed_config(lines)
    assert config.data.generate is None
    assert len(open_split(config.data.root, config.data.train, "train")) in (3, 12)
    assert config.data.val is not None and config.data.val.shards == f"{tmp_path}/shards/val"


def test_a_training_set_alone_can_be_packed(prepare, tmp_path):
    root = sound_folder(tmp_path / "set")
    places = [
        f"data.train.annotations={root}/annotations/instances_train2017.json",
        f"data.train.images={root}/train2017",
    ]
    code, lines, _ = prepare(*places, "--shards", tmp_path / "shards")
    assert code == 0
    assert printed_config(lines).data.val is None
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["train"]


def test_shards_that_are_there_stay_and_missing_ones_are_written(prepare, tmp_path):
    root = sound_folder(tmp_path / "set")
    shards = tmp_path / "shards"
    assert prepare(f"data.root={root}", "--shards", shards)[0] == 0
    before = (shards / "train" / "shard-00000.parquet").stat().st_mtime_ns
    content = (shards / "val" / "shard-00000.parquet").read_bytes()
    for path in (shards / "val").iterdir():
        path.unlink()
    code, lines, _ = prepare(f"data.root={root}", "--shards", shards)
    assert code == 0
    assert f"train: nothing to do: {shards}/train holds these 12 images already" in lines
    assert (shards / "val" / "shard-00000.parquet").read_bytes() == content
    assert (shards / "train" / "shard-00000.parquet").stat().st_mtime_ns == before
    assert printed_config(lines).data.train.shards == f"{shards}/train"


def test_folders_with_something_else_are_refused(prepare, tmp_path):
    root = sound_folder(tmp_path / "set")
    code, _, errors = prepare(f"data.root={root}", "--shards", root)
    assert code == 2
    assert f"{root} holds something else (annotations, train2017, val2017): give a new or an empty folder" in errors
    assert sorted(path.name for path in root.iterdir()) == ["annotations", "train2017", "val2017"]

    (tmp_path / "file").write_text("")
    assert "is a file; give a folder" in prepare(f"data.root={root}", "--shards", tmp_path / "file")[2]
    assert "holds credentials" in prepare(f"data.root={root}", "--shards", "s3://key:word@bucket/shards")[2]

    shards = tmp_path / "shards"
    assert prepare(f"data.root={root}", "--shards", shards)[0] == 0
    other = sound_folder(tmp_path / "other", num_train=7)
    code, _, errors = prepare(f"data.root={other}", "--shards", shards)
    assert code == 2
    assert f"{shards}/train holds shards of other data (12 images, this split has 7" in errors
    (shards / "train" / "shard-00000.parquet").unlink()
    code, _, errors = prepare(f"data.root={root}", "--shards", shards)
    assert code == 2
    assert "is damaged" in errors and "the shard is missing" in errors


def test_a_missing_image_leaves_no_shards(prepare, tmp_path):
    folder = CocoFolder(tmp_path / "set")
    folder.fill("train", 3)
    folder.add("train", "missing.jpg", None)
    folder.fill("val", 2)
    code, _, errors = prepare(f"data.root={folder.write()}", "--shards", tmp_path / "shards")
    assert code == 2
    assert errors == f"error: {tmp_path}/set/train2017/missing.jpg: no such file\n"
    assert list((tmp_path / "shards").iterdir()) == []


def test_shards_are_closed_at_their_size(prepare, tmp_path):
    folder = CocoFolder(tmp_path / "set")
    for number in range(130):
        folder.add("train", f"{number}.png", encoded("PNG", size=(80, 90), seed=number), size=(80, 90))
    folder.fill("val", 2)
    root = folder.write()
    code, lines, _ = prepare(f"data.root={root}", "--shards", tmp_path / "shards", "--shard-megabytes", "1")
    assert code == 0
    assert len(list((tmp_path / "shards" / "train").glob("shard-*.parquet"))) == 3
    assert "into 3 shards" in "\n".join(lines)
    code, _, errors = prepare(f"data.root={root}", "--shards", tmp_path / "others", "--shard-megabytes=0")
    assert code == 2
    assert errors.startswith("error: --shard-megabytes: must be at least 1")


# Other formats


@pytest.mark.parametrize("name", ["coco", "yolo", "shards"])
def test_data_in_other_formats_and_the_printed_command(prepare, tmp_path, name):
    root = sound_folder(tmp_path / "a set", num_train=6, num_val=2)
    code, lines, errors = prepare(f"data.root={root}", "--to", name, "--out", tmp_path / "the copy")
    assert (code, errors) == (0, "")
    if name != "shards":
        assert lines[2].startswith("wrote 8 images, ") and lines[2].endswith(f"{tmp_path}/the copy")
    config = printed_config(lines)
    for split in ("train", "val"):
        back = open_split(config.data.root, config.data.places(split), split)
        assert back.fingerprint == open_split(str(root), None, split).fingerprint
    code, _, errors = prepare(f"data.root={root}", "--to", name, "--out", root)
    assert code == 2 and str(root) in errors


def test_the_printed_command_takes_sources_away(prepare, tmp_path):
    """Without their weights, which is said."""
    roots = [sound_folder(tmp_path / name, num_train=6) for name in ("a", "b")]
    sources = [f"annotations: {root}/annotations/instances_train2017.json, images: {root}/train2017" for root in roots]
    file = tmp_path / "config.yaml"
    file.write_text(f"data: {{sources: [{{{sources[0]}}}, {{{sources[1]}, weight: 2}}], split: {{val: 0.3}}}}\n")
    for name in ("coco", "shards"):
        code, lines, errors = prepare("--config", file, "--to", name, "--out", tmp_path / name)
        assert (code, errors) == (0, "")
        assert "the weights of data.sources are not written: an epoch takes each image once" in lines
        data = printed_config(lines).data
        assert data.sources == () and data.split is None
        assert sum(len(open_split(data.root, data.places(split), split)) for split in ("train", "val")) == 12


def test_a_divided_set_is_written_as_two_and_the_command_divides_no_more(prepare, tmp_path):
    root = sound_folder(tmp_path / "set")
    keys = [
        f"data.train.annotations={root}/annotations/instances_train2017.json",
        f"data.train.images={root}/train2017",
    ]
    code, lines, _ = prepare(*keys, "data.split={val: 0.3}", "--to", "yolo", "--out", tmp_path / "yolo")
    assert code == 0
    config = printed_config(lines)
    assert config.data.split is None and config.data.train is None
    parts = [open_split(config.data.root, None, split) for split in ("train", "val")]
    assert sum(map(len, parts)) == 12 and min(map(len, parts)) > 0
    code, lines, _ = prepare(*keys, "--to", "coco", "--out", tmp_path / "coco")
    assert code == 0 and "there are no validation images: hold some out by data.split={val: 0.1}" in lines


def test_formats_that_are_not_written_and_half_a_request_are_refused(prepare, tmp_path):
    root = f"data.root={sound_folder(tmp_path / 'set')}"
    for argv, message in (
        (("--to", "voc", "--out", tmp_path / "o"), "--to: 'voc' cannot be written; one of coco, yolo, shards"),
        (("--to", "yolo"), "--to: needs --out FOLDER"),
        (("--out", tmp_path / "o"), "--out: needs --to FORMAT"),
        (("--shards", tmp_path / "o", "--to", "yolo", "--out", tmp_path / "o"), "--shards: is the same as --to shards"),
    ):
        code, _, errors = prepare(root, *argv)
        assert code == 2 and errors.startswith(f"error: {message}")
    assert not (tmp_path / "o").exists()


def test_packing_needs_data(prepare, tmp_path):
    code, _, errors = prepare("--shards", tmp_path / "shards")
    assert code == 2
    assert "no train data is given" in errors


# Progress


def test_progress_is_said_at_intervals():
    lines: list[str] = []
    pace = Pace("packed", lines.append, interval_s=0)
    pace(0, 100)
    assert lines == []
    pace(50, 100, "7 MB")
    assert lines[0].startswith("packed 50 of 100 images, ")
    assert lines[0].endswith(" images/s, 7 MB, left 0 s")
    rare = Pace("packed", lines.append, interval_s=3600)
    rare(50, 100)
    assert len(lines) == 1


def test_slow_progress_is_said_in_tenths(monkeypatch: pytest.MonkeyPatch):
    times = iter([0.0, 100.0, 200.0])
    lines: list[str] = []
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    pace = Pace("predicted", lines.append, interval_s=0)
    pace(38, 5000)
    pace(2500, 5000)
    assert lines[0].startswith("predicted 38 of 5000 images, 0.4 images/s, left ")
    assert lines[1].startswith("predicted 2500 of 5000 images, 12 images/s, left ")


# The command


def test_as_a_process(tmp_path):
    argv = [f"data.root={tmp_path}/drawn", "data.generate.num_train=4", "data.generate.num_val=2"]
    command = [sys.executable, "-m", "detr_ray.prepare", *argv, "--shards", f"{tmp_path}/shards"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "drawn" / "generated.json").read_text())["num_train"] == 4
    assert len(open_split(None, printed_config(result.stdout.splitlines()).data.train, "train")) == 4
