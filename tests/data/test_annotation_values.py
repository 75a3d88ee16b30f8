"""Odd values and odd text in annotation files and shards: kept exactly, or refused by record, key and value."""

from __future__ import annotations

import gzip
import json
import warnings
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from coco_folder import CocoFolder, encoded

from detr_ray.data.errors import DataError
from detr_ray.data.formats.coco import read_coco_index
from detr_ray.data.formats.shards import INDEX_NAME, read_shard_index
from detr_ray.data.index import DatasetIndex
from detr_ray.data.packing import write_shards
from detr_ray.evaluation import DetectionTable

NAN, INFINITY = float("nan"), float("inf")
BIG = 2**53 + 1  # the first whole number that a float cannot hold


def content() -> dict:
    return {
        "images": [{"id": k, "file_name": f"{k}.jpg", "height": 50, "width": 60} for k in (10, 20)],
        "annotations": [
            {"id": k, "image_id": 10 * k, "category_id": k, "bbox": [1, 2, 30, 40], "area": 1200, "iscrowd": 0}
            for k in (1, 2)
        ],
        "categories": [{"id": 1, "name": "moon"}, {"id": 2, "name": "star"}],
    }


@pytest.fixture
def read(tmp_path):
    def write_and_read(data: dict | bytes) -> DatasetIndex:
        path = tmp_path / "annotations.json"
        path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return read_coco_index(str(path), str(tmp_path))

    return write_and_read


def test_ids_are_kept_exactly_to_the_last_of_64_bits(read):
    largest, least = 2**63 - 1, -(2**63)
    data = content()
    for image, image_id in zip(data["images"], (largest, least), strict=True):
        image["id"] = image_id
    data["annotations"][0] |= {"id": BIG, "image_id": largest}
    data["annotations"][1] |= {"id": BIG + 1, "image_id": least}
    index = read(data)
    assert index.image_ids.tolist() == [least, largest]
    assert index.annotation_ids.tolist() == [BIG + 1, BIG]
    assert "annotation_ids_renumbered" not in index.problems


def test_ids_are_kept_exactly_beside_floats(read):
    data = content()
    data["images"] = [{"id": k, "file_name": f"{k}.jpg", "height": 50.0, "width": 60} for k in (BIG, BIG + 1, 10.0, 20)]
    for place, image_id in enumerate((BIG, 10)):
        data["annotations"][place] |= {"image_id": image_id, "id": [BIG, 3.0][place]}
    index = read(data)
    assert index.image_ids.tolist() == [10, 20, BIG, BIG + 1]
    assert index.annotation_ids.tolist() == [3, BIG]
    assert index.heights.tolist() == [50] * 4


def test_written_detections_have_the_ids_of_the_file():
    ids = np.array([BIG, 2**63 - 1, -(2**63)])
    table = DetectionTable(ids, ids[::-1].copy(), np.zeros((3, 4), np.float32), np.zeros(3, np.float32))
    written = json.loads(table.coco_results_json())
    assert [row["image_id"] for row in written] == ids.tolist()
    assert [row["category_id"] for row in written] == ids[::-1].tolist()


@pytest.mark.parametrize(
    ("value", "crowd"), [(0, False), (1, True), (0.0, False), (1.0, True), (False, False), (True, True), (None, False)]
)
def test_crowds_are_what_the_file_says(read, value, crowd):
    data = content()
    data["annotations"][1]["iscrowd"] = value
    index = read(data)
    assert index.is_crowd.tolist() == [False, crowd]
    assert index.problems.get("iscrowd_missing", 0) == (value is None)


NO_FLAG = ["0", "1", "false", "", 2, -1, 0.5, NAN, [], [0], {}, 10**400]
NO_ID = ["12", "", 2.5, 1e300, 2.0**54, NAN, INFINITY, True, False, 2**63, -(2**63) - 1, [1], {}, 10**400]
NO_SIZE = ["480", 480.5, NAN, INFINITY, True, 2**31, 2**63, [480], -480]
NO_BOX = [
    ["1", 2, 3, 4], [1, 2, 3, "3.5"], [True, 2, 3, 4], [[1], 2, 3, 4], [1, 2, 3], [1, 2, 3, 4, 5], [[1, 2, 3, 4]], [],
    "1 2 3 4", 7, {"x": 1}, None,
]  # fmt: skip
NO_AREA = ["12", "", True, [12], {}]
NO_NAME = [None, 7, 1.5, True, "", "  ", [], ["cat"], {}]
WRONG = [
    *[("annotations", "iscrowd", value) for value in NO_FLAG],
    *[(kind, key, value) for kind, key in (
        ("images", "id"), ("annotations", "image_id"), ("annotations", "category_id"), ("categories", "id"),
        ("annotations", "id"),
    ) for value in NO_ID],
    *[("images", key, None) for key in ("id", "file_name")],
    *[("images", key, value) for key in ("height", "width") for value in NO_SIZE],
    *[("annotations", "bbox", value) for value in NO_BOX],
    *[("annotations", "area", value) for value in NO_AREA],
    *[(kind, key, value) for kind, key in (("images", "file_name"), ("categories", "name")) for value in NO_NAME],
    ("categories", "id", -1),
    ("categories", "name", "half \ud83d pair"),
    ("images", "file_name", "se\udcf1or.jpg"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "key", "value"), WRONG, ids=lambda value: str(value)[:20].encode("unicode_escape"))
