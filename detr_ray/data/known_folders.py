"""Names of folders that data sets put their images into, which say nothing about an image."""

from __future__ import annotations

KNOWN_FOLDERS = {
    "images", "image", "imgs", "img", "jpegimages", "data", "obj_train_data", "annotations", "labels", "xmls", "xml",
    "train", "training", "train2017", "val", "valid", "validation", "val2017",
}  # fmt: skip
"""In lower case."""


def without_known_folders(path: str) -> str:
    """A path, with ``/``, without the known folders that it begins with: ``cam1/a.jpg`` of ``images/cam1/a.jpg``."""
    *folders, name = path.split("/")
    known = next((place for place, part in enumerate(folders) if part.lower() not in KNOWN_FOLDERS), len(folders))
    return "/".join([*folders[known:], name])
