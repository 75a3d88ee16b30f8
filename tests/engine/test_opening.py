"""Opening data for training: what is refused before workers start, and that check says the same of the same data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from coco_folder import CocoFolder, encoded
from defaults import augmentation
from PIL import Image
from tiny import fit_here, tiny_config

from detr_ray.config import Config, ConfigError, DataConfig
from detr_ray.data.errors import DataError
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import prepare_job
from detr_ray.engine.opened_data import ConfiguredData, open_data
from detr_ray.engine.preflight.checks import run_preflight
from detr_ray.engine.stream.planned_data import refuse_positions_out_of_reach
from detr_ray.model.position_encoding import LEARNED_LIMIT, LearnedPositionEncoding


@pytest.fixture
def folder(tmp_path: Path) -> CocoFolder:
    return CocoFolder(tmp_path / "set")


def opened(config: Config) -> str:
    """What training says when it opens the data; raises what it raises."""
    lines: list[str] = []
    open_data(config.data, lines.append)
    return "\n".join(lines)


def errors_of_check(config: Config) -> list[str]:
    report = run_preflight(config, lambda line: None)
    return [f"{f.message} | {f.advice}" for f in report.findings if f.level == "error" and f.area != "tracking"]


# Bad images


@pytest.mark.parametrize("keys", [(), ("data.on_bad_image=skip",)])
def test_the_first_images_of_a_set_may_be_bad(folder: CocoFolder, tmp_path: Path, keys: tuple[str, ...]) -> None:
    for number in range(20):
        folder.add("train", f"bad{number}.jpg", None)
    folder.fill("train", 80)
    folder.fill("val", 3)
    said = opened(tiny_config(folder.write(), tmp_path, *keys))
    assert ("WARNING: " in said and "bad0.jpg: no such file (train: " in said) == (keys == ())


def test_a_folder_without_any_of_the_images_is_refused(folder: CocoFolder, tmp_path: Path) -> None:
    folder.fill("val", 3)
    for number in range(100):
        folder.add("train", f"bad{number}.jpg", None)
    config = tiny_config(folder.write(), tmp_path, "data.on_bad_image=skip")
    with pytest.raises(
        DataError, match=r"32 of 32 images .*Is the folder right \(data\.train\.images, or data\.root\)"
    ):
        opened(config)


def test_a_bad_validation_image_is_found_before_the_first_epoch(folder: CocoFolder, tmp_path: Path) -> None:
    folder.fill("train", 8)
    folder.fill("val", 10)
    folder.add("val", "bad.jpg", encoded()[:300])
    with pytest.raises(DataError, match=r"bad\.jpg: damaged image.*val: 1 of 11 images"):
        opened(tiny_config(folder.write(), tmp_path))
    opened(tiny_config(folder.root, tmp_path, "data.on_bad_image=skip"))


def test_pixels_without_a_range_are_found_at_the_first_look(folder: CocoFolder, tmp_path: Path) -> None:
    for number in range(4):
        folder.add("train", f"{number}.tif", encoded("TIFF", mode="F"))
    folder.fill("val", 2)
    with pytest.raises(DataError, match=r"0\.tif: its pixels are floats"):
        opened(tiny_config(folder.write(), tmp_path))


# What is wrong with a set as a whole


def change_sizes(change: Callable[[dict], None]) -> Callable[[CocoFolder], None]:
    def apply(folder: CocoFolder) -> None:
        for image in folder.images["train"]:
            change(image)

    return apply


def change_boxes(change: Callable[[list[float]], list[float]]) -> Callable[[CocoFolder], None]:
    def apply(folder: CocoFolder) -> None:
        for annotation in folder.annotations["train"]:
            annotation["bbox"] = change(annotation["bbox"])

    return apply


def swap(image: dict) -> None:
    image["height"], image["width"] = image["width"], image["height"]


def double(image: dict) -> None:
    image["height"], image["width"] = 2 * image["height"], 2 * image["width"]


FAULTS = {
    "sizes swapped": (change_sizes(swap), "height and width are swapped"),
    "images resized": (change_sizes(double), "0.5 times the sides that were annotated"),
    "normalised": (change_boxes(lambda b: [b[0] / 64, b[1] / 48, b[2] / 64, b[3] / 48]), "multiply them by width"),
    "corners": (change_boxes(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]), "take the first number from the third"),
    "no box": (lambda folder: folder.annotations["train"].clear(), "not one box to learn from"),
    "crowds only": (lambda folder: [a.update(iscrowd=1) for a in folder.annotations["train"]], "not one box to learn"),
    "boxes outside": (change_boxes(lambda b: [b[0] + 100, *b[1:]]), "not one box to learn from"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_and_training_refuse_the_same_with_the_advice_that_fits(
    folder: CocoFolder, tmp_path: Path, fault: str
) -> None:
    folder.fill("train", 12)
    folder.fill("val", 4)
    damage, advice = FAULTS[fault]
    damage(folder)
    config = tiny_config(folder.write(), tmp_path)
    with pytest.raises(DataError) as refused:
        opened(config)
    assert advice in str(refused.value)
    (error,) = errors_of_check(config)
    assert advice in error


def test_check_looks_at_the_images_that_training_takes(folder: CocoFolder, tmp_path: Path) -> None:
    folder.fill("train", 12)
    folder.fill("val", 4)
    folder.add("train", "bad.jpg", None)
    config = tiny_config(folder.write(), tmp_path, "data.max_images=8")
    assert errors_of_check(config) == []
    assert opened(config).startswith("train: 8 images")


@pytest.mark.parametrize("official", [False, True])
def test_the_label_space_that_check_names_is_the_one_of_training(
    folder: CocoFolder, tmp_path: Path, official: bool
) -> None:
    import torch
    from goldens import golden_state_dict

    from detr_ray.model import build_model

    folder.fill("train", 8)
    folder.fill("val", 4)
    config = tiny_config(folder.write(), tmp_path)
    if official:
        torch.save({"model": golden_state_dict(build_model(config.model, 91))}, tmp_path / "published.pth")
        config = tiny_config(folder.root, tmp_path, f"model.init_from={tmp_path}/published.pth")
    report = run_preflight(config, lambda line: None)
    (said,) = [f.message for f in report.findings if "classes, " in f.message and f.area == "labels"]
    assert said == "2 classes, contiguous (auto)"
    assert prepare_job(config, lambda line: None).data.label_map.num_classes == 2


# Learned positions


def learned(folder: CocoFolder, tmp_path: Path, *keys: str) -> Config:
    return tiny_config(folder.root, tmp_path, "model.position_embedding=learned", *keys)


@pytest.fixture
def small_set(folder: CocoFolder) -> CocoFolder:
    folder.fill("train", 8)
    folder.fill("val", 4)
    folder.write()
    return folder


TOO_LARGE = [
    (("eval.size=1300", "eval.max_size=1733"), "eval.size", "eval.max_size=1733"),
    (("eval.size=1216", "eval.max_size=1621"), "eval.size", "up to 1621 pixels"),
    (("data.augment.scales=[1300]", "data.augment.max_size=2000"), "data.augment", "up to 1733 pixels"),
    (("eval.size=700", "eval.max_size=900", "model.backbone_stride=16"), "eval.size", "16 pixels each"),
    (
        ("eval.size=700", "eval.max_size=900", "model.dilation=true", "model.backbone=resnet50"),
        "eval.size",
        "16 pixels each",
    ),
]


@pytest.mark.parametrize(("keys", "key", "part"), TOO_LARGE)
def test_sizes_that_learned_positions_do_not_reach_are_refused(
    small_set: CocoFolder, tmp_path: Path, keys: tuple[str, ...], key: str, part: str
) -> None:
    config = learned(small_set, tmp_path, "model.backbone_stride=32", *keys)
    with pytest.raises(ConfigError, match=rf"^{key}: model\.position_embedding=learned has vectors for 50 rows") as it:
        prepare_job(config, lambda line: None)
    assert part in str(it.value)
    (error,) = errors_of_check(config)
    assert error.startswith(f"{key}: model.position_embedding=learned")
    prepare_job(tiny_config(small_set.root, tmp_path, "model.backbone_stride=32", *keys), lambda line: None)


@pytest.mark.parametrize("keys", [("eval.size=1200", "eval.max_size=1600"), ("eval.size=1600", "eval.max_size=1600")])
def test_sizes_that_they_just_reach_are_fine(small_set: CocoFolder, tmp_path: Path, keys: tuple[str, ...]) -> None:
    config = learned(small_set, tmp_path, "model.backbone_stride=32", *keys, "data.augment.max_size=1600",
                     "data.augment.scales=[1200]")  # fmt: skip
    prepare_job(config, lambda line: None)
    assert errors_of_check(config) == []


def test_a_checkpoint_with_learned_positions_is_evaluated_within_reach(small_set: CocoFolder, tmp_path: Path) -> None:
    from detr_ray.data.formats import open_split

    val = open_split(str(small_set.root), None, "val")
    model = learned(small_set, tmp_path, "model.backbone_stride=32").model
    config = tiny_config(small_set.root, tmp_path, "eval.size=1216", "eval.max_size=1621")
    with pytest.raises(ConfigError, match=r"eval\.size"):
        refuse_positions_out_of_reach(config, model, None, val)
    refuse_positions_out_of_reach(config, config.model, None, val)


def test_the_reach_is_that_of_the_model() -> None:
    import torch

    encoding = LearnedPositionEncoding(8)
    encoding(torch.zeros(1, 8, LEARNED_LIMIT, LEARNED_LIMIT), None)
    with pytest.raises(ValueError, match="reaches"):
        encoding(torch.zeros(1, 8, LEARNED_LIMIT + 1, 1), None)


@pytest.mark.parametrize("seed", range(5))
def test_no_draw_exceeds_the_largest_side(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 900, (50, 2))
    values = augmentation(
        scales=(64, 200), max_size=int(rng.integers(150, 400)), crop_scales=(80, 120), crop_min=30, crop_max=110
    )
    limit = values.largest_side(sizes)
    drawn = values.draw(np.repeat(sizes, 400, axis=0), rng.random((20_000, 8)))
    assert drawn.size.max() <= limit
    assert limit <= max(1.2 * drawn.size.max(), values.max_size + 30)


def test_the_published_sizes_are_within_reach() -> None:
    assert augmentation().largest_side(np.array([[480, 640], [640, 427]])) == 1250


def unsized(root: Path, bad: int) -> Path:
    """A data set whose sizes are in the images' headers alone, ``bad`` of which cannot be read."""
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for number in range(8):
            is_bad = number < bad and split == "train"
            (root / split / f"{number}.png").write_bytes(b"" if is_bad else encoded("PNG"))
        rows = "".join(f"{number}.png,1,1,9,9,cat\n" for number in range(8))
        (root / f"{split}.csv").write_text(rows)
    return root


