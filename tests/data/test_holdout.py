"""A data set is divided the same way when it grows, and so that no class is on one side alone."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from format_sets import data_set, put_images, voc_xml

from detr_ray.data.formats import open_undivided
from detr_ray.data.holdout import Holdout

HEADER = "path,x1,y1,x2,y2,class,width,height"


def sides(root: Path) -> dict[str, bool]:
    """File name, without folders -> whether it is for validation."""
    index = open_undivided(str(root), None)
    names = [name.rpartition("/")[2] for name in index.file_names.to_pylist()]
    return dict(zip(names, Holdout(0.4).is_val(index).tolist(), strict=True))


def test_every_class_of_two_images_is_on_both_sides(tmp_path: Path) -> None:
    """Of fewer images there may be classes that cannot be: three of two images each, each two of which share one."""
    draw = random.Random(0)
    (tmp_path / "images").mkdir()
    for number in range(150):
        images = [draw.sample("abcdef", draw.choice((1, 1, 2, 3))) for _ in range(draw.randint(12, 40))]
        rows = [f"{i}.jpg,1,1,9,9,{name},50,40" for i, names in enumerate(images) for name in names]
        (tmp_path / "labels.csv").write_text("\n".join([HEADER, *rows]))
        index = open_undivided(str(tmp_path), None)
        is_val = np.repeat(Holdout(0.2, seed=number).is_val(index), np.diff(index.first_box))
        for category_id, name in index.categories:
            of_class = is_val[index.category_ids == category_id]
            assert len(of_class) == 1 or len(set(of_class.tolist())) == 2, f"set {number}, class {name}"


@pytest.mark.parametrize(
    ("photos", "labels"),
    [("JPEGImages/{}", "Annotations/{}"), ("{}/images", "Annotations/{}"), ("{}", "Annotations/{}")],
)
def test_images_in_a_new_folder_of_voc_move_no_other(tmp_path: Path, photos: str, labels: str) -> None:
    images = [image for part in data_set().values() for image in part]
    voc = tmp_path / "voc"
    put_images(voc / photos.format("v0"), images)
    for image in images:
        path = (voc / labels.format("v0") / image.name).with_suffix(".xml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(voc_xml(image), encoding="utf-8")
    before = sides(voc)
    assert len(before) == len(images) and len(set(before.values())) == 2
    more = voc / photos.format("v1")
    put_images(more, images[:1])
    (more / images[0].name).rename(more / "new.jpg")
    (voc / labels.format("v1")).mkdir(exist_ok=True)
    (voc / labels.format("v1") / "new.xml").write_text(voc_xml(images[0]), encoding="utf-8")
    after = sides(voc)
    assert {name: after[name] for name in before} == before and "new.jpg" in after


def test_a_table_may_name_images_with_or_without_their_folder(tmp_path: Path) -> None:
    images = [image for part in data_set().values() for image in part]
    table = tmp_path / "table"
    put_images(table / "images", images)
    rows = [f"{image.name},1,1,9,9,thing,," for image in images]
    (table / "labels.csv").write_text("\n".join([HEADER, *rows]), encoding="utf-8")
    before = sides(table)
    assert len(set(before.values())) == 2
    put_images(table / "more", images[:1])
    (table / "more" / images[0].name).rename(table / "more/new.jpg")
    (table / "labels.csv").write_text("\n".join([HEADER, *rows, "more/new.jpg,1,1,9,9,thing,,"]), encoding="utf-8")
    after = sides(table)
    assert {name: after[name] for name in before} == before and "new.jpg" in after
    (table / "labels.csv").write_text("\n".join([HEADER, *(f"images/{row}" for row in rows)]), encoding="utf-8")
    assert sides(table) == before, "named with the folder"
