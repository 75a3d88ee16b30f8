"""Looking at all stored images: what is found, with and without decoding, and that nothing stops it."""

from __future__ import annotations

import numpy as np
import pytest
from coco_folder import SIZE, CocoFolder, encoded, sound_folder

from detr_ray.data.formats import open_split
from detr_ray.data.formats.shards import read_shard_index
from detr_ray.data.index import DatasetIndex
from detr_ray.data.inspection import Inspection, find_missing_storage, inspect_images
from detr_ray.data.packing import write_shards


@pytest.fixture
def folder(tmp_path):
    return CocoFolder(tmp_path / "set")


def train_index(folder: CocoFolder) -> DatasetIndex:
    return open_split(str(folder.write()), None, "train")


def reasons(inspection: Inspection) -> dict[str, str]:
    return {bad.file.rpartition("/")[2]: bad.reason for bad in inspection.bad}


@pytest.mark.parametrize("decode", [False, True])
def test_every_fault_is_found_in_one_go(folder, decode):
    sound = encoded()
    folder.fill("train", 3)
    folder.add("train", "missing.jpg", None)
    folder.add("train", "empty.jpg", b"")
    folder.add("train", "text.jpg", b"<html>404 not found</html>")
    folder.add("train", "cut-in-header.jpg", sound[:30])
    folder.add("train", "cut-in-pixels.jpg", sound[: len(sound) // 2])
    folder.add("train", "cut.png", encoded("PNG")[:-300])
    folder.add("train", "other-size.jpg", sound, size=(SIZE[0], SIZE[1] + 1))
    folder.add("train", "../outside.jpg", sound)
    seen = inspect_images(train_index(folder), decode=decode)
    found = reasons(seen)
    assert found.pop("missing.jpg") == "no such file"
    assert found.pop("empty.jpg") == "the file is empty"
    assert "not an image" in found.pop("text.jpg")
    assert found.pop("other-size.jpg") == ("the image is 48x64 (height x width) but the annotations say 48x65")
    assert "inside of the images' folder" in found.pop("outside.jpg")
    assert sorted(found) == ["cut-in-header.jpg", "cut-in-pixels.jpg", "cut.png"]
    assert all(found.values())
    assert seen.num_seen == 11
    assert [bad.image_id for bad in seen.bad] == list(range(4, 12))
    assert seen.formats == {"JPEG": 3}
    assert not seen.broken_off


def test_damage_behind_the_header_is_found_by_decoding(folder):
    rotten = bytearray(encoded("PNG"))
    rotten[len(rotten) // 2] ^= 0xFF
    folder.add("train", "sound.png", encoded("PNG"))
    folder.add("train", "rotten.png", bytes(rotten))
    assert list(reasons(inspect_images(train_index(folder), decode=True))) == ["rotten.png"]


@pytest.mark.parametrize("decode", [False, True])
def test_unusual_images_that_can_be_read_are_no_faults(folder, decode):
    height, width = SIZE
    folder.add("train", "really-a-png.jpg", encoded("PNG"))
    folder.add("train", "cmyk.jpg", encoded(mode="CMYK"))
    folder.add("train", "grey.jpg", encoded(mode="L"))
    folder.add("train", "palette.gif", encoded("GIF", mode="P"))
    folder.add("train", "on-its-side.jpg", encoded(orientation=6, size=(width, height)))
    folder.add("train", "on-its-side-boxes-too.jpg", encoded(orientation=6))
    folder.add("train", "followed-by-rubbish.jpg", encoded() + b"\0" * 1000)
    seen = inspect_images(train_index(folder), decode=decode)
    assert reasons(seen) == {}
    assert seen.formats == {"JPEG": 5, "PNG": 1, "GIF": 1}
    assert seen.modes == {"RGB": 4, "CMYK": 1, "L": 1, "P": 1}
    assert seen.num_turned == 2
    assert seen.turned_unseen == []


def test_turned_images_whose_size_does_not_show_it_are_named(folder):
    folder.add("train", "upright.jpg", encoded(orientation=1))
    folder.add("train", "upside-down.jpg", encoded(orientation=3))
    folder.add("train", "square-on-its-side.jpg", encoded(orientation=8, size=(48, 48)), size=(48, 48))
    seen = inspect_images(train_index(folder))
    assert [name.rpartition("/")[2] for name in seen.turned_unseen] == ["upside-down.jpg", "square-on-its-side.jpg"]
    assert seen.num_turned == 2


def test_progress_ends_with_all_images(folder, tmp_path):
    index = open_split(str(sound_folder(tmp_path / "sound", num_train=5)), None, "train")
    calls: list[tuple[int, int]] = []
    inspect_images(index, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (5, 5)


# Where the images lie


def test_a_folder_that_is_not_there_is_said_once(folder):
    folder.add("train", "a.jpg", encoded())
    root = folder.write()
    (root / "train2017").rename(root / "elsewhere")
    (fault,) = find_missing_storage(open_split(str(root), None, "train")).values()
    assert fault == f"{root}/train2017: no such folder"


@pytest.mark.parametrize("decode", [False, True])
def test_shards_are_looked_at_as_folders_are(folder, tmp_path, decode):
    folder.fill("train", 3)
    folder.add("train", "text.jpg", b"not an image at all")
    folder.add("train", "cmyk.jpg", encoded(mode="CMYK"))
    write_shards(train_index(folder), tmp_path / "shards")
    index = read_shard_index(str(tmp_path / "shards"))
    assert find_missing_storage(index) == {}
    seen = inspect_images(index, decode=decode)
    (bad,) = seen.bad
    assert bad.file == f"text.jpg in {tmp_path}/shards/shard-00000.parquet"
    assert "not an image" in bad.reason
    assert seen.modes == {"RGB": 3, "CMYK": 1}


def test_missing_and_short_shards_are_found_and_passed_over(folder, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(200):  # three row groups, each larger than a shard
        folder.add("train", f"{number}.bin", rng.bytes(20_000))
    write_shards(train_index(folder), tmp_path / "shards", shard_megabytes=1)
    index = read_shard_index(str(tmp_path / "shards"))
    assert index.shards is not None and len(index.shards.files) == 4
    (tmp_path / "shards" / "shard-00001.parquet").unlink()
    short = tmp_path / "shards" / "shard-00002.parquet"
    short.write_bytes(short.read_bytes()[:500_000])
    faults = find_missing_storage(index)
    assert list(faults) == [1, 2]
    assert "shard-00001.parquet: the shard is missing" in faults[1]
    assert "ends" in faults[2] and "bytes too early" in faults[2]
    seen = inspect_images(index, without_shards=frozenset(faults))
    assert seen.num_seen == int(np.isin(index.shards.file_of, [0, 3]).sum())


def test_storage_that_fails_for_every_image_is_given_up(folder, tmp_path):
    for number in range(3000):
        folder.add("train", f"{number}.bin", b"x" * 8, boxes=())
    write_shards(train_index(folder), tmp_path / "shards")
    index = read_shard_index(str(tmp_path / "shards"))
    (tmp_path / "shards" / "shard-00000.parquet").unlink()
    seen = inspect_images(index)
    assert "the rest was not looked at" in seen.broken_off
    assert 0 < seen.num_seen < 3000
