"""Looks at every stored image of a split and notes all that cannot be used, without stopping at the first.

Headers are read in threads; pixels are decoded only where that is asked for, or where a file seems to be cut off.
Memory does not grow with the number of images, only with the number of bad ones. Knows nothing of boxes or of training.
"""

from __future__ import annotations

import io
import os
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from pyarrow import fs

from detr_ray.data.errors import DataError
from detr_ray.data.images import ImageError, ImageReader, decode_image, read_image_size
from detr_ray.data.index import CocoIndex
from detr_ray.locations import LocationError, file_info, join, list_files, parent

_LOCAL_THREADS = 16
_REMOTE_THREADS = 64
_GROUP_IMAGES = 1024
# Storage that fails again and again is away; each failure may take as long as the storage's time limit.
_MOST_STORAGE_FAILURES = 50
_EXIF_ORIENTATION = 0x0112
_LAST_BYTES = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


@dataclass(frozen=True, slots=True)
class BadImage:
    """An image that cannot be used.

    Attributes:
        image_id: the annotation file's id.
        file: location of the file.
        reason: what is wrong with it.
    """

    image_id: int
    file: str
    reason: str


@dataclass(slots=True)
class Inspection:
    """What was seen of a split's images.

    Attributes:
        num_seen: images that were looked at; all of them, unless ``broken_off`` says why not.
        bad: those that cannot be used, by rising image id.
        formats: file format -> images.
        modes: pixel type as Pillow names it -> images.
        num_turned: images with an EXIF orientation other than upright.
        turned_unseen: files among them whose size is the same either way, so that it does not show whether the boxes
            were drawn on the turned or on the stored image.
        broken_off: why the rest was not looked at; empty where all were.
    """

    num_seen: int = 0
    bad: list[BadImage] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    num_turned: int = 0
    turned_unseen: list[str] = field(default_factory=list)
    broken_off: str = ""


@dataclass(frozen=True, slots=True)
class _Seen:
    """One image's header, or what is wrong with it."""

    format: str = ""
    mode: str = ""
    is_turned: bool = False
    is_turned_unseen: bool = False
    reason: str = ""
    storage_failed: bool = False


def find_missing_storage(index: CocoIndex) -> dict[int, str]:
    """Finds out whether the folder or the shards that hold the images are there, with one look at a folder.

    Returns:
        What is wrong, by number of the shard; number -1 is the folder. Empty where all is there.

    Raises:
        DataError: a URI that no file system answers to.
        OSError: the storage does not answer.
    """
    if index.shards is None:
        assert index.images_root is not None, "an index has its images in a folder or in shards"
        try:
            kind = file_info(index.images_root).type
        except LocationError as error:
            raise DataError(str(error)) from error
        if kind == fs.FileType.Directory:
            return {}
        return {-1: f"{index.images_root}: {'no such folder' if kind == fs.FileType.NotFound else 'is no folder'}"}
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


def inspect_images(
    index: CocoIndex,
    *,
    decode: bool = False,
    without_shards: frozenset[int] = frozenset(),
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Looks at all images of a split.

    Args:
        index: the split.
        decode: decode every image whole, which finds damage behind the header; otherwise only files in a local folder
            that lack the end of their format are decoded.
        without_shards: numbers of shards whose images are passed over.
        progress: called with (images done, images in all) from time to time.
    """
    reader = ImageReader(index)
    rows = np.arange(len(index))
    if index.shards is not None and without_shards:
        rows = rows[~np.isin(index.shards.file_of, sorted(without_shards))]
    threads = _REMOTE_THREADS if reader.is_remote else (os.cpu_count() or 1) if decode else _LOCAL_THREADS
    has_ends = not decode and index.images_root is not None and not reader.is_remote
    found, num_failures = Inspection(), 0
    look = partial(_look, index, reader, decode=decode, has_ends=has_ends)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads, thread_name_prefix="inspection") as pool:
        # Pillow warns of images above 89 megapixels; they are read all the same.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for start in range(0, len(rows), _GROUP_IMAGES):
            group = rows[start : start + _GROUP_IMAGES].tolist()
            for i, seen in zip(group, pool.map(look, group), strict=True):
                _note(found, index, reader, i, seen)
                num_failures += seen.storage_failed
            found.num_seen += len(group)
            if progress is not None:
                progress(found.num_seen, len(rows))
            if num_failures > _MOST_STORAGE_FAILURES:
                found.broken_off = f"the storage failed for {num_failures} images; the rest was not looked at"
                break
    return found


def _note(found: Inspection, index: CocoIndex, reader: ImageReader, i: int, seen: _Seen) -> None:
    if seen.reason:
        found.bad.append(BadImage(int(index.image_ids[i]), reader.name(i), seen.reason))
        return
    found.formats[seen.format] += 1
    found.modes[seen.mode] += 1
    found.num_turned += seen.is_turned
    if seen.is_turned_unseen:
        found.turned_unseen.append(reader.name(i))


def _look(index: CocoIndex, reader: ImageReader, i: int, *, decode: bool, has_ends: bool) -> _Seen:
    name = reader.name(i)
    size = (int(index.heights[i]), int(index.widths[i]))
    try:
        data = reader.read(i) if decode else _header(reader, i, name, size)
        if decode:
            decode_image(data, name, size)
        seen = _describe(data)
        if has_ends and _seems_cut_off(Path(name), seen.format):
            decode_image(reader.read(i), name, size)
    except (DataError, OSError) as error:
        reason = str(error).removeprefix(f"{name}: ").replace("\n", " ")
        return _Seen(reason=reason, storage_failed=not isinstance(error, ImageError))
    return seen


def _describe(data: bytes) -> _Seen:
    """Format, pixel type and orientation of an image that is known to be readable."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            height, width = image.height, image.width
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
            return _Seen(
                format=image.format or "unknown",
                mode=image.mode,
                is_turned=orientation in range(2, 9),
                is_turned_unseen=orientation in (2, 3, 4) or (orientation in range(5, 9) and height == width),
            )
    except Exception:  # the other decoder read it, so this one may raise what it likes
        return _Seen(format="unknown", mode="unknown")


def _header(reader: ImageReader, i: int, name: str, size: tuple[int, int]) -> bytes:
    """The first bytes of an image, as many as its header takes; its size is the one given, or an error is raised."""
    head = reader.read_head(i)
    try:
        read_image_size(head, name, size)
    except ImageError:
        whole = reader.read(i)
        if len(whole) > len(head):
            read_image_size(whole, name, size)
            return whole
        raise
    return head


def _seems_cut_off(path: Path, file_format: str) -> bool:
    """Whether a file does not end as files of its format do; some that are whole do not either."""
    end = _LAST_BYTES.get(file_format)
    if end is None:
        return False
    with path.open("rb") as file:
        file.seek(-min(len(end), path.stat().st_size), os.SEEK_END)
        return file.read() != end
