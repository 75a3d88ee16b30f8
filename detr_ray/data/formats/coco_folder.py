"""A folder in COCO's layout: ``annotations/instances_train2017.json`` and ``train2017/``, and the same for ``val``; or,
as some tools export it, ``train/_annotations.coco.json`` beside its images.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pyarrow import fs

from detr_ray.addresses import LocationError
from detr_ray.data.errors import DataError
from detr_ray.data.formats.assembly import Reading
from detr_ray.data.formats.coco import read_coco_index
from detr_ray.data.formats.folder import SPLIT_NAMES, Folder
from detr_ray.data.image_places import name_below
from detr_ray.data.index import DatasetIndex
from detr_ray.locations import at
from detr_ray.retries import Patience, reason_of

NAME = "coco"
NEEDS = "COCO: annotations/instances_train2017.json and train2017/ (the same for val), or train/_annotations.coco.json"

_EXPORTED = "_annotations.coco.json"
_BEGINNING = 1 << 20
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
        """Which of ``train`` and ``val`` there are."""
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


def first_file_name(annotations: str) -> str | None:
    """The first file name in an annotation file; None if its beginning names none.

    Raises:
        DataError: the file cannot be read.
        ValueError: the name is not text.
    """

    def read(file_system: fs.FileSystem, path: str) -> bytes:
        with file_system.open_input_stream(path) as file:
            return file.read(_BEGINNING)

    try:
        found = _FILE_NAME.search(at(annotations, read, Patience(attempts=1)))
    except (OSError, LocationError) as error:
        raise DataError(f"{annotations}: {reason_of(error)}") from error
    if found is None:
        return None
    name: str = json.loads(found[1])
    name.encode()
    return name
