"""What a folder that is in no known format seems to be: a hint for the message that refuses it."""

from __future__ import annotations

from detr_ray.data.errors import few
from detr_ray.data.formats import csv_rows
from detr_ray.data.formats.folder import Folder
from detr_ray.data.formats.values import class_files, words_in
from detr_ray.data.formats.yolo import LABEL_FOLDERS
from detr_ray.data.known_folders import SPLIT_NAMES

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".rar", ".7z")
_LABEL_FOLDERS = set(LABEL_FOLDERS.values())
_SPLIT_FOLDERS = tuple(name for names in SPLIT_NAMES.values() for name in names)


def hint(folder: Folder) -> str:
    """What the folder seems to hold, and what to do; empty if it cannot be told."""
    return csv_rows.explain(folder) or _of_yolo(folder) or _of_json(folder) or _of_archives(folder)


def _of_yolo(folder: Folder) -> str:
    has_classes = bool(class_files(folder, ("", *_LABEL_FOLDERS)))
    if not has_classes and not any(_LABEL_FOLDERS & set(folder.names(place)) for place in ("", *_SPLIT_FOLDERS)):
        return ""
    if not folder.images():
        return "It looks like YOLO's labels without their images: put these into `images`, beside `labels`."
    if has_classes:
        return (
            "It has YOLO's list of classes, but the first images have no label files: those of `images/a.jpg` and "
            "`a.jpg` are `labels/a.txt` and `a.txt`."
        )
    return "It looks like YOLO without data.yaml, the file that names the classes: write one (docs/your_data.md)."


def _of_json(folder: Folder) -> str:
    found = [f"{place}/{name}".lstrip("/") for place in ("", *_SPLIT_FOLDERS) for name in folder.names(place)]
    found = [name for name in found if name.lower().endswith(".json") and "test" not in words_in(name)]
    if not found:
        return ""
    return (
        f"{few(found, 2)}: not recognised as COCO's (LabelMe, VIA, CreateML and Label Studio have JSON of their own): "
        "export the set as COCO, YOLO or Pascal VOC."
    )


def _of_archives(folder: Folder) -> str:
    packed = [name for name in folder.names() if name.lower().endswith(_ARCHIVES)]
    return f"Unpack {few(packed, 2)} first." if packed else ""
