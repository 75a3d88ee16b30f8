"""Draws the images of a prediction with their detections."""

from __future__ import annotations

import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from detr_ray.addresses import join
from detr_ray.callbacks import Progress
from detr_ray.data.decoding import decode_image
from detr_ray.data.image_headers import ImageError
from detr_ray.data.images import ImageReader
from detr_ray.data.index import DatasetIndex
from detr_ray.evaluation import DetectionTable
from detr_ray.locations import list_files, write_bytes
from detr_ray.viz import DrawnBoxes, detection_picture

_THREADS = 4


def draw_pictures(
    folder: str,
    index: DatasetIndex,
    found: DetectionTable,
    names: Mapping[int, str],
    least_score: float,
    progress: Progress,
) -> None:
    """Writes a JPEG for each readable image. Existing pictures are not drawn again.

    Args:
        folder: path or URI; a picture has the name of its image, with ``.jpg`` added where it ends otherwise.
        index: the images.
        found: all detections, by rising image id.
        names: of the categories.
        least_score: lowest score of detections that are drawn.
        progress: called with the number of images that are done, and of all.

    Raises:
        DataError: the storage of the images failed.
        OSError: a picture could not be written.
    """
    there = {file.name for file in list_files(folder)}
    reader = ImageReader(index)
    bounds = np.searchsorted(found.image_ids, index.image_ids)
    ends = np.searchsorted(found.image_ids, index.image_ids, side="right")

    def draw(i: int) -> None:
        name = index.file_name(i).lstrip("/")
        name = name if name.lower().endswith((".jpg", ".jpeg")) else f"{name}.jpg"
        if name in there or ".." in name.split("/"):
            return
        size = (int(index.heights[i]), int(index.widths[i]))
        try:
            pixels = decode_image(reader.read(i), reader.name(i), size).permute(1, 2, 0).numpy()
        except ImageError:  # it is in the list of bad images
            return
        rows = np.arange(bounds[i], ends[i])
        rows = rows[found.scores[rows] >= least_score]
        shown = [names[category_id] for category_id in found.category_ids[rows].tolist()]
        picture = detection_picture(
            np.ascontiguousarray(pixels), DrawnBoxes(found.boxes_xywh_px[rows], shown, found.scores[rows])
        )
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        write_bytes(join(folder, name), file.getvalue())

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="pictures") as pool:
        for done, _ in enumerate(pool.map(draw, range(len(index))), 1):
            progress(done, len(index))
