"""The forms in which a data set may lie: each module of this package reads one of them into a `DatasetIndex`."""

from __future__ import annotations

from typing import Protocol

from detr_ray.addresses import LocationError, check_address, join
from detr_ray.data.errors import DataError
from detr_ray.data.formats.coco import read_coco_index
from detr_ray.data.formats.shards import read_shard_index
from detr_ray.data.index import DatasetIndex


class SplitPlaces(Protocol):
    """Where a split lies: an annotation file and a folder of images, or a folder of shards."""

    annotations: str | None
    images: str | None
    shards: str | None


def open_split(root: str | None, places: SplitPlaces | None, split: str, follow_links: bool = False) -> DatasetIndex:
    """Opens a split.

    Args:
        root: folder or URI in COCO's layout (``annotations/instances_train2017.json``, ``train2017/``, and the same for
            ``val``); used where ``places`` is None.
        places: where the split lies otherwise.
        split: ``train`` or ``val``.
        follow_links: whether links in the folder of images may lead out of it.

    Raises:
        DataError: it is not there, or not what it should be; or an address holds credentials.
    """
    given = (root,) if places is None else (places.annotations, places.images, places.shards)
    try:
        for location in filter(None, given):
            check_address(location)
    except LocationError as error:
        raise DataError(f"{split}: {error}") from error
    if places is not None:
        return _read(places.annotations, places.images, places.shards, follow_links)
    if root is None:
        raise DataError(f"no {split} data is given: set data.root or data.{split}")
    annotations = join(root, "annotations", f"instances_{split}2017.json")
    return _read(annotations, join(root, f"{split}2017"), None, follow_links)


def _read(annotations: str | None, images: str | None, shards: str | None, follow_links: bool) -> DatasetIndex:
    """Reads a split in the format that its places tell: one case each."""
    match annotations, images, shards:
        case _, _, str():
            return read_shard_index(shards)
        case str(), str(), None:
            return read_coco_index(annotations, images, follow_links)
    raise AssertionError("validated with the configuration")
