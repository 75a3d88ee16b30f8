"""The generated data set: valid COCO, deterministic, whole or absent, and solvable (boxes fit what is drawn)."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from defaults import draw_shapes
from PIL import Image
from pycocotools.coco import COCO

from detr_ray.data import generated
from detr_ray.data.errors import DataError
from detr_ray.data.generated import CLASSES, MARKER

PARAMETERS = {"num_train": 60, "num_val": 20, "seed": 3, "image_size": (64, 96), "max_objects": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "deep" / "shapes"
    draw_shapes(folder, **PARAMETERS)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def open_coco(root: Path, split: str) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(root / "annotations" / f"instances_{split}2017.json")


@pytest.mark.parametrize(("split", "count"), [("train", 60), ("val", 20)])
def test_pycocotools_reads_it_and_the_images_fit(root: Path, split: str, count: int) -> None:
    coco = open_coco(root, split)
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert len(coco.getImgIds()) == count == len(list((root / f"{split}2017").iterdir()))
    for image in coco.loadImgs(coco.getImgIds()):
        with Image.open(root / f"{split}2017" / image["file_name"]) as stored:
            assert (stored.format, stored.mode, stored.size) == ("JPEG", "RGB", (image["width"], image["height"]))
        assert min(stored.size) >= 64 and max(stored.size) <= 96
        for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
            x, y, width, height = annotation["bbox"]
            assert width > 0 and height > 0 and x >= 0 and y >= 0
            assert x + width <= image["width"] and y + height <= image["height"]
            assert 0 < annotation["area"] <= width * height + 1 and annotation["iscrowd"] == 0


def test_it_varies(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "set", num_train=300, num_val=1, seed=0, max_objects=5)
    coco = open_coco(tmp_path / "set", "train")
    counts = [len(coco.getAnnIds(i)) for i in coco.getImgIds()]
    assert set(counts) == set(range(6))
    assert 1 <= counts.count(0) <= 30
    shapes = coco.loadAnns(coco.getAnnIds())
    assert min(np.bincount([shape["category_id"] for shape in shapes])[1:]) > 0.1 * len(shapes)
    longest = [max(shape["bbox"][2:]) for shape in shapes]
    assert min(longest) < 14 and max(longest) > 60
    ratios = [image["width"] / image["height"] for image in coco.loadImgs(coco.getImgIds())]
    assert min(ratios) < 0.7 and max(ratios) > 1.4


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(root: Path, tmp_path: Path) -> None:
    draw_shapes(tmp_path / "again", **PARAMETERS)
    assert digests(tmp_path / "again") == digests(root)
    draw_shapes(tmp_path / "other", **PARAMETERS | {"seed": 4})
    assert not set(digests(tmp_path / "other").values()) & set(digests(root).values())


def test_splits_are_disjoint_and_a_larger_set_begins_with_the_smaller(root: Path, tmp_path: Path) -> None:
    draw_shapes(tmp_path / "larger", **PARAMETERS | {"num_train": 70})
    small, large = digests(root), digests(tmp_path / "larger")
    images = [name for name in small if name.endswith(".jpg")]
    assert {name: large[name] for name in images} == {name: small[name] for name in images}
    assert len({small[name] for name in images}) == len(images) == 80
    assert not set(open_coco(root, "train").getImgIds()) & set(open_coco(root, "val").getImgIds())


def test_boxes_are_tight_around_what_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without clutter and with one object on a flat background, the box is where pixels differ from it."""

    def flat(_: object, height: int, width: int, __: float) -> np.ndarray:
        return np.full((height, width, 3), 127, np.int16)

    monkeypatch.setattr(generated, "_draw_background", flat)
    draw_shapes(tmp_path / "set", num_train=60, num_val=1, seed=0, max_objects=1, clutter=0, empty_fraction=0)
    coco = open_coco(tmp_path / "set", "train")
    for image in coco.loadImgs(coco.getImgIds()):
        pixels = np.asarray(Image.open(tmp_path / "set" / "train2017" / image["file_name"])).astype(int)
        contrast = np.abs(pixels - 127).max(axis=2)
        ys, xs = np.nonzero(contrast > 0.4 * contrast.max())  # above what JPEG smears
        (shape,) = coco.loadAnns(coco.getAnnIds(image["id"]))
        x, y, width, height = shape["bbox"]
        found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        np.testing.assert_allclose(found, [x, y, x + width, y + height], atol=2)


def test_called_again_it_returns_at_once(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    draw_shapes(root, **PARAMETERS)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_other_parameters_in_the_same_folder_are_refused_with_what_differs(root: Path) -> None:
    before = digests(root)
    with pytest.raises(DataError, match="num_train is 60, wanted 61; seed is 3, wanted 5") as caught:
        draw_shapes(root, **PARAMETERS | {"seed": 5, "num_train": 61})
    assert str(root) in str(caught.value) and "num_val" not in str(caught.value)
    assert digests(root) == before


@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_a_damaged_marker_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / MARKER).write_text(content)
    with pytest.raises(DataError, match=str(tmp_path)):
        draw_shapes(tmp_path, **PARAMETERS)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="not a generated data set"):
        draw_shapes(tmp_path, **PARAMETERS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_interrupted_run_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    root = tmp_path / "set"

    def interrupt(done: int, total: int) -> None:
        assert not root.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_shapes(root, **PARAMETERS, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    seen: list[tuple[int, int]] = []
    draw_shapes(root, **PARAMETERS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(80, 80)]
    assert json.loads((root / MARKER).read_text())["seed"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_two_processes_may_want_the_same_folder_at_once(root: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(draw_shapes, tmp_path / "set", **PARAMETERS) for _ in range(3)]:
            done.result()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert digests(tmp_path / "set") == digests(root)


def test_an_empty_folder_and_a_link_to_one_are_filled(root: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    draw_shapes(tmp_path / "link", **PARAMETERS)
    assert digests(tmp_path / "disk") == digests(root)
