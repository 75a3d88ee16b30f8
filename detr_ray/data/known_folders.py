"""Usual names of the folders of images, of annotations, and of splits, which say nothing about an image."""

from __future__ import annotations

SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
"""Names that exports use for the folders and files of a split."""

ANNOTATION_FOLDERS = ("Annotations", "annotations", "xmls", "xml", "labels")
"""Names of folders of annotation files."""

IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "imgs", "data")
"""Names of folders of images, the surest first."""

KNOWN_FOLDERS = {
    name.lower()
    for names in (*SPLIT_NAMES.values(), ANNOTATION_FOLDERS, IMAGE_FOLDERS, ("train2017", "val2017"))
    for name in names
} | {"image", "img", "photos", "pictures", "obj_train_data"}
"""All of them, and others, in lower case."""


def without_known_folders(path: str) -> str:
    """A path, with ``/``, without the known folders that it begins with: ``cam1/a.jpg`` of ``images/cam1/a.jpg``."""
    *folders, name = path.split("/")
    known = next((place for place, part in enumerate(folders) if part.lower() not in KNOWN_FOLDERS), len(folders))
    return "/".join([*folders[known:], name])
