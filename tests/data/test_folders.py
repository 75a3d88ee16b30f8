"""Folders of data sets with what a file system may hold: names that are not UTF-8, folders that cannot be listed.

Run alone: ``pytest tests/data/test_folders.py``. What bad files give is in ``test_bad_formats.py``.
"""

from __future__ import annotations

import errno
import os

import pytest
from coco_folder import encoded
from format_sets import put

from detr_ray.data.errors import DataError
from detr_ray.data.formats import open_split, open_undivided
from detr_ray.data.formats.bare_images import open_bare_images

ODD = os.fsdecode(b"T\xfcr")  # as archives from Windows have it
YOLO = {"data.yaml": "train: images\nval: images\nnames: [cat]\n", "images/a.jpg": encoded(), "labels/a.txt": ""}
VOC = "<annotation><object><name>cat</name><bndbox>{}</bndbox></object></annotation>".format(
    "".join(f"<{side}>{place}</{side}>" for side, place in (("xmin", 1), ("ymin", 2), ("xmax", 9), ("ymax", 9)))
)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (YOLO | {f"images/{ODD}.jpg": encoded()}, r"images/T\\udcfcr\.jpg"),
        (YOLO | {f"images/{ODD}.jpg": encoded(), f"labels/{ODD}.txt": ""}, r"labels/T\\udcfcr\.txt"),
        (YOLO | {f"images/{ODD}/b.jpg": encoded()}, r"images/T\\udcfcr/b\.jpg"),
        ({f"Annotations/{ODD}.xml": VOC, f"JPEGImages/{ODD}.jpg": encoded()}, r"Annotations/T\\udcfcr\.xml"),
        ({"Annotations/a.xml": VOC, f"JPEGImages/{ODD}/a.jpg": encoded()}, r"JPEGImages/T\\udcfcr/a\.jpg"),
        ({f"{ODD}.csv": "a.jpg,1,2,9,9,cat", "a.jpg": encoded()}, r"T\\udcfcr\.csv"),
    ],
)
def test_names_that_are_not_utf8_are_refused(tmp_path, files, named):
    root = put(tmp_path / "set", files)
    with pytest.raises(DataError, match=rf"{named}: its name is not UTF-8: rename it"):
        open_split(str(root), None, "train") if "data.yaml" in files else open_undivided(str(root), None)


def test_images_for_prediction_with_such_names_are_refused(tmp_path):
    root = put(tmp_path, {f"{ODD}.jpg": encoded(), f"{ODD}/a.jpg": encoded(), "b/c.jpg": encoded()})
    for given in (root, root / f"{ODD}.jpg", root / ODD):
        with pytest.raises(DataError, match=r"T\\udcfcr.*: its name is not UTF-8: rename it"):
            open_bare_images([str(given)])
    assert len(open_bare_images([str(root / "b")]).index) == 1


@pytest.mark.parametrize(
    ("files", "closed"),
    [
        (YOLO, "images/y"),
        (YOLO, "labels"),
        (YOLO, "images"),
        (YOLO, ""),
        ({"Annotations/a.xml": VOC, "JPEGImages/a.jpg": encoded()}, "JPEGImages"),
        ({"Annotations/a.xml": VOC, "JPEGImages/a.jpg": encoded()}, "Annotations"),
        ({"labels.csv": "a.jpg,1,2,9,9,cat", "a.jpg": encoded()}, "more/images"),
    ],
)
@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO])
def test_folders_that_cannot_be_listed_are_refused(tmp_path, monkeypatch, files, closed, error):
    """By replacing what lists them, as tests may run as a user who may list everything."""
    root = put(tmp_path, files)
    place = root / closed
    place.mkdir(parents=True, exist_ok=True)

    def refuse(listing):
        def listed(path):
            if f"{os.fspath(path)}/".startswith(f"{place}/"):  # nor can be what is in it
                raise OSError(error, os.strerror(error), os.fspath(path))
            return listing(path)

        return listed

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, refuse(getattr(os, name)))
    instead = "; data.train.annotations and data.train.images need no listing" if place == root else ""
    with pytest.raises(DataError, match=rf"^{place}: cannot be listed: {os.strerror(error)}{instead}$"):
        open_split(str(root), None, "train") if "data.yaml" in files else open_undivided(str(root), None)


def test_folders_of_disks_and_archives_are_not_looked_into(tmp_path):
    files = {"labels.csv": "a.jpg,1,2,9,9,cat", "a.jpg": encoded(), "lost+found/b.jpg": b"", "__MACOSX/c.jpg": b""}
    index = open_undivided(str(put(tmp_path, files)), None)
    assert index.file_names.to_pylist() == ["a.jpg"] and not index.problems