def test_images_without_a_size_are_bad_images(tmp_path: Path) -> None:
    root = unsized(tmp_path / "set", bad=3)
    skip, most = "data.on_bad_image=skip", "data.max_bad_images="
    for keys, message in (
        ((), r"train\.csv: the size of 3 of 8 images cannot be read \(.*0\.png.*on_bad_image=skip leaves them out"),
        (
            (skip, f"{most}2"),
            r"the size of 3 of 8 images cannot be read .*; or raise data\.max_bad_images",
        ),
    ):
        config = tiny_config(root, tmp_path, *keys)
        with pytest.raises(DataError, match=message):
            opened(config)
        assert any("the size of 3 of 8 images" in line for line in errors_of_check(config))
    config = tiny_config(root, tmp_path, skip, f"{most}3", "train.global_batch_size=2", "train.epochs=1", "run.name=a")
    assert "3 images whose size cannot be read (left out)" in opened(config)
    assert errors_of_check(config) == [] and fit_here(config).status == "finished"
    # One more that only decoding finds is one too many, as the check command says before.
    (root / "train" / "7.png").write_bytes(encoded("PNG")[:-200])
    assert "or set data.max_bad_images to 4" in errors_of_check(config)[0]
    with pytest.raises(RunFailed, match=r"4 different images could not be read, more than data\.max_bad_images=3"):
        fit_here(tiny_config(root, tmp_path, skip, f"{most}3", "train.global_batch_size=2", "run.name=b"))


