"""Images without annotations, as a user names them: files, folders, patterns, a COCO file, or shards.

Files are numbered from 1 in the order of their locations, and their sizes are read from their headers.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
from pyarrow.fs import FileType

from detr_ray.addresses import LocationError, check_address, is_remote, join, local_path, parent, resolve
from detr_ray.callbacks import Progress
from detr_ray.data.errors import DataError
from detr_ray.data.formats.coco import read_coco_images
from detr_ray.data.formats.folder import Folder, is_image, refuse_other_encoding
from detr_ray.data.formats.shards import INDEX_NAME, read_shard_index
from detr_ray.data.image_sizes import read_sizes
from detr_ray.data.images import ImageReader, StoredNames
from detr_ray.data.index import MOST_PIXELS_A_SIDE, DatasetIndex
from detr_ray.locations import file_info, list_files
from detr_ray.printable import printable
from detr_ray.retries import reason_of


@dataclass(frozen=True)
class BareImages:
    """Images without annotations, for prediction.

    Attributes:
        index: the images, without annotations.
        unreadable: a line for each image whose size cannot be read; these are not in the index.
    """

    index: DatasetIndex
    unreadable: tuple[str, ...]


def open_bare_images(
    given: Sequence[str], root: str | None = None, follow_links: bool = False, progress: Progress | None = None
) -> BareImages:
    """Finds the images that a user means.

    Args:
        given: paths or addresses of images, folders of images and patterns (``photos/*.jpg``, ``**`` for any folders);
            or of one COCO file; or of one folder of shards.
        root: folder or URI that the names in a COCO file are relative to.
        follow_links: whether links in the folder of a COCO file may lead out of it.
        progress: called with the number of images whose size was read, and of all.

    Raises:
        DataError: there are none, what was given is something else, or the name of one is not UTF-8.
    """
    try:
        for location in (*given, *([] if root is None else [root])):
            check_address(location)
            refuse_other_encoding(location)
            if location.lower().startswith(("http://", "https://")):
                raise DataError(
                    f"{printable(location)}: images behind web addresses are not listed here; download them, or name a "
                    "bucket (s3://, gs://). From a program, load_model(...).predict takes their addresses"
                )
        annotations = [location for location in given if _path(location).lower().endswith(".json")]
        if annotations:
            if len(given) > 1:
                raise DataError(f"{annotations[0]}: a COCO file stands alone; give its images' folder as root (--root)")
            if root is None:
                raise DataError(f"{annotations[0]}: the folder that its file names are relative to is missing (--root)")
            return BareImages(read_coco_images(resolve(annotations[0]), resolve(root), follow_links), ())
        if root is not None:
            raise DataError(f"{root}: a root (--root) is for a COCO file, which is not given")
        shards = [location for location in given if _are_shards(location)]
        if shards:
            if len(given) > 1:
                raise DataError(f"{shards[0]}: a folder of shards stands alone")
            return BareImages(read_shard_index(shards[0]).without_annotations(), ())
        files = sorted({file for location in given for file in _files_of(location)})
    except (OSError, LocationError) as error:
        raise DataError(f"images cannot be listed: {reason_of(error)}") from error
    return _of_files(files, progress)


def _path(location: str) -> str:
    return location.partition("?")[0] if is_remote(location) else location


def _are_shards(location: str) -> bool:
    if _path(location).endswith(f"/{INDEX_NAME}"):
        return True
    return not _is_pattern(location) and file_info(join(location, INDEX_NAME)).type == FileType.File


def _is_pattern(location: str) -> bool:
    """Whether this is a pattern. An existing file with such a name is no pattern."""
    address = location.partition("?")[0] if is_remote(location) else location
    if not any(mark in address for mark in "*?["):
        return False
    path = local_path(location)
    return path is None or not path.exists()


def _files_of(location: str) -> Iterable[str]:
    """Locations of the images that one of the given stands for."""
    if _is_pattern(location):
        found = _matching(location)
        if not found:
            raise DataError(f"{printable(location)}: no image matches")
        return found
    kind = file_info(location).type
    if kind == FileType.File:
        return [resolve(location)]
    if kind == FileType.NotFound:
        raise DataError(f"{printable(location)}: there is no such file or folder")
    folder = Folder(location)
    images = [name for name in folder.files() if _is_photo(name)]
    if not images:
        raise DataError(f"{printable(location)}: no image in it")
    return [folder.location(name) for name in images]


def _is_photo(name: str) -> bool:
    """Whether a file is an image, by its name; also of a format that is not read, so that it is listed as such."""
    return is_image(name) or name.lower().endswith((".heic", ".heif"))


def _matching(pattern: str) -> list[str]:
    if not is_remote(pattern):
        path = local_path(pattern)
        found = glob.glob(str(path), recursive=True)  # noqa: PTH207 - which knows relative patterns alone
        return [name for name in found if _is_photo(name) and os.path.isfile(name)]  # noqa: PTH113
    address, mark, options = pattern.partition("?")
    parts = address.split("/")
    fixed = next(place for place, part in enumerate(parts) if any(mark in part for mark in "*["))
    folder = "/".join(parts[:fixed]) + mark + options
    names = (file.name for file in list_files(folder))
    wanted = "/".join(parts[fixed:])
    return [join(folder, name) for name in names if _is_photo(name) and _matches(name, wanted)]


def _matches(name: str, pattern: str) -> bool:
    """Whether a path matches a pattern, part by part; ``**`` stands for any number of folders."""
    parts, wanted = name.split("/"), pattern.split("/")
    if "**" in wanted:
        return fnmatch.fnmatchcase(name, pattern.replace("**/", "*"))
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _of_files(files: Sequence[str], progress: Progress | None) -> BareImages:
    root = _common_folder(files)
    below = [_below(root, file) for file in files]
    refuse_other_encoding(root, below)
    names = pa.array(below, pa.string())
    # The user named these files or folders: links among them were meant.
    stored = StoredNames(names, root, follow_links=True)
    reader = ImageReader(stored)
    sizes, faults = read_sizes(reader, range(len(files)), progress)
    for row in np.flatnonzero((sizes > MOST_PIXELS_A_SIDE).any(axis=1)).tolist():
        faults[row] = f"{reader.name(row)}: its header says a size that no image has"
    rows = np.array([row for row in range(len(files)) if row not in faults], np.int64)
    index = DatasetIndex.of_images(
        image_ids=rows + 1,
        heights=sizes[rows, 0],
        widths=sizes[rows, 1],
        file_names=names.take(pa.array(rows)),
        source=root,
        images_root=root,
        follow_links=True,
    )
    return BareImages(index, tuple(faults[row] for row in sorted(faults)))


def _common_folder(files: Sequence[str]) -> str:
    """The folder or URI that all files lie below.

    Raises:
        DataError: there is none: the files are in several buckets, or some are local and some are not.
    """
    folders = sorted({parent(file) for file in files})
    if not any(map(is_remote, folders)):
        return os.path.commonpath(folders)
    options = {folder.partition("?")[2] for folder in folders}
    parts = [folder.partition("?")[0].split("/") for folder in folders]
    shared = [words[0] for words in takewhile(lambda words: len(set(words)) == 1, zip(*parts, strict=False))]
    if not all(map(is_remote, folders)) or len(options) > 1 or len(shared) < 3:
        raise DataError(
            f"images of several storages ({folders[0]} and {folders[-1]}): they have to lie in one; run it for each"
        )
    query = options.pop()
    return "/".join(shared) + (f"?{query}" if query else "")


def _below(root: str, file: str) -> str:
    if not is_remote(root):
        return Path(file).relative_to(root).as_posix()
    below = posixpath.relpath(file.partition("?")[0], root.partition("?")[0])
    return unquote(below)  # `join` escapes some characters of names