def test_what_would_have_to_be_guessed_is_refused(read, kind, key, value):
    data = content()
    data[kind][1][key] = value
    noun = {"images": "image", "annotations": "annotation", "categories": "category"}[kind]
    with pytest.raises(DataError, match=rf"annotations\.json: {noun} .* '{key}'") as caught:
        read(data)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 500
    assert message.isprintable(), "also on a terminal that takes what is printed at its word"
    assert message.encode("ascii"), message
    if value is not None and value != "" and not isinstance(value, int | dict | list):
        assert repr(value).strip("'")[:20] in message or "is empty" in message


@pytest.mark.parametrize("box", [[1, 2, 10**400, 4], [1e308, 0, 1e308, 5], [-1e39, 0, 1e39, 5], [None, 1, 1, 1]])
def test_boxes_beyond_all_numbers_are_left_out_without_a_warning(read, box):
    data = content()
    data["annotations"][0]["bbox"] = box
    index = read(data)
    assert index.annotation_ids.tolist() == [2]
    assert index.problems["boxes_not_finite"] == 1


@pytest.mark.parametrize("area", [10**400, 1e39, NAN, -5, None])
def test_areas_beyond_all_numbers_are_computed(read, area):
    data = content()
    data["annotations"][0]["area"] = area
    index = read(data)
    assert index.areas.tolist() == [1200, 1200]
    assert index.problems["areas_missing"] == 1


def test_several_wrong_records_are_named_by_the_first_and_the_value_of_that(read):
    data = content()
    data["annotations"] = [dict(data["annotations"][0], id=k, iscrowd="0") for k in range(1, 9)]
    with pytest.raises(DataError, match=r"annotation 1, 2, 3, 4, 5 and 3 more has a 'iscrowd' .*: '0'"):
        read(data)


# Text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_every_encoding_of_json_is_read(read, encoding):
    data = content()
    data["categories"][0]["name"] = "月 lună"
    text = json.dumps(data, ensure_ascii=False)
    assert read(text.encode(encoding)).categories[0] == (1, "月 lună")


def in_another_encoding(encoding: str) -> bytes:
    data = content()
    data["categories"][0]["name"] = "se\xf1or"
    return json.dumps(data, ensure_ascii=False).encode(encoding)


