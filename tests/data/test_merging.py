"""Several data sets trained together: one index with the images of all, and one class for each name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from coco_folder import encoded, sound_folder

from detr_ray.config import Config, ConfigError, load_config
from detr_ray.data.errors import DataError
from detr_ray.data.formats import open_split
from detr_ray.data.images import ImageReader
from detr_ray.data.inspection import find_missing_storage
from detr_ray.data.label_map import LabelMap
from detr_ray.data.merging import merge, merged_categories
from detr_ray.data.packing import write_shards
from detr_ray.engine.job import prepare_job
from detr_ray.engine.opened_data import ConfiguredData, open_evaluation_data
from detr_ray.engine.validation.evaluation_job import evaluation_config


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two data sets with the same image ids; the second has other ids for its classes, and one more of them."""
    folder = tmp_path_factory.mktemp("data")
    first, second = (sound_folder(folder / name) for name in ("first", "second"))
    for number, path in enumerate(sorted(second.rglob("*.jpg"))):
        path.write_bytes(encoded(seed=5000 + number))  # other pixels than those of the same name in the first
    for split in ("train", "val"):
        path = second / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        new = {1: 2, 2: 1}  # what are 1 and 2 in the first
        content["annotations"] = [a | {"category_id": new[a["category_id"]]} for a in content["annotations"]]
        content["categories"] = [
            c | {"id": new[c["id"]], "name": f" {c['name'].upper()}"} for c in content["categories"]
        ]
        content["categories"].append({"id": 3, "name": "zebra"})
        content["annotations"][0]["category_id"] = 3
        path.write_text(json.dumps(content))
    return first, second


def test_classes_of_the_same_name_are_one() -> None:
    first = [(1, "cat"), (7, "dog")]
    assert merged_categories([first, [(0, "Dog"), (1, "cat "), (5, "cow")]]) == ((1, "cat"), (5, "cow"), (7, "dog"))
    assert merged_categories([first, [(7, "cow"), (1, "emu")]]) == ((1, "cat"), (7, "dog"), (8, "cow"), (9, "emu"))
    assert merged_categories([first]) == tuple(first)


@pytest.mark.parametrize("in_shards", [False, True])
def test_each_image_has_its_pixels_boxes_and_classes(roots: tuple[Path, Path], tmp_path: Path, in_shards: bool) -> None:
    parts = [open_split(str(root), None, "train") for root in roots]
    if in_shards:
        for number, part in enumerate(parts):
            write_shards(part, str(tmp_path / str(number) / "train"))
        parts = [open_split(str(tmp_path / str(number)), None, "train") for number in range(2)]
    merged = merge(parts)
    assert len(merged) == sum(map(len, parts)) and len(set(merged.image_ids.tolist())) == len(merged)
    assert len(set(merged.annotation_ids.tolist())) == len(merged.category_ids)
    labels, reader = LabelMap.contiguous(merged.categories), ImageReader(merged)
    names = {name.strip().lower(): label for label, (_, name) in enumerate(merged.categories)}
    row = 0
    for part in parts:
        own, own_labels = ImageReader(part), LabelMap.contiguous(part.categories)
        for i in range(len(part)):
            assert reader.read(row) == own.read(i) and reader.name(row) == own.name(i)
            found, expected = merged.training_instances(row, labels), part.training_instances(i, own_labels)
            assert np.array_equal(found.boxes_xyxy_px, expected.boxes_xyxy_px)
            wanted = [names[part.categories[label][1].strip().lower()] for label in expected.labels.tolist()]
            assert found.labels.tolist() == wanted
            row += 1
    assert [name for _, name in merged.categories] == ["cat", "dog", "zebra"]
    some = merged.take(np.array([1, len(parts[0]) + 1]))
    assert ImageReader(some).read(1) == ImageReader(parts[1]).read(1) and find_missing_storage(some) == {}


