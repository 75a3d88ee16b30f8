"""Formats of data sets: each module of this package reads one format into a `DatasetIndex`."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Protocol

from detr_ray.addresses import LocationError, check_address, local_path, parent, resolve
from detr_ray.data.errors import DataError
from detr_ray.data.formats.assembly import Reading
from detr_ray.data.formats.coco import read_coco_index
from detr_ray.data.formats.coco_folder import first_file_name
from detr_ray.data.formats.recognition import DataSet, find_data_set
from detr_ray.data.formats.shards import read_shard_index
from detr_ray.data.image_places import name_below
from detr_ray.data.index import DatasetIndex

__all__ = ["Reading", "SplitPlaces", "first_image", "open_split", "open_undivided"]


_OTHER_SUFFIXES = {
    ".csv": "a table", ".yaml": "YOLO's data file", ".yml": "YOLO's data file", ".xml": "one of VOC's files",
    ".txt": "a text file",
}  # fmt: skip


class SplitPlaces(Protocol):
    """Where a split lies: an annotation file and a folder of images, or a folder of shards."""

    annotations: str | None
    images: str | None
    shards: str | None


def open_split(
    root: str | None,
    places: SplitPlaces | None,
    split: str,
    follow_links: bool = False,
    *,
    data_format: str | None = None,
    reading: Reading | None = None,
) -> DatasetIndex:
    """Opens a split.

    Args:
        root: folder or URI of a data set in one of the formats; used where ``places`` is None.
        places: where the split lies otherwise.
        split: ``train`` or ``val``.
        follow_links: whether links in the folder of images may lead out of it.
        data_format: the format of the data set in ``root``; None: it is recognised by its files.
        reading: how the data set is to be read.

    Raises:
        DataError: it does not exist, or is not valid; or an address contains credentials.
    """
    reading = reading or Reading()
    found = _found(root, places, split, follow_links, data_format, reading)
    if isinstance(found, DatasetIndex):
        return found
    _refuse_missing(found, str(root), split)
    return found.read(split, reading)


def open_undivided(
    root: str | None,
    places: SplitPlaces | None,
    follow_links: bool = False,
    *,
    data_format: str | None = None,
    reading: Reading | None = None,
) -> DatasetIndex:
    """Opens all images of a data set that has no validation images of its own; see `open_split`.

    Raises:
        DataError: it has some; or as for a split.
    """
    reading = reading or Reading()
    found = _found(root, places, "train", follow_links, data_format, reading)
    if isinstance(found, DatasetIndex):
        return found
    undivided = _undivided(found, str(root))
    if "val" in found.splits:
        raise DataError(f"{root} has validation images of its own: set data.split=null")
    return found.read(undivided, reading)


def _found(
    root: str | None,
    places: SplitPlaces | None,
    split: str,
    follow_links: bool,
    data_format: str | None,
    reading: Reading,
) -> DatasetIndex | DataSet:
    """The index of the data at ``places``, otherwise the data set in a folder."""
    _check_addresses(root, places, split)
    if data_format is not None and places is not None:
        raise DataError(f"data.format={data_format} is the format of what lies in data.root, which is not given")
    if places is not None:
        return _read(places.annotations, places.images, places.shards, follow_links, reading)
    if root is None:
        raise DataError(f"no {split} data is given: set data.root or data.{split}")
    return find_data_set(root, data_format, follow_links)


def first_image(
    root: str | None, places: SplitPlaces | None, split: str, follow_links: bool, data_format: str | None = None
) -> tuple[str, str, str]:
    """One image of a split, or a shard, found without reading all annotations.

    Returns:
        The folder of which it may not lead out, its name below that folder, and the key of the configuration that it
        comes from.

    Raises:
        DataError: none can be found.
        ValueError: its name is not text.
    """
    if places is not None and places.shards is not None:
        folder = parent(places.shards) if places.shards.endswith(".parquet") else places.shards
        return resolve(folder), "shard-00000.parquet", f"data.{split}.shards"
    if places is not None:
        assert places.annotations is not None and places.images is not None, "validated with the configuration"
        name = first_file_name(resolve(places.annotations))
        if name is None:
            raise DataError(f"{places.annotations} does not name an image at its beginning")
        images = resolve(places.images)
        return images, name_below(images, name), f"data.{split}.images"
    assert root is not None, "a split has a place"
    found = find_data_set(root, data_format, follow_links)
    place = found.first_image(split if split in found.splits else _undivided(found, root))
    if place is None:
        raise DataError(f"{root}: no image of {split} is found")
    return resolve(root), place, f"data.root ({split})"


def _check_addresses(root: str | None, places: SplitPlaces | None, split: str) -> None:
    given = (root,) if places is None else (places.annotations, places.images, places.shards)
    try:
        for location in filter(None, given):
            check_address(location)
    except LocationError as error:
        raise DataError(f"{split}: {error}") from error


def _undivided(found: DataSet, root: str) -> str:
    """The part with all images of a data set that has no validation images of its own."""
    if tuple(found.splits) == ("val",):
        raise DataError(
            f"{root} has no training images, but only some that are called validation images: put training images "
            "beside them, or call these train and hold out a tenth of them by data.split={val: 0.1}"
        )
    return "all" if "all" in found.splits else "train"


def _refuse_missing(found: DataSet, root: str, split: str) -> None:
    """Refuses a data set without this split; of an empty folder, reading tells what is missing."""
    if not found.splits or split in found.splits:
        return
    _undivided(found, root)
    raise DataError(
        f"{root} has no validation images of its own: hold out a tenth of the images by data.split={{val: 0.1}}, "
        "or divide them into train and val"
    )


def _read(
    annotations: str | None, images: str | None, shards: str | None, follow_links: bool, reading: Reading
) -> DatasetIndex:
    """Reads a split: one case for each kind of places."""
    match annotations, images, shards:
        case _, _, str():
            return read_shard_index(shards)
        case str(), str(), None:
            _refuse_other_formats(annotations)
            return read_coco_index(annotations, images, follow_links, reading)
    raise AssertionError("validated with the configuration")


def _refuse_other_formats(annotations: str) -> None:
    """Refuses annotations that are not COCO's: a split alone does not tell how the others count the classes."""
    path = local_path(annotations)
    suffix = PurePosixPath(annotations.partition("?")[0]).suffix.lower()
    kind = _OTHER_SUFFIXES.get(suffix, "a folder" if path is not None and path.is_dir() else "")
    if kind:
        raise DataError(
            f"{annotations}: annotations (of data.train, data.val, data.sources) are COCO's JSON files, and this is "
            f"{kind}. Other formats are read from a folder that all of the set lies in, since only that tells the "
            f"numbers of the classes: set data.root={parent(annotations)}, and data.train and data.val to null; or "
            "root in an entry of data.sources"
        )
