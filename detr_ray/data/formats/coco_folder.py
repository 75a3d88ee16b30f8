"""A folder in COCO's layout: ``annotations/instances_train2017.json`` and ``train2017/``, and the same for ``val``; or,
as some tools export it, ``train/_annotations.coco.json`` beside its images.

Other tools use other names: ``annotations/instances_train.json`` or ``instances_default.json`` (CVAT, Datumaro),
``result.json`` with ``images/`` (Label Studio), ``labels.json`` with ``data/`` (FiftyOne). Such files are told apart by
the split in their name or in that of their folder; a file alone is a set that is not divided.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from detr_ray.data.errors import DataError, few
from detr_ray.data.formats.assembly import Reading
from detr_ray.data.formats.coco import read_coco_index
from detr_ray.data.formats.folder import Folder, read_beginning
from detr_ray.data.formats.values import splits_in, words_in
from detr_ray.data.image_places import name_below
from detr_ray.data.index import DatasetIndex
from detr_ray.data.known_folders import SPLIT_NAMES
from detr_ray.printable import printable

NAME = "coco"
NEEDS = (
    "COCO: annotations/instances_train2017.json and train2017/ (the same for val), or train/_annotations.coco.json, or "
    "a JSON file of each split or of all, in the folder or in annotations/, with images in images/ or data/"
)

_EXPORTED = "_annotations.coco.json"
_LOOKS_LIKE_COCO = re.compile(
    rb'(\xef\xbb\xbf)?\s*\{\s*"(info|licenses|images|annotations|categories|type|videos)"\s*:', re.DOTALL
)
_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')


def usual_places(split: str) -> tuple[str, str]:
    """Annotation file and folder of images of a split, as COCO itself has them."""
    return f"annotations/instances_{split}2017.json", f"{split}2017"


@dataclass(frozen=True)
class CocoFolder:
    """A data set in this layout.

    Attributes:
        folder: its folder.
        places: split -> annotation file and folder of images.
    """

    folder: Folder
    places: Mapping[str, tuple[str, str]]

    @property
    def splits(self) -> tuple[str, ...]:
        """Which of ``train``, ``val`` and ``all`` there are."""
        return tuple(self.places)

    def first_image(self, split: str) -> str | None:
        """Name of an image below the folder; None if there is none."""
        annotations, images = self._places(split)
        name = first_file_name(self.folder.location(annotations))
        return None if name is None else posixpath.join(images, name_below(self.folder.location(images), name))

    def read(self, split: str, reading: Reading) -> DatasetIndex:
        """Reads a split; see `read_coco_index`."""
        annotations, images = map(self.folder.location, self._places(split))
        return read_coco_index(annotations, images, self.folder.follow_links, reading)

    def _places(self, split: str) -> tuple[str, str]:
        return self.places.get(split) or usual_places(split)


def find(folder: Folder) -> CocoFolder | None:
    """The data set that lies in a folder in this format; None if it does not look like it."""
    places = {}
    for split, names in SPLIT_NAMES.items():
        candidates = [usual_places(split), *((f"{name}/{_EXPORTED}", name) for name in names)]
        found = next((pair for pair in candidates if folder.has(pair[0])), None)
        if found is not None:
            places[split] = found
    return CocoFolder(folder, places) if places else None


def find_exported(folder: Folder) -> CocoFolder | None:
    """The data set that lies in a folder as other tools export it; None if it does not look like it.

    Raises:
        DataError: several files may be the annotations of a split.
    """
    everywhere = [*_json_files(folder, "annotations"), *_json_files(folder, "")]
    places = {}
    for split, names in SPLIT_NAMES.items():
        found = [file for file in everywhere if splits_in(file) == [split]]
        found += [file for name in names for file in _json_files(folder, name)]
        if found:
            places[split] = _with_images(folder, found, names)
    others = [file for file in everywhere if len(splits_in(file)) != 1 and "test" not in words_in(file)]
    if not places and others:
        places["all"] = _with_images(folder, others, ("default",))
    return CocoFolder(folder, places) if places else None


def _json_files(folder: Folder, below: str) -> list[str]:
    """The files directly in a folder below that begin as COCO's do."""
    if not folder.has(below):
        return []
    names = (posixpath.join(below, name) for name in folder.names(below) if name.endswith(".json"))
    return [name for name in names if _is_coco(read_beginning(folder.location(name)))]


def _is_coco(beginning: bytes) -> bool:
    """Whether a file that begins so is COCO's, and not Label Studio's list of classes beside YOLO's labels."""
    return _LOOKS_LIKE_COCO.match(beginning) is not None and (b'"images"' in beginning or b'"annotations"' in beginning)


def _with_images(folder: Folder, files: list[str], names: Sequence[str]) -> tuple[str, str]:
    """Of the files that may be a split's annotations that one, and the folder of its images.

    Args:
        folder: the data set's.
        files: at least one.
        names: what folders of the split are called.
    """
    files = [file for file in files if "instances" in words_in(file)] or files  # beside keypoints and captions
    if len(files) > 1:
        raise DataError(
            f"{printable(folder.root)}: {few(files)} may all be annotations in COCO's format: keep one of them, or set "
            "data.train.annotations and data.train.images (and those of data.val)"
        )
    (file,) = files
    base = posixpath.dirname(file).removesuffix("annotations")
    inner = [*(f"images/{name}" for name in names), *names, "images", "data", ""]
    candidates = [place for place in (posixpath.join(base, name).rstrip("/") for name in inner) if folder.has(place)]
    image = first_file_name(folder.location(file))
    holding = (place for place in candidates if image is not None and folder.has(posixpath.join(place, image)))
    return file, next(holding, candidates[0])


def first_file_name(annotations: str) -> str | None:
    """The first file name in an annotation file; None if its beginning names none.

    Raises:
        DataError: the file cannot be read.
        ValueError: the name is not text.
    """
    found = _FILE_NAME.search(read_beginning(annotations))
    if found is None:
        return None
    name: str = json.loads(found[1])
    name.encode()
    return name
