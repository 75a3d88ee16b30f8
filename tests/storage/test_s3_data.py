"""Data in a bucket: the same batches as from a folder, few and merged reads, several at a time, faults survived."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from coco_folder import sound_folder
from data.format_sets import FORMATS
from defaults import size_policy
from s3_server import S3Server
from small_shards import write_small_shards

from detr_ray.config import SplitConfig
from detr_ray.data.errors import DataError
from detr_ray.data.formats import open_split
from detr_ray.data.formats.shards import read_shard_index
from detr_ray.data.image_headers import ImageError
from detr_ray.data.images import READS_AT_ONCE, ImageReader
from detr_ray.data.index import DatasetIndex
from detr_ray.data.label_map import LabelMap
from detr_ray.data.loader import BatchLoader
from detr_ray.data.packing import write_shards
from detr_ray.data.planner import Planner
from detr_ray.data.ranges import join_parts
from detr_ray.prepare import main as prepare

NUM_IMAGES = 40
AUGMENT = size_policy(scales=(48, 64), max_size=96, crop=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound_folder(tmp_path_factory.mktemp("data") / "set", num_train=NUM_IMAGES, num_val=4)


@pytest.fixture(scope="module")
def local(folder: Path) -> DatasetIndex:
    return open_split(str(folder), None, "train")


def planner_of(index: DatasetIndex, size: int = 8, shards_at_a_time: int | None = None) -> Planner:
    shard_of = None if index.shards is None else index.shards.file_of
    return Planner(
        index.heights, index.widths, index.image_ids, seed=1, global_batch_size=size, size_policy=AUGMENT,
        shard_of=shard_of, shards_at_a_time=shards_at_a_time,
    )  # fmt: skip


def assert_same_batches(one: DatasetIndex, other: DatasetIndex) -> None:
    loaders = [BatchLoader(index, LabelMap.contiguous(index.categories)) for index in (one, other)]
    planner = planner_of(one)
    for step in range(planner.steps_per_epoch + 1):
        expected, got = (loader.load(planner.global_batch(step)) for loader in loaders)
        assert expected.bad_images == []
        for name in expected.__slots__:
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)


# A folder of images


def test_a_folder_in_a_bucket_gives_the_same_batches(folder, local, s3: S3Server):
    uri = s3.upload(folder, f"{s3.new_bucket()}/coco")
    s3.forget()
    remote = open_split(uri, None, "train")
    assert sorted(r.kind for r in s3.requests() if r.path.endswith(".json")) == ["GET", "HEAD"]
    assert remote.fingerprint == local.fingerprint
    assert_same_batches(local, remote)
    # The size of an object is asked for before it is read: pyarrow knows no other way.
    images = [r.kind for r in s3.requests() if r.path.endswith(".jpg")]
    assert images.count("GET") == images.count("HEAD") == len(images) // 2 == 6 * 8


@pytest.mark.parametrize("name", ["yolo", "voc", "csv"])
def test_other_formats_in_a_bucket_give_the_same_index(tmp_path, s3: S3Server, name):
    root = FORMATS[name](tmp_path / "set")
    uri = s3.upload(root, f"{s3.new_bucket()}/set")
    for split in ("train", "val"):
        index, remote = open_split(str(root), None, split), open_split(uri, None, split)
        assert remote.fingerprint == index.fingerprint and remote.images_root.startswith(uri)
        assert ImageReader(remote).read(3) == ImageReader(index).read(3)


def test_images_of_a_batch_are_read_at_the_same_time(folder, s3: S3Server):
    uri = s3.upload(folder, f"{s3.new_bucket()}/coco")
    reader = pickle.loads(pickle.dumps(ImageReader(open_split(uri, None, "train"))))
    s3.set_faults(latency_s=0.2)
    s3.forget()
    reads = reader.read_many(range(NUM_IMAGES))
    assert [len(read()) for read in reads] == [path.stat().st_size for path in sorted((folder / "train2017").iterdir())]
    assert READS_AT_ONCE // 4 <= s3.most_at_once() <= READS_AT_ONCE


def test_the_next_batch_is_read_while_one_is_decoded(folder, local, s3: S3Server):
    remote = open_split(s3.upload(folder, f"{s3.new_bucket()}/coco"), None, "train")
    planner = planner_of(local)
    plans = [planner.global_batch(step) for step in range(4)]
    loaders = [BatchLoader(index, LabelMap.contiguous(index.categories)) for index in (local, remote)]
    s3.forget()
    batches = loaders[1].load_each(plans)
    first = next(batches)
    deadline = time.monotonic() + 30
    while len(s3.requests()) < 2 * 16 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    assert len(s3.requests()) == 2 * 16, "the second batch is there before it is asked for, the third is not begun"
    for expected, got in zip(loaders[0].load_each(plans), [first, *batches], strict=True):
        np.testing.assert_array_equal(got.images, expected.images)
        np.testing.assert_array_equal(got.positions, expected.positions)
    assert list(loaders[1].load_each([])) == []


def test_requests_that_fail_change_nothing(folder, local, s3: S3Server):
    uri = s3.upload(folder, f"{s3.new_bucket()}/coco")
    s3.set_faults(0.05, seed=1)
    s3.forget()
    assert_same_batches(local, open_split(uri, None, "train"))
    assert sum(bool(request.fault) for request in s3.requests()) >= 3


def test_a_missing_image_is_a_bad_image_and_a_refusal_is_not(folder, s3: S3Server):
    uri = s3.upload(folder, f"{s3.new_bucket()}/coco")
    place = uri.removeprefix("s3://")
    index = open_split(uri, None, "train")
    loader = BatchLoader(index, LabelMap.contiguous(index.categories))
    s3.delete(f"{place}/train2017/good003.jpg")
    batch = planner_of(index, size=NUM_IMAGES).global_batch(0)
    assert loader.load(batch).bad_images == [f"{uri}/train2017/good003.jpg: no such object"]
    s3.set_faults(forbidden=place)
    with pytest.raises(DataError, match="access denied") as denied:
        ImageReader(index).read(0)
    assert not isinstance(denied.value, ImageError)
    with pytest.raises(DataError, match="access denied"):
        loader.load(batch)
    with pytest.raises(DataError, match=r"instances_train2017.json: the annotation file cannot be read: access denied"):
        open_split(uri, None, "train")


def test_annotations_that_are_not_there_are_named(s3: S3Server):
    bucket = s3.new_bucket()
    with pytest.raises(DataError, match=rf"s3://{bucket}/coco/?: there is no such folder; data.root is the folder"):
        open_split(f"s3://{bucket}/coco/", None, "train")
    places = SplitConfig(annotations=f"s3://{bucket}/coco/train.json", images=f"s3://{bucket}/coco/images")
    with pytest.raises(DataError, match=rf"s3://{bucket}/coco/train.json: no such object \(the annotation file\)"):
        open_split(None, places, "train")
    with pytest.raises(DataError, match="holds credentials") as refused:
        open_split(f"s3://AKIAKEY:hidden@{bucket}/coco", None, "train")
    assert "hidden" not in str(refused.value)
    places = SimpleNamespace(annotations="/a.json", images=f"s3://AKIAKEY:hidden@{bucket}/coco", shards=None)
    with pytest.raises(DataError, match=r"train: an address s3://\.\.\. holds credentials"):
        open_split(None, places, "train")


# Shards


def test_shards_in_a_bucket_give_the_same_batches(local, s3: S3Server):
    uri = f"s3://{s3.new_bucket()}/shards"
    write_shards(local, uri)
    s3.forget()
    remote = read_shard_index(uri)
    assert s3.counts() == {"HEAD": 1, "GET": 1}
    assert remote.fingerprint == local.fingerprint
    assert_same_batches(local, remote)
    s3.set_faults(0.05, seed=2)
    assert_same_batches(local, remote)


def test_prepare_writes_to_a_bucket_and_goes_on_there(folder, local, s3: S3Server, capsys):
    bucket = s3.new_bucket()
    uri = f"s3://{bucket}/packed"
    assert prepare([f"data.root={folder}", "--shards", f"{uri}/"]) == 0
    assert f"data.train.shards={uri}/train data.val.shards={uri}/val" in capsys.readouterr().out
    names = [key.removeprefix(f"{bucket}/packed/") for key in s3.keys(bucket)]
    assert names == [
        f"{split}/{name}" for split in ("train", "val") for name in ("index.parquet", "shard-00000.parquet")
    ]
    assert read_shard_index(f"{uri}/train").fingerprint == local.fingerprint

    # A writer that was killed leaves shards without an index: they are written again.
    s3.delete(f"{bucket}/packed/val/index.parquet")
    s3.put(f"{bucket}/packed/val/shard-00007.parquet", b"of an earlier attempt")
    assert prepare([f"data.root={folder}", "--shards", uri]) == 0
    said = capsys.readouterr().out
    assert f"train: nothing to do: {uri}/train holds these 40 images already" in said and "val: packed 4" in said
    assert f"{bucket}/packed/val/shard-00007.parquet" not in s3.keys(bucket)

    s3.put(f"{bucket}/packed/photo.jpg", b"")
    assert prepare([f"data.root={folder}", "--shards", uri]) == 2
    assert f"{uri} holds something else (photo.jpg)" in capsys.readouterr().err
    assert prepare([f"data.root={folder}", "--shards", "s3://not-made/x"]) == 2
    assert "s3://not-made/x/train cannot be written: no such bucket" in capsys.readouterr().err


def test_what_cannot_be_finished_leaves_nothing(folder, s3: S3Server, monkeypatch):
    uri = s3.upload(folder, f"{s3.new_bucket()}/coco")
    index = open_split(uri, None, "train")
    s3.delete(uri.removeprefix("s3://") + f"/train2017/{index.file_name(30)}")
    bucket = s3.new_bucket()
    s3.forget()
    with pytest.raises(ImageError, match="no such object"):
        write_small_shards(index, f"s3://{bucket}/shards", 8, monkeypatch)
    assert sum(request.kind == "PUT" for request in s3.requests()) >= 3
    assert [key for key in s3.keys(bucket) if not key.endswith("/")] == []


def test_near_neighbours_are_read_together(s3: S3Server, local):
    uri = f"s3://{s3.new_bucket()}/shards"
    write_shards(local, uri)
    reader, original = ImageReader(read_shard_index(uri)), ImageReader(local)
    reader.read(0)  # opens the file
    s3.forget()
    wanted = [31, 2, 9, 30, 2]
    assert [read() for read in reader.read_many(wanted)] == [original.read(i) for i in wanted]
    assert s3.counts() == {"GET": 1}


@pytest.mark.parametrize("case", range(30))
def test_joined_parts_hold_all_that_was_asked_for(case):
    rng = np.random.default_rng(case)
    count = int(rng.integers(0, 40))
    files, offsets, lengths = rng.integers(0, 3, count), rng.integers(0, 5000, count), rng.integers(0, 300, count)
    near, most = int(rng.integers(0, 400)), int(rng.integers(300, 3000))
    spans = join_parts(files, offsets, lengths, near, most)
    assert sorted(part for span in spans for part in span.parts) == list(range(count))
    for span in spans:
        assert span.num_bytes <= most
        for part in span.parts:
            assert files[part] == span.file
            assert span.start <= offsets[part] <= offsets[part] + lengths[part] <= span.start + span.num_bytes
    assert [(span.file, span.start) for span in spans] == sorted((span.file, span.start) for span in spans)
    assert sum(span.num_bytes for span in spans) <= lengths.sum() + near * count
    for one, next_one in pairwise(spans):
        far = next_one.start - (one.start + one.num_bytes) > near
        long = next_one.start + lengths[next_one.parts[0]] - one.start > most
        assert one.file != next_one.file or far or long


def test_reads_of_a_window_stay_in_its_shards(local, s3: S3Server, monkeypatch):
    uri = f"s3://{s3.new_bucket()}/shards"
    write_small_shards(local, uri, 5, monkeypatch)
    index = read_shard_index(uri)
    assert index.shards is not None and len(index.shards.files) == 8
    planner = planner_of(index, size=5, shards_at_a_time=2)
    loader = BatchLoader(index, LabelMap.contiguous(index.categories))
    bounds = planner.window_bounds(0)
    assert bounds == (0, 2, 4, 6, 8)
    visited: list[set[str]] = []
    for start, end in pairwise(bounds):
        s3.forget()
        for step in range(start, end):
            loader.load(planner.global_batch(step))
        visited.append({request.path for request in s3.requests()})
        assert len(visited[-1]) == 2
    assert len(set.union(*visited)) == 8


def test_a_missing_or_cut_shard_is_named(local, s3: S3Server):
    uri = f"s3://{s3.new_bucket()}/shards"
    write_shards(local, uri)
    place = f"{uri.removeprefix('s3://')}/shard-00000.parquet"
    content = s3.get(place)
    s3.put(place, content[: len(content) // 2])
    reads = ImageReader(read_shard_index(uri)).read_many([0, NUM_IMAGES - 1])
    with pytest.raises(DataError, match=rf"{uri}/shard-00000.parquet: the shard ends \d+ bytes too early"):
        [read() for read in reads]
    s3.delete(place)
    with pytest.raises(DataError, match=rf"{uri}/shard-00000.parquet: the shard is missing \(no such object\)"):
        ImageReader(read_shard_index(uri)).read(0)
    with pytest.raises(DataError, match=rf"{uri}/absent/index.parquet: no such object"):
        open_split(None, SimpleNamespace(annotations=None, images=None, shards=f"{uri}/absent"), "train")


KILLED = """
import sys
import detr_ray.data.packing as packing
from detr_ray.data.formats import open_split
packing._GROUP_IMAGES = 1
read_groups = packing._read_groups
packing._read_groups = lambda reader, start, end, most, progress: read_groups(reader, start, end, 1, progress)
index = open_split(sys.argv[1], None, "train")
packing.write_shards(index, sys.argv[2], progress=lambda *done: print(*done, flush=True))
"""


def test_a_killed_writer_leaves_no_shards_to_read(folder, local, s3: S3Server):
    uri = f"s3://{s3.new_bucket()}/shards"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), uri], stdout=subprocess.PIPE, text=True,
        env={**os.environ, **s3.environment},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("5 "):
            break
    process.kill()
    process.wait(timeout=30)
    time.sleep(0.1)
    assert len(s3.keys(uri.removeprefix("s3://"))) >= 4
    with pytest.raises(DataError, match=r"index\.parquet: no such object"):
        read_shard_index(uri)
    write_shards(local, uri)
    assert read_shard_index(uri).fingerprint == local.fingerprint
    left = [key.rpartition("/")[2] for key in s3.keys(uri.removeprefix("s3://")) if not key.endswith("/")]
    assert left == ["index.parquet", "shard-00000.parquet"]
