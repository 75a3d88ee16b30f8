"""Looks at every stored image of a split and notes all that cannot be used, without stopping at the first.

Headers are read in threads; pixels are decoded only where that is asked for, or where a file seems to be cut off.
Memory does not grow with the number of images, only with the number of bad ones. Knows nothing of boxes or of training.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from pyarrow import fs

from detr_ray.addresses import LocationError, join, parent
from detr_ray.callbacks import Progress
from detr_ray.data.decoding import decode_image
from detr_ray.data.errors import DataError
from detr_ray.data.image_groups import in_groups
from detr_ray.data.image_headers import ImageError, ImageHeader, WrongSizeError, read_header
from detr_ray.data.image_places import MisnamedError
from detr_ray.data.images import ImageReader
from detr_ray.data.index import DatasetIndex
from detr_ray.locations import file_info, list_files

_LOCAL_THREADS = 16
_REMOTE_THREADS = 64
_GROUP_IMAGES = 1024
# After so many failures the rest is not tried; each failure may take as long as the storage's time limit.
_MOST_STORAGE_FAILURES = 50
_SAME_RATIO = 0.02
_LAST_BYTES = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}


@dataclass(frozen=True, slots=True)
class BadImage:
    """An image that cannot be used.

    Attributes:
        image_id: the annotation file's id.
        file: location of the file.
        reason: what is wrong with it.
        wrong_size: (height, width) that it has, and that the annotations say, where that is what is wrong.
        advice: what to do about its name, where that is what is wrong.
        storage_failed: whether the storage failed, and the image may be fine.
    """

    image_id: int
    file: str
    reason: str
    wrong_size: tuple[tuple[int, int], tuple[int, int]] | None = None
    advice: str = ""
    storage_failed: bool = False


@dataclass(slots=True)
class Inspection:
    """What was seen of a split's images.

    Attributes:
        num_seen: images that were looked at; all of them, unless ``broken_off`` says why not.
        bad: those that cannot be used, by rising image id.
        formats: file format -> images.
        modes: pixel type as Pillow names it -> images.
        num_turned: images with an EXIF orientation other than upright.
        turned_unseen: files among them whose turned and stored sizes are equal, so that the size does not tell on which
            of the two the boxes were drawn.
        num_unreadable_exif: images with EXIF that can't be read, which are taken as stored.
        broken_off: why the rest was not looked at; empty where all were.
    """

    num_seen: int = 0
    bad: list[BadImage] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    num_turned: int = 0
    turned_unseen: list[str] = field(default_factory=list)
    num_unreadable_exif: int = 0
    broken_off: str = ""


def find_missing_storage(index: DatasetIndex) -> dict[int, str]:
    """Finds out whether the folder of images or the shards exist, with one listing of a folder.

    Returns:
        What is wrong, by number of the shard; number -1 is the folder. Empty where all is there.

    Raises:
        DataError: a URI that no file system answers to.
        OSError: the storage does not answer.
    """
    if index.shards is None:
        roots = (index.images_root,) if index.sources is None else index.sources.folders
        faulty = [(root, fault) for root in roots if root is not None and (fault := _fault_of_folder(root))]
        return {-1: f"{faulty[0][0]}: {faulty[0][1]}"} if faulty else {}
    wanted = np.zeros(len(index.shards.files), np.int64)
    np.maximum.at(wanted, index.shards.file_of, index.shards.offsets + index.shards.lengths)
    folders = {parent(location) for location in index.shards.files}
    sizes = {join(folder, file.name): file.num_bytes for folder in folders for file in list_files(folder)}
    faults = {}
    for number, (location, num_bytes) in enumerate(zip(index.shards.files, wanted.tolist(), strict=True)):
        if location not in sizes:
            faults[number] = f"{location}: the shard is missing"
        elif sizes[location] < num_bytes:
            faults[number] = f"{location}: the shard ends {num_bytes - sizes[location]} bytes too early"
    return faults


def _fault_of_folder(folder: str) -> str:
    try:
        kind = file_info(folder).type
    except LocationError as error:
        raise DataError(str(error)) from error
    if kind == fs.FileType.Directory:
        return ""
    return "no such folder" if kind == fs.FileType.NotFound else "is no folder"


def inspect_images(
    index: DatasetIndex,
    *,
    decode: bool = False,
    only: Sequence[int] | None = None,
    without_shards: frozenset[int] = frozenset(),
    progress: Progress | None = None,
) -> Inspection:
    """Looks at all images of a split, or at some.

    Args:
        index: the split.
        decode: decode every image, which also finds damage after the header. Otherwise only images whose header does
            not say whether they can be used, the first of each kind, and local files whose end is missing are decoded.
        only: rows of the index to look at; None for all.
        without_shards: numbers of shards whose images are passed over.
        progress: called with (images done, images in all) from time to time.
    """
    reader = ImageReader(index)
    rows = np.arange(len(index)) if only is None else np.asarray(only)
    if index.shards is not None and without_shards:
        rows = rows[~np.isin(index.shards.file_of[rows], sorted(without_shards))]
    threads = _REMOTE_THREADS if reader.is_remote else (os.cpu_count() or 1) if decode else _LOCAL_THREADS
    has_ends = not decode and not reader.is_remote
    found, num_failures = Inspection(), 0
    look = partial(_look, index, reader, set(), decode=decode, has_ends=has_ends)
    for group, of_group in in_groups(look, rows.tolist(), _GROUP_IMAGES, threads, "inspection"):
        for i, seen in zip(group, of_group, strict=True):
            if isinstance(seen, BadImage):
                found.bad.append(seen)
                num_failures += seen.storage_failed
            else:
                _note(found, reader.name(i), seen)
        found.num_seen += len(group)
        if progress is not None:
            progress(found.num_seen, len(rows))
        if num_failures > _MOST_STORAGE_FAILURES:
            found.broken_off = f"the storage failed for {num_failures} images; the rest was not looked at"
            break
    return found


def is_other_folder(bad: Sequence[BadImage], num_seen: int) -> bool:
    """Whether the images seem to lie elsewhere: none of those looked at is usable, for one reason."""
    return len(bad) == num_seen and len({image.reason for image in bad}) == 1


def common_cause(bad: Sequence[BadImage], num_seen: int) -> str:
    """What to do if all bad images have the same fault; empty otherwise.

    Args:
        bad: at least one.
        num_seen: images that were looked at.
    """
    kinds = {image.advice for image in bad}
    if len(kinds) == 1 and "" not in kinds:
        return kinds.pop()
    sizes = [image.wrong_size for image in bad if image.wrong_size is not None]
    if len(sizes) < len(bad):
        return ""
    if all(found == wanted[::-1] for found, wanted in sizes):
        return "height and width are swapped in the annotation file: write them the other way round"
    ratios = np.array([np.divide(found, wanted) for found, wanted in sizes])
    if len(sizes) > 1 and np.ptp(ratios) < _SAME_RATIO * ratios.mean():
        return (
            f"the images have {ratios.mean():.3g} times the sides that were annotated: train on the images that were "
            "annotated, or bring the sizes and boxes in the annotation file to those of the images"
        )
    if len(bad) == num_seen:
        return "no size in the annotation file is its image's: write the real ones; or are these other images?"
    return ""


def _note(found: Inspection, name: str, header: ImageHeader) -> None:
    found.formats[header.format] += 1
    found.modes[header.mode] += 1
    found.num_unreadable_exif += header.has_unreadable_exif
    found.num_turned += header.orientation > 1
    if header.orientation in (2, 3, 4) or (header.orientation > 4 and header.stored[0] == header.stored[1]):
        found.turned_unseen.append(name)


def _look(
    index: DatasetIndex, reader: ImageReader, kinds: set[tuple[str, str]], i: int, *, decode: bool, has_ends: bool
) -> ImageHeader | BadImage:
    name, size = reader.name(i), (int(index.heights[i]), int(index.widths[i]))
    try:
        header = read_header(whole := reader.read(i), name) if decode else reader.read_header(i)
        kind = (header.format, header.mode)
        # That a decoder for a kind of image is missing is only noticed when it is used.
        if decode:
            decode_image(whole, name, size)
        elif not header.is_certain or kind not in kinds or (has_ends and _seems_cut_off(reader, i, header)):
            decode_image(reader.read(i), name, size)
        else:
            header.turn(name, size)
    except (DataError, OSError) as error:
        return BadImage(
            image_id=int(index.image_ids[i]),
            file=name,
            reason=str(error).removeprefix(f"{name}: ").replace("\n", " "),
            wrong_size=(error.found, error.wanted) if isinstance(error, WrongSizeError) else None,
            advice=error.advice if isinstance(error, MisnamedError) else "",
            storage_failed=not isinstance(error, ImageError),
        )
    kinds.add(kind)
    return header


def _seems_cut_off(reader: ImageReader, i: int, header: ImageHeader) -> bool:
    """Whether a local file does not end as files of its format do; some that are whole do not either."""
    end = _LAST_BYTES.get(header.format)
    num_bytes, last = reader.read_end(i, len(end or b""))
    return last != end if end is not None else header.num_bytes == 0 or num_bytes < header.num_bytes