def test_images_without_a_size_are_counted_over_all_sources(tmp_path: Path) -> None:
    roots = [unsized(tmp_path / name, bad=2) for name in ("first", "second")]
    for split in (None, {"val": 0.3}):
        if split is not None:
            for root in roots:
                (root / "val.csv").unlink()
                (root / "train.csv").rename(root / "labels.csv")
                (root / "train").rename(root / "images")
        sources = [{"root": str(root)} for root in roots]
        data = DataConfig(sources=sources, split=split, on_bad_image="skip", max_bad_images=4)
        assert ConfiguredData(data).open("train").images_left_out == 4
        with pytest.raises(DataError, match=r"second.*the size of 2 of 8 images .*or raise data\.max_bad_images"):
            ConfiguredData(data.model_copy(update={"max_bad_images": 3})).open("train")


def test_a_set_that_is_divided_is_read_once(tmp_path):
    """The sizes of its images are in their headers: each is read for the first split, and none for the second."""
    root = tmp_path / "set"
    sizes = [(20 + number, 30) for number in range(9)]
    (root / "images").mkdir(parents=True)
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(root / "images" / f"{number}.png")
    (root / "labels.csv").write_text("".join(f"images/{number}.png,1,1,9,9,cat\n" for number in range(9)))
    configured = ConfiguredData(DataConfig(root=str(root), split={"val": 0.3}))
    told: list[tuple[int, int]] = []
    train = configured.open("train", lambda what: lambda *counts: told.append(counts))
    assert told == [(9, 9)]
    val = configured.open("val", lambda what: lambda *counts: told.append(counts))
    assert told == [(9, 9)] and len(train) + len(val) == 9 and len(val) > 0