def test_folders_and_shards_do_not_go_together(roots: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = (open_split(str(root), None, "train") for root in roots)
    write_shards(second, str(tmp_path / "shards" / "train"))
    packed = open_split(str(tmp_path / "shards"), None, "train")
    with pytest.raises(DataError, match=r"data\.sources: some of the data sets are shards and some are not"):
        merge([first, packed])
    both = merge([packed, packed])
    assert ImageReader(both).read(len(packed)) == ImageReader(packed).read(0)


def places(root: Path, split: str) -> str:
    return f"annotations: {root}/annotations/instances_{split}2017.json, images: {root}/{split}2017"


def configured(roots: tuple[Path, Path], folder: Path, *overrides: str) -> Config:
    sources = f"data.sources=[{{root: {roots[0]}}}, {{{places(roots[1], 'train')}, weight: 3}}]"
    keys = ("model={backbone: resnet18, backbone_norm: batch, backbone_weights: none}", "train.global_batch_size=4")
    return load_config(None, [sources, *keys, "tracking.enabled=false", f"run.storage={folder}", *overrides])


def test_a_source_is_taken_as_often_as_its_weight_says(roots: tuple[Path, Path], tmp_path: Path) -> None:
    job = prepare_job(configured(roots, tmp_path, f"data.val={{{places(roots[0], 'val')}}}"), lambda line: None)
    train, plan = job.data.train, job.data.plan(1, 0)
    assert train is not None and train.sources is not None and job.data.val is not None
    assert job.data.label_map.names == ("cat", "dog", "zebra")
    samples = [sample.index for step in range(job.steps_per_epoch) for batch in plan.step(step) for sample in batch]
    counts = np.bincount(samples, minlength=len(train))
    assert set(counts[train.sources.of == 0].tolist()) == {1} and set(counts[train.sources.of == 1].tolist()) == {3}
    with pytest.raises(DataError, match="its categories do not fit those trained on"):
        prepare_job(configured(roots, tmp_path, f"data.val={{{places(roots[1], 'val')}}}"), lambda line: None)


def test_too_few_samples_are_refused_before_there_is_a_run(roots: tuple[Path, Path], tmp_path: Path) -> None:
    keys = ("run.name=a", f"data.val={{{places(roots[0], 'val')}}}")
    few = f"data.sources=[{{root: {roots[0]}, weight: 0.1}}]"
    with pytest.raises(DataError, match=r"1 training images are too few for one step of train\.global_batch_size=4"):
        prepare_job(configured(roots, tmp_path, *keys, few), lambda line: None)
    assert list(tmp_path.iterdir()) == []
    often = (f"data.sources=[{{root: {roots[0]}, weight: 2}}]", "data.max_images=5", "train.global_batch_size=8")
    assert prepare_job(configured(roots, tmp_path, *keys, *often), lambda line: None).steps_per_epoch == 1


def test_a_run_goes_on_where_its_sources_have_moved_to(roots: tuple[Path, Path], tmp_path: Path) -> None:
    keys = (f"data.val={{{places(roots[0], 'val')}}}", "run.name=a")
    begun = prepare_job(configured(roots, tmp_path, *keys), lambda line: None)
    moved = tmp_path / "moved"
    shutil.copytree(roots[0], moved)
    again = prepare_job(configured((moved, roots[1]), tmp_path, *keys), lambda line: None)
    assert again.run.run_id == begun.run.run_id and not again.run.is_new
    for other, message in (
        (f"[{{root: {moved}}}, {{{places(roots[1], 'train')}, weight: 2}}]", "data.sources: begun with"),
        (f"[{{root: {moved}}}, {{{places(moved, 'train')}, weight: 3}}]", "train"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare_job(configured(roots, tmp_path, *keys, f"data.sources={other}"), lambda line: None)


def test_validation_images_are_held_out_of_all_sources(roots: tuple[Path, Path], tmp_path: Path) -> None:
    sources = ", ".join(f"{{{places(root, 'train')}}}" for root in roots)
    opened = ConfiguredData(configured(roots, tmp_path, "data.split={val: 0.4}", f"data.sources=[{sources}]").data)
    train, val = opened.open("train"), opened.open("val")
    assert train.sources is not None and val.sources is not None
    assert set(val.sources.of.tolist()) == {0, 1} and len(train) + len(val) == 2 * 12
    assert val.categories == train.categories


def test_few_images_are_some_of_each_source(roots: tuple[Path, Path]) -> None:
    first, second = (open_split(str(root), None, "train") for root in roots)
    merged = merge([first, second.first(4), first.first(1)])
    assert [len(first), len(merged)] == [12, 17]

    def taken(count: int) -> list[list[int]]:
        few = merged.first(count)
        assert few.sources is not None and len(few) == min(count, 17)
        return [(few.image_ids[few.sources.of == number] - start).tolist() for number, start in enumerate((1, 13, 17))]

    assert taken(8) == [[0, 1, 2, 3, 4], [0, 1], [0]]
    assert taken(3) == [[0], [0], [0]] and taken(1) == [[0], [], []]
    assert merged.first(17).fingerprint == merged.first(99).fingerprint == merged.fingerprint


@pytest.mark.parametrize("in_sources", [True, False])
def test_what_a_run_held_out_is_evaluated_where_no_data_is_given(
    roots: tuple[Path, Path], tmp_path: Path, in_sources: bool
) -> None:
    first, second = (f"{{{places(root, 'train')}}}" for root in roots)
    place = [f"data.sources=[{first}, {second}]"] if in_sources else ["data.sources=[]", f"data.train={first}"]
    stored = configured(roots, tmp_path, "data.split={val: 0.4, seed: 3}", *place)
    config, lines = evaluation_config(load_config(None, ["eval.size=64"]), stored, "a run")
    assert "the validation data is the run's own, since none is given" in lines
    held_out = ConfiguredData(stored.data).open("val")
    assert open_evaluation_data(config.data, print).fingerprint == held_out.fingerprint
    given = load_config(None, [f"data.val={{{places(roots[1], 'val')}}}"])
    config, _ = evaluation_config(given, stored, "a run")
    assert config.data == given.data.model_copy(update={"reduced_decoding": config.data.reduced_decoding})


def test_a_folder_without_the_images_is_refused_by_the_key_of_the_sources(
    roots: tuple[Path, Path], tmp_path: Path
) -> None:
    annotations = roots[0] / "annotations" / "instances_train2017.json"
    sources = f"data.sources=[{{annotations: {annotations}, images: {tmp_path}}}]"
    with pytest.raises(DataError, match=r"Is the folder right \(data\.sources\)\?"):
        prepare_job(configured(roots, tmp_path, sources, "train.global_batch_size=2"), lambda line: None)


def test_what_does_not_go_together_is_refused(roots: tuple[Path, Path], tmp_path: Path) -> None:
    for wrong, message in (
        (f"data.root={roots[0]}", r"data\.sources: cannot go together with data\.root"),
        ("data.sources=[{root: a, images: b}]", r"data\.sources\[0\]\.root: cannot go together with images"),
        ("data.sources=[{weight: 2}]", r"data\.sources\[0\]\.annotations: is missing"),
        ("data.sources=[{root: a, heft: 2}]", r"data\.sources\[0\]\.heft: is not known here"),
    ):
        with pytest.raises(ConfigError, match=message):
            configured(roots, tmp_path, wrong)
