"""Stored images for pictures of them."""

from __future__ import annotations

import numpy as np

from detr_ray.data.decoding import decode_image
from detr_ray.data.image_headers import ImageError
from detr_ray.data.images import ImageReader
from detr_ray.data.index import DatasetIndex


class StoredPixels:
    """Reads the images of a data set, in the orientation of their annotations.

    Args:
        index: the data set.

    Attributes:
        unreadable: row -> why its image could not be read, in the order of reading.
    """

    def __init__(self, index: DatasetIndex) -> None:
        self.unreadable: dict[int, str] = {}
        self._index = index
        self._reader = ImageReader(index)

    def read(self, row: int) -> np.ndarray:
        """``[H, W, 3]`` uint8; black if the image cannot be read, which ``unreadable`` then says.

        Raises:
            DataError: the storage failed.
        """
        size = (int(self._index.heights[row]), int(self._index.widths[row]))
        try:
            return decode_image(self._reader.read(row), self._reader.name(row), size).permute(1, 2, 0).numpy()
        except ImageError as error:
            self.unreadable[row] = f"image {self._index.image_ids[row]}: {error}"
            return np.zeros((*size, 3), np.uint8)
