"""Cases of the commands that look at data and write it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from coco_folder import CocoFolder, encoded
from commands.registry import Place, shows
from ports import free_port

from detr_ray.data import inspection
from detr_ray.data.formats import open_split

# check


def report_of(place: Place, *argv: object) -> dict:
    path = place.folder / "report.json"
    place.call("check", "--config", place.file(), "--json", path, *argv)
    return json.loads(path.read_text())


@shows("check", "--json")
def check_json(place: Place) -> None:
    report = report_of(place)
    assert report["splits"]["train"]["images"] == 16 and report["splits"]["val"]["images"] == 4
    code, out, _ = place.call("check", "--config", place.file(), "--json", "-")
    assert json.loads(out)["splits"] == report["splits"] and code in (0, 1)
    assert "report.json" not in place.call("check", "--config", place.file())[1]


@shows("check", "--decode")
def check_decode(place: Place) -> None:
    """An image whose header and end are sound and whose pixels are not is found by decoding alone.

    The first of a kind is always decoded: sound ones come before it, and are not looked at together with it.
    """
    folder = CocoFolder(place.folder / "damaged")
    place.patch.setattr(inspection, "_GROUP_IMAGES", 1)
    for number in range(2):
        folder.add("train", f"{number}.png", encoded("PNG", seed=number))
    folder.fill("val", 2)
    content = bytearray(encoded("PNG", seed=999))
    content[len(content) // 2] ^= 255
    folder.add("train", "damaged.png", bytes(content))
    root = f"data.root={folder.write()}"
    assert report_of(place, root)["splits"]["train"]["bad_images"] == []
    found = report_of(place, root, "--decode")["splits"]["train"]
    assert found["decoded"] is True and len(found["bad_images"]) == 1


@shows("check", "--cluster")
def check_cluster(place: Place) -> None:
    """Looks for the cluster, which is not there."""
    import ray

    if ray.is_initialized():
        pytest.skip("this process uses a Ray already")
    port = free_port()
    place.patch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    keys = ("train.launcher=ray",)
    found = [f for f in report_of(place, "--cluster", *keys)["findings"] if f["area"] == "cluster"]
    assert len(found) == 1 and found[0]["level"] == "error" and str(port) in found[0]["message"]
    assert not [f for f in report_of(place, *keys)["findings"] if f["area"] == "cluster"]


# prepare


@shows("prepare", "--shards")
def prepare_shards(place: Place) -> None:
    place.done("prepare", "--shards", place.folder / "packed")
    for split, count in (("train", 16), ("val", 4)):
        packed = open_split(None, _Shards(str(place.folder / "packed" / split)), split)
        plain = open_split(str(place.data), None, split)
        assert len(packed) == count and np.array_equal(packed.boxes_xywh_px, plain.boxes_xywh_px)


@shows("prepare", "--to", "--out")
def prepare_to(place: Place) -> None:
    place.done("prepare", "--to", "yolo", "--out", place.folder / "yolo")
    assert (place.folder / "yolo" / "data.yaml").is_file()
    for split in ("train", "val"):
        found, plain = open_split(str(place.folder / "yolo"), None, split), open_split(str(place.data), None, split)
        assert found.fingerprint == plain.fingerprint


class _Shards:
    annotations = images = None

    def __init__(self, shards: str) -> None:
        self.shards: str | None = shards


@shows("prepare", "--shard-megabytes")
def prepare_shard_megabytes(place: Place) -> None:
    """Some megabytes of images: several files, or one."""
    folder = CocoFolder(place.folder / "large")
    for number in range(140):
        folder.add("train", f"{number}.png", encoded("PNG", size=(100, 100), seed=number), size=(100, 100))
    folder.fill("val", 1)
    root = f"data.root={folder.write()}"
    counts = []
    for megabytes in (1, 100):
        place.done("prepare", root, "--shards", place.folder / f"at-{megabytes}", "--shard-megabytes", megabytes)
        counts.append(len(list((place.folder / f"at-{megabytes}" / "train").glob("shard-*.parquet"))))
    assert counts[0] > counts[1] == 1
    code, _, err = place.call("prepare", root, "--shards", place.folder / "none", "--shard-megabytes", 0)
    assert code == 2 and "--shard-megabytes" in err
