"""Images given by a program: paths, addresses, bytes, Pillow's images, arrays and tensors.

All of them are converted to upright ``uint8`` RGB, like decoded files. Local files are read when their pixels are
needed; remote files are downloaded at once and kept encoded.
"""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from torch import Tensor

from detr_ray.addresses import LocationError, is_remote, local_path
from detr_ray.credentials import without_credentials
from detr_ray.data.decoding import decode_array, decode_image, decode_opened, reduction
from detr_ray.data.errors import DataError
from detr_ray.data.image_headers import ImageError, read_header
from detr_ray.data.images import READS_AT_ONCE, ImageReader, StoredNames
from detr_ray.locations import read_bytes
from detr_ray.printable import printable
from detr_ray.retries import reason_of

GivenImage = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor
"""One image."""

SILENCE_TIMEOUT_S = 20.0
"""Time limit in seconds for a server that sends nothing."""
MOST_BYTES = 1 << 28
"""Largest size in bytes of an image at a URL."""


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """An image whose size is known.

    Attributes:
        name: its name in messages and results.
        size: (height, width) in pixels, upright.
        pixels: function that gives ``[3, H, W]`` uint8 RGB; a JPEG can be decoded at its size divided by 1, 2, 4 or 8.
    """

    name: str
    size: tuple[int, int]
    pixels: Callable[[int], Tensor]

    def decode(self, wanted: tuple[int, int], margin: float | None) -> Tensor:
        """The pixels, for an image that will be resized.

        Args:
            wanted: (height, width) that it will be resized to.
            margin: see `reduction`; None to decode it at full size.
        """
        return self.pixels(1 if margin is None else reduction(self.size, wanted, margin))


def is_single(images: Any) -> bool:
    """Whether this is a single image.

    An array of four dimensions is several images.
    """
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim < 4
    # What is no image is refused as a single one, by `open_images`.
    return isinstance(images, str | bytes | bytearray | memoryview | Image.Image) or not isinstance(images, Iterable)


def open_images(images: Iterable[GivenImage]) -> list[OpenedImage]:
    """Finds out the size of each image.

    Raises:
        ImageError: an image cannot be read; the message names it.
        DataError: the storage failed or refused.
        TypeError: a value is no image.
    """
    given = [os.fspath(image) if isinstance(image, os.PathLike) else image for image in images]
    fetched = _fetch_all([item for item in given if isinstance(item, str) and _is_elsewhere(item)])
    opened = []
    for number, item in enumerate(given):
        if not isinstance(item, str):
            opened.append(_in_memory(item, f"image {number}"))
        elif _is_elsewhere(item):
            opened.append(_of_bytes(fetched[item](), _shown(item)))
        else:
            opened.append(_of_file(item))
    return opened


def _in_memory(item: Any, name: str) -> OpenedImage:
    if isinstance(item, bytes | bytearray | memoryview):
        return _of_bytes(bytes(item), name)
    if isinstance(item, Image.Image):
        name = printable(str(getattr(item, "filename", ""))) or name
        return _decoded(decode_opened(item, name), name)
    if isinstance(item, np.ndarray):
        return _decoded(decode_array(item, name), name)
    if isinstance(item, Tensor):
        if item.is_floating_point():
            item = item.float()  # NumPy lacks bfloat16
        values = item.detach().cpu().numpy()
        return _decoded(decode_array(values if values.ndim < 3 else np.moveaxis(values, 0, -1), name), name)
    if item is None:
        raise TypeError(f"{name}: is None, which cv2.imread gives for a file that is not there or that it cannot read")
    raise TypeError(
        f"{name}: {type(item).__name__} is no image; give a path, an address, bytes of an image file, a Pillow "
        "image, an array [height, width, channels] or a tensor [channels, height, width]"
    )


def _of_file(path: str) -> OpenedImage:
    """An image on this machine. Only its header is read now, if that is enough."""
    place = local_path(path)
    assert place is not None, "elsewhere is another case"
    reader = _reader_of(place)
    if place.is_dir():
        raise ImageError(f"{printable(path)}: is a folder; give the images in it")
    if any(mark in path for mark in "*?[") and not place.exists():
        raise ImageError(f"{printable(path)}: no such file; a pattern is expanded by sorted(glob.glob(...)), not here")
    header = reader.read_header(0)
    if not header.is_certain:
        return _decoded(decode_image(reader.read(0), reader.name(0)), reader.name(0))
    size = header.upright
    return OpenedImage(
        reader.name(0), size, lambda reduced: decode_image(reader.read(0), reader.name(0), size, reduced)
    )


def _reader_of(place: Path) -> ImageReader:
    names = pa.array([place.name], pa.string())
    return ImageReader(StoredNames(names, str(place.parent), follow_links=True))


def _of_bytes(data: bytes, name: str) -> OpenedImage:
    header = read_header(data, name)
    if not header.is_certain:
        return _decoded(decode_image(data, name), name)
    size = header.upright
    return OpenedImage(name, size, lambda reduced: decode_image(data, name, size, reduced))


def _decoded(pixels: Tensor, name: str) -> OpenedImage:
    return OpenedImage(name, (pixels.shape[1], pixels.shape[2]), lambda reduced: pixels)


def _is_elsewhere(address: str) -> bool:
    return is_remote(address)


def _shown(address: str) -> str:
    return printable(without_credentials(address))


def _fetch_all(addresses: Sequence[str]) -> dict[str, Callable[[], bytes]]:
    """Starts to download files; each of the returned functions gives one file, or raises."""
    if not addresses:
        return {}
    with ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="fetching") as pool:
        return {address: pool.submit(_fetch, address).result for address in dict.fromkeys(addresses)}


def _fetch(address: str) -> bytes:
    if address.lower().startswith(("http://", "https://")):
        return _download(address)
    try:
        return read_bytes(address)
    except FileNotFoundError as error:
        raise ImageError(f"{_shown(address)}: {reason_of(error)}") from error
    except LocationError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        raise DataError(f"{_shown(address)}: cannot be read: {reason_of(error)}") from error


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "detr_ray"})
    try:
        with urllib.request.urlopen(request, timeout=SILENCE_TIMEOUT_S) as response:
            data: bytes = response.read(MOST_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise ImageError(f"{_shown(url)}: the server answers {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ImageError(f"{_shown(url)}: cannot be fetched: {reason_of(error)}") from error
    if len(data) > MOST_BYTES:
        raise ImageError(f"{_shown(url)}: has more than the {MOST_BYTES >> 20} MiB that are fetched")
    return data
