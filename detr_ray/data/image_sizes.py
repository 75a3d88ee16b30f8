"""Sizes of stored images by their headers, for annotations that do not state them. Nothing is decoded."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from detr_ray.callbacks import Progress
from detr_ray.data.image_groups import in_groups
from detr_ray.data.image_headers import ImageError
from detr_ray.data.images import ImageReader

_REMOTE_THREADS = 64
_GROUP_IMAGES = 512


def read_sizes(
    reader: ImageReader, rows: Sequence[int], progress: Progress | None = None
) -> tuple[np.ndarray, dict[int, str]]:
    """Reads headers in threads.

    Args:
        reader: reads the images.
        rows: which of them.
        progress: called with (headers read, headers in all) from time to time.

    Returns:
        ``[len(rows), 2]`` int64, height and width after turning by EXIF, which is how annotation tools show images; and
        by row what is wrong with an image, whose size is 0.

    Raises:
        DataError: the storage failed or refused.
    """

    def look(i: int) -> tuple[int, int] | str:
        try:
            return reader.read_header(i).upright
        except ImageError as error:
            return str(error)

    sizes = np.zeros((len(rows), 2), np.int64)
    faults: dict[int, str] = {}
    threads = _REMOTE_THREADS if reader.is_remote else min(8, 2 * (os.cpu_count() or 1))
    done = 0
    for group, found in in_groups(look, rows, _GROUP_IMAGES, threads, "sizes"):
        for row, size in zip(group, found, strict=True):
            if isinstance(size, str):
                faults[row] = size
            else:
                sizes[done] = size
            done += 1
        if progress is not None:
            progress(done, len(rows))
    return sizes, faults