SOUND = json.dumps(content()).encode()
NO_JSON = [
    (in_another_encoding("cp1252"), r"not UTF-8 text: byte 0xf1 at place \d+ \(line 1\).*iconv"),
    (gzip.compress(SOUND), "gunzip"),
    (b"PK\x03\x04" + SOUND, "ZIP archive.*unzip"),
    (b"\xfd7zXZ\x00" + SOUND, "xz"),
    (b"\x28\xb5\x2f\xfd" + SOUND, "zstd"),
    (b"", "is empty.*copied completely"),
    (b" \n\t", "nothing but blanks.*copied completely"),
    (bytes(4096), "4096 zero bytes.*copied completely"),
    (b"\n<!DOCTYPE html>\n<html>Please log in</html>", "a web page.*login"),
    (b"<?xml version='1.0'?><annotation/>", "XML.*convert"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    (b"PAR1" + SOUND, r"data\.train\.shards"),
    (SOUND[: len(SOUND) // 2], r"broken JSON \(\d+ bytes\).*copied completely"),
    (in_another_encoding("utf-8").partition(b"\xc3")[0] + b"\xc3", "ends inside of a character.*copied completely"),
    (b"[" * 100_000, "nested too deeply"),
    (SOUND.replace(b"1200", b"1" * 5000), "cannot be parsed"),
]


@pytest.mark.parametrize(("raw", "message"), NO_JSON, ids=[message[:20] for _, message in NO_JSON])
def test_what_is_no_json_is_called_what_it_is(read, raw, message):
    with pytest.raises(DataError, match=message) as caught:
        read(raw)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    if "completely" not in message:
        assert "copied completely" not in str(caught.value), "it was"


def test_json_that_is_broken_in_its_middle_was_copied_completely(read):
    with pytest.raises(DataError, match=r"broken JSON \(\d+ bytes\): .*line 1 column") as caught:
        read(SOUND.replace(b'"area": 1200', b'"area": 1200,,', 1))
    assert "copied" not in str(caught.value)


def test_a_zip_archive_is_named(tmp_path, read):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("annotations.json", SOUND)
    with pytest.raises(DataError, match="ZIP archive"):
        read((tmp_path / "a.zip").read_bytes())


# Shards


@pytest.fixture
def shards(tmp_path):
    folder = CocoFolder(tmp_path / "set")
    folder.add("train", "a.jpg", encoded())
    folder.add("train", "b.jpg", encoded(seed=1), boxes=[(1, 4, 4, 20, 20)])
    for image, image_id in zip(folder.images["train"], (BIG, BIG + 1), strict=True):
        image["id"] = image_id
    for annotation in folder.annotations["train"]:
        annotation["image_id"] += BIG - 1
    root = folder.write()
    index = read_coco_index(str(root / "annotations/instances_train2017.json"), str(root / "train2017"))
    write_shards(index, tmp_path / "shards")
    return tmp_path / "shards"


def rewrite(shards, name: str, column: pa.Array) -> None:
    path = shards / INDEX_NAME
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(name), name, column), path)


def test_shards_keep_ids_exactly_in_every_width(shards):
    assert read_shard_index(str(shards)).image_ids.tolist() == [BIG, BIG + 1]
    before = read_shard_index(str(shards)).fingerprint
    rewrite(shards, "image_id", pa.array([BIG, BIG + 1], pa.uint64()))
    rewrite(shards, "height", pa.array([48, 48], pa.int8()))
    rewrite(shards, "category_ids", pa.array([[1, 2], [1]], pa.large_list(pa.uint16())))
    rewrite(shards, "file_name", pa.array(["a.jpg", "b.jpg"], pa.large_string()))
    assert read_shard_index(str(shards)).fingerprint == before


WRONG_COLUMNS = [
    ("image_id", pa.array([BIG, 2**63], pa.uint64()), "does not fit int64"),
    ("image_id", pa.array([1.0, 2.0]), "type double, not whole numbers"),
    ("image_id", pa.array(["1", "2"]), "type string, not whole numbers"),
    ("image_id", pa.array([1, None]), "1 nulls"),
    ("image_id", pa.array([5, 5]), "images twice"),
    ("height", pa.array([2**31, 48]), "sizes that no image has"),
    ("width", pa.array([0, 48]), "sizes that no image has"),
    ("file_name", pa.array([1, 2]), "not text"),
    ("file_name", pa.array(["a.jpg", None]), "1 nulls"),
    ("is_crowd", pa.array([["0", "0"], ["0"]]), "not true and false"),
    ("is_crowd", pa.array([[True, None], [True]]), "1 nulls"),
    ("category_ids", pa.array([[1, 7], [1]]), "unknown categories"),
    ("category_ids", pa.array([[1, 2, 1], []]), "unlike length"),
    ("category_ids", pa.array([[1, 2], None]), "1 nulls"),
    ("category_ids", pa.array([1, 2]), "not lists"),
    ("areas", pa.array([[1.0, NAN], [1.0]]), "NaN or infinity"),
    ("boxes_xywh", pa.array([[[1.0] * 3] * 2, [[1.0] * 3]], pa.list_(pa.list_(pa.float64(), 3))), "4 numbers each"),
    ("boxes_xywh", pa.array([[[1, 2, 3, 4], [1, 2, 3, None]], [[1, 2, 3, 4]]], pa.list_(pa.list_(pa.float64(), 4))),
     "1 nulls"),
    ("shard", pa.array([0, 7], pa.int32()), "images in no shard"),
    ("offset", pa.array([-1, 5]), "before the beginning"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "column", "message"), WRONG_COLUMNS, ids=[str(column[0]) for column in WRONG_COLUMNS])
def test_shards_that_hold_something_else_are_refused(shards, name, column, message):
    rewrite(shards, name, column)
    with pytest.raises(DataError, match=rf"index\.parquet.*{message}"):
        read_shard_index(str(shards))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shards", ["../../../etc/passwd"]),
        ("shards", "shard-00000.parquet"),
        ("categories", [{"id": 1, "name": None}, {"id": 2, "name": "dog"}]),
        ("categories", [{"id": "1", "name": "cat"}]),
        ("categories", None),
        ("format", "1"),
    ],
)
def test_what_shards_say_of_themselves_is_checked(shards, key, value):
    path = shards / INDEX_NAME
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"detr_ray"]) | {key: value}
    pq.write_table(table.replace_schema_metadata({b"detr_ray": json.dumps(about).encode()}), path)
    with pytest.raises(DataError, match=r"index\.parquet"):
        read_shard_index(str(shards))


def test_shards_without_a_column_are_refused(shards):
    path = shards / INDEX_NAME
    pq.write_table(pq.read_table(path).drop_columns(["areas"]), path)
    with pytest.raises(DataError, match="no column 'areas'"):
        read_shard_index(str(shards))
