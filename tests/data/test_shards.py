"""Shards: ordinary Parquet files that give the same index and the same batches as the folder they were made of."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from defaults import draw_shapes
from samples import read_size, training_plans

from detr_ray.data.errors import DataError
from detr_ray.data.formats.coco import read_coco_index
from detr_ray.data.formats.shards import read_shard_index
from detr_ray.data.image_headers import ImageError
from detr_ray.data.images import ImageReader
from detr_ray.data.index import COLUMN_TYPES, DatasetIndex
from detr_ray.data.label_map import LabelMap
from detr_ray.data.loader import BatchLoader
from detr_ray.data.packing import write_shards

NUM_IMAGES = 150


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    root = tmp_path_factory.mktemp("data") / "shapes"
    draw_shapes(root, num_train=NUM_IMAGES, num_val=1, seed=0, image_size=(128, 160), min_object_size=12)
    annotations = root / "annotations" / "instances_train2017.json"
    content = json.loads(annotations.read_text())
    content["annotations"][0]["iscrowd"] = 1
    del content["annotations"][1]["area"]
    annotations.write_text(json.dumps(content))
    return read_coco_index(str(annotations), str(root / "train2017"))


@pytest.fixture(scope="module")
def shards(index: DatasetIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "split=train" / "shards"
    write_shards(index, folder, shard_megabytes=1)
    return folder


def test_the_index_is_that_of_the_folder(index: DatasetIndex, shards: Path) -> None:
    back = read_shard_index(str(shards))
    for name in COLUMN_TYPES:
        np.testing.assert_array_equal(getattr(back, name), getattr(index, name), err_msg=name)
    assert back.file_names.to_pylist() == index.file_names.to_pylist()
    assert (back.categories, back.problems, back.fingerprint) == (index.categories, index.problems, index.fingerprint)
    assert back.problems["areas_missing"] == 1
    assert (back.images_root, back.source) == (None, str(shards))
    for other in (str(shards) + "/", str(shards / "index.parquet"), shards.as_uri()):
        assert read_shard_index(other).fingerprint == index.fingerprint


def test_one_ranged_read_gives_the_stored_file(index: DatasetIndex, shards: Path) -> None:
    back = read_shard_index(str(shards))
    places = back.shards
    assert places is not None and len(places.files) >= 2
    folder_reader, reader, remote = (ImageReader(i) for i in (index, back, read_shard_index(shards.as_uri())))
    for i in reversed(range(NUM_IMAGES)):
        stored = folder_reader.read(i)
        with Path(places.files[places.file_of[i]]).open("rb") as file:
            file.seek(places.offsets[i])
            assert file.read(places.lengths[i]) == stored
        assert reader.read(i) == remote.read(i) == stored
        assert reader.read_head(i, 10) == stored[:10]
        assert read_size(reader, i) == read_size(folder_reader, i)
    assert pickle.loads(pickle.dumps(reader)).read(3) == folder_reader.read(3)


def test_batches_are_those_of_the_folder(index: DatasetIndex, shards: Path) -> None:
    label_map = LabelMap.contiguous(index.categories)
    plans = training_plans(index, seed=2)
    from_folder, from_shards = (BatchLoader(i, label_map) for i in (index, read_shard_index(str(shards))))
    for start in range(0, NUM_IMAGES, 30):
        expected, got = (loader.load(plans[start : start + 30]) for loader in (from_folder, from_shards))
        for name in expected.__slots__:
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)


def test_shards_are_plain_parquet_that_says_everything(index: DatasetIndex, shards: Path) -> None:
    files = sorted(shards.glob("shard-*.parquet"))
    table = pa.concat_tables(pq.ParquetFile(file).read() for file in files)
    assert table["image_id"].to_pylist() == index.image_ids.tolist()
    row = table.slice(7, 1).to_pylist()[0]
    rows = slice(index.first_box[7], index.first_box[8])
    assert row["file_name"] == index.file_name(7)
    assert row["image"] == ImageReader(index).read(7)
    assert (row["height"], row["width"]) == (index.heights[7], index.widths[7])
    assert row["boxes_xywh"] == index.boxes_xywh_px[rows].tolist()
    assert row["category_ids"] == index.category_ids[rows].tolist()
    assert row["annotation_ids"] == index.annotation_ids[rows].tolist()
    assert row["areas"] == index.areas[rows].tolist() and row["is_crowd"] == index.is_crowd[rows].tolist()
    about = json.loads(pq.read_schema(files[0]).metadata[b"detr_ray"])
    assert about["categories"] == [{"id": i, "name": name} for i, name in index.categories]


def test_a_folder_of_shards_may_be_moved(index: DatasetIndex, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "elsewhere")
    reader = ImageReader(read_shard_index(str(tmp_path / "elsewhere")))
    assert reader.read(0) == ImageReader(index).read(0)
    assert str(tmp_path / "elsewhere") in reader.name(0) and index.file_name(0) in reader.name(0)


def test_the_same_data_gives_the_same_bytes(index: DatasetIndex, shards: Path, tmp_path: Path) -> None:
    progress: list[tuple[int, int, int]] = []
    num_bytes, num_shards = write_shards(
        index, tmp_path / "again", shard_megabytes=1, progress=lambda *done: progress.append(done)
    )
    reader = ImageReader(index)
    ends = np.cumsum([len(reader.read(i)) for i in range(NUM_IMAGES)]).tolist()
    assert (num_bytes, num_shards) == (ends[-1], len(list(shards.iterdir())) - 1)
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        for folder in (shards, tmp_path / "again")
    ]
    assert digests[0] == digests[1]
    assert progress == [(done, NUM_IMAGES, ends[done - 1]) for done in (64, 128, NUM_IMAGES)]


def test_images_that_are_equal_empty_or_broken_are_kept_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    contents = [b"\0" * 100, b"", b"\0" * 100, b"\0" * 7, b"junk", b"junk", b""]
    for i, content in enumerate(contents):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(content)
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 8, "width": 8} for i in range(len(contents))]
    (tmp_path / "a.json").write_text(
        json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "x"}]})
    )
    write_shards(read_coco_index(str(tmp_path / "a.json"), str(tmp_path / "images")), tmp_path / "shards")
    reader = ImageReader(read_shard_index(str(tmp_path / "shards")))
    assert [reader.read(i) for i in range(len(contents))] == contents


def test_a_missing_image_is_named_and_leaves_nothing_behind(index: DatasetIndex, tmp_path: Path) -> None:
    assert index.images_root is not None
    shutil.copytree(index.images_root, tmp_path / "images")
    (tmp_path / "images" / index.file_name(100)).unlink()
    broken = read_coco_index(index.source, str(tmp_path / "images"))
    with pytest.raises(ImageError, match=rf"{index.file_name(100)}: no such file"):
        write_shards(broken, tmp_path / "out" / "shards")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupted_run_leaves_nothing_behind(index: DatasetIndex, tmp_path: Path) -> None:
    def interrupt(*done: int) -> None:
        assert [path.name for path in tmp_path.iterdir()] == [".shards.partial"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(index, tmp_path / "shards", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(index: DatasetIndex, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(DataError, match="taken exists already"):
        write_shards(index, tmp_path / "taken")
    (tmp_path / ".busy.partial").mkdir()
    with pytest.raises(DataError, match=r"\.busy\.partial exists: another process"):
        write_shards(index, tmp_path / "busy")
    assert (tmp_path / ".busy.partial").is_dir()
    with pytest.raises(DataError, match="shard_megabytes"):
        write_shards(index, tmp_path / "x", shard_megabytes=0)


def test_what_is_not_a_folder_of_shards_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"index\.parquet: no such file"):
        read_shard_index(str(tmp_path))
    (tmp_path / "index.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"index\.parquet cannot be read"):
        read_shard_index(str(tmp_path))
    pq.write_table(pa.table({"x": [1]}), tmp_path / "index.parquet")
    with pytest.raises(DataError, match="not an index of shards"):
        read_shard_index(str(tmp_path))


def test_a_missing_or_cut_shard_is_an_error_that_names_it(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "cut")
    first = tmp_path / "cut" / "shard-00000.parquet"
    first.write_bytes(first.read_bytes()[:5000])
    reader = ImageReader(read_shard_index(str(tmp_path / "cut")))
    with pytest.raises(DataError, match=r"shard-00000\.parquet: the shard ends .* too early") as cut:
        reader.read(10)
    first.unlink()
    with pytest.raises(DataError, match=r"shard-00000\.parquet: the shard is missing") as missing:
        ImageReader(read_shard_index(str(tmp_path / "cut"))).read(10)
    assert not isinstance(cut.value, ImageError) and not isinstance(missing.value, ImageError)
