"""Stored images: where their bytes are read from, and how bytes become RGB pixels.

Every readable image becomes ``uint8 [3, H, W]`` RGB, whatever its file format and mode; one that is not readable is an
`ImageError` that names the file and the reason. (What the JPEG library itself takes for whole is whole: pixels lost
in the middle of a file with a valid end are filled by it.) Choices where formats leave one: the EXIF
orientation is applied, an alpha channel is dropped (as ``convert("RGB")`` of Pillow does), 16-bit images keep the high
byte, animations show their first frame. Knows nothing of boxes, augmentation or batches.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from detr_ray.data.errors import DataError
from detr_ray.data.index import CocoIndex
from detr_ray.data.ranges import OpenFiles, Span, join_parts
from detr_ray.locations import LocationError, is_remote, join, open_location, resolve
from detr_ray.retries import AccessDenied, patiently, reason_of

READS_AT_ONCE = 16
"""Remote reads of one process that are under way at the same time."""

_JPEG_START = b"\xff\xd8\xff"
_RGB = 3
"""torchvision's ``ImageReadMode.RGB``."""
_EXIF_ORIENTATION = 0x0112
_HEAD_BYTES = 65_536
# JPEG markers of a frame header, which holds the size: all of C0..CF but the tables (C4, CC) and the reserved C8.
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class ImageError(DataError):
    """One image that cannot be used; the message names the file and the reason."""


def reduction(stored: tuple[int, int], wanted: tuple[int, int], margin: float) -> int:
    """By how much (1, 2, 4, 8) an image may be made smaller while it is decoded.

    Args:
        stored: (height, width) in pixels. Only what divides both is considered, so that no pixel is cut in two.
        wanted: (height, width) that the image is resized to next.
        margin: the reduced image has at least this many times as many pixels along each side as are wanted.
    """
    fitting = (
        k for k in (8, 4, 2) if all(a % k == 0 and a >= k * margin * b for a, b in zip(stored, wanted, strict=True))
    )
    return next(fitting, 1)


def decode_image(data: bytes, name: str, size: tuple[int, int] | None = None, reduced: int = 1) -> Tensor:
    """Decodes an image file of any format that torchvision or Pillow know.

    JPEGs go through torchvision's decoder (which reports truncated data), all else and the kinds of JPEG that it does
    not know through Pillow.

    Args:
        data: the file's content.
        name: what to call the image in messages.
        size: (height, width) in pixels that the annotations were made on. Some annotation tools ignore the EXIF
            orientation: where only the image as stored has this size, it is left as stored.
        reduced: 2, 4 or 8 to get a JPEG at that fraction of ``size``, which both its sides have to be multiples of.
            The decoder then skips the finest frequencies instead of computing pixels that are averaged afterwards.
            Other formats, and JPEGs that their decoder will not reduce so, come as they are.

    Returns:
        ``[3, H, W]`` uint8 RGB; not contiguous (the channels of a pixel lie together, as decoders leave them).

    Raises:
        ImageError: no content, not an image, damaged, truncated, a pixel type without a defined range, or another size
            than ``size``.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty")
    if data.startswith(_JPEG_START):
        if size is not None and (stored := _jpeg_size(data)) is not None and sorted(stored) != sorted(size):
            # Said before decoding: a damaged header can claim gigabytes.
            raise _wrong_size(name, stored, size)
        if size is not None and reduced > 1:
            pixels = _decode_reduced(data, name, (size[0] // reduced, size[1] // reduced), reduced)
            if pixels is not None:
                return pixels
        decode = _decode_jpeg
    else:
        decode = _decode_with_pillow
    pixels = decode(data, name, True)
    if size is not None and tuple(pixels.shape[1:]) != tuple(size):
        upright_size = (pixels.shape[1], pixels.shape[2])
        if upright_size == (size[1], size[0]):
            pixels = decode(data, name, False)
        if tuple(pixels.shape[1:]) != tuple(size):
            raise _wrong_size(name, upright_size, size)
    return pixels


def read_image_size(data: bytes, name: str, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Reads an image's size from its header, without decoding a pixel.

    Args:
        data: the file's content, or the first part of it.
        name: what to call the image in messages.
        size: (height, width) that the annotations were made on.

    Returns:
        (height, width) in pixels of what `decode_image` would return.

    Raises:
        ImageError: no content, no image header, or another size than ``size``.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            stored = (image.height, image.width)
            turned = image.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8)
    except Exception as error:
        raise _damaged(name, error) from error
    upright = stored[::-1] if turned else stored
    if size is not None and tuple(size) not in (upright, stored):
        raise _wrong_size(name, upright, size)
    return upright if size is None else (size[0], size[1])


def _wrong_size(name: str, found: tuple[int, int], wanted: tuple[int, int]) -> ImageError:
    return ImageError(
        f"{name}: the image is {found[0]}x{found[1]} (height x width) but the annotations say {wanted[0]}x{wanted[1]}"
    )


def _damaged(name: str, error: Exception) -> ImageError:
    """The error for what a decoder raised; decoders raise almost anything on damaged data."""
    if isinstance(error, MemoryError):
        raise error
    if isinstance(error, UnidentifiedImageError):
        return ImageError(f"{name}: not an image, or of a format that is not known")
    reason = re.sub(r"^.*\.(cpp|h):\d+, ", "", str(error).strip().split("\n")[0])
    return ImageError(f"{name}: damaged image: {reason or type(error).__name__}")


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width as stored in a JPEG's frame header; None where it has none that can be followed."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:
            place += 1
        elif marker in _FRAME_MARKERS:
            return int.from_bytes(data[place + 5 : place + 7]), int.from_bytes(data[place + 7 : place + 9])
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return None


@functools.cache
def _jpeg_decoder() -> Callable[[Tensor, int, bool], Tensor]:
    """The JPEG decoder of torchvision.

    Its library is loaded on its own where that is possible: importing torchvision takes a second, which every data
    process would pay before its first image.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is not None and spec.origin is not None:
        for library in sorted(Path(spec.origin).parent.glob("image*.so")):
            try:
                torch.ops.load_library(str(library))
            except OSError:
                continue
            if hasattr(torch.ops.image, "decode_jpeg"):
                return torch.ops.image.decode_jpeg
    import torchvision.io  # noqa: F401  (registers the operator)

    return torch.ops.image.decode_jpeg


def _decode_jpeg(data: bytes, name: str, upright: bool) -> Tensor:
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        return _jpeg_decoder()(encoded, _RGB, upright)
    except RuntimeError as error:
        # Only what this decoder cannot do is worth a second try: on damaged data Pillow is the more lenient one.
        if "support" not in str(error):
            raise _damaged(name, error) from error
    return _decode_with_pillow(data, name, upright)


def _decode_reduced(data: bytes, name: str, size: tuple[int, int], reduced: int) -> Tensor | None:
    """A JPEG at a fraction of its size; None where it does not come out at that ``size``."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format != "JPEG" or image.mode not in ("L", "RGB"):
                return None
            image.draft(None, (image.width // reduced, image.height // reduced))
            if sorted(image.size) != sorted(size):
                return None
            image.load()
            upright = ImageOps.exif_transpose(image)
            found = [each for each in (upright, image) if (each.height, each.width) == size]
            return torch.from_numpy(_to_rgb(found[0], name)).permute(2, 0, 1) if found else None
    except Exception as error:
        raise _damaged(name, error) from error


def _decode_with_pillow(data: bytes, name: str, upright: bool) -> Tensor:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            oriented = ImageOps.exif_transpose(image) if upright else image
            pixels = _to_rgb(oriented, name)
    except ImageError:
        raise
    except Exception as error:
        raise _damaged(name, error) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    """``[H, W, 3]`` uint8 of an image of any mode."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
            raise ImageError(
                f"{name}: its pixels are {'floats' if image.mode == 'F' else '32-bit integers'}, without a defined "
                "range; convert it to 8 or 16 bits"
            )
        high_byte = (values.astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(high_byte[:, :, None], 3, axis=2)
    if image.mode in ("La", "RGBa"):  # colours multiplied by their alpha
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode == "PA" or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")  # straight to RGB is not possible, or warns
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


class ImageReader:
    """Reads the stored bytes of a data set's images, from a folder or from shards, local or remote.

    Holds locations only; files and file systems are opened where it is used, so that it can be sent to other
    processes. One reader may be used by several threads.

    Args:
        index: says where the images lie (``images_root`` or ``shards``) and what they are called.

    Attributes:
        is_remote: whether they lie beyond a network, where several reads at a time take as long as one.
    """

    def __init__(self, index: CocoIndex) -> None:
        if (index.images_root is None) == (index.shards is None):
            raise ValueError("an index has its images either in a folder or in shards")
        self._file_names = index.file_names
        # Other processes, where it may be used, have other working folders.
        self._images_root = None if index.images_root is None else resolve(index.images_root)
        self._shards = index.shards
        self._shard_files = OpenFiles(() if index.shards is None else index.shards.files)
        places = index.shards.files if index.shards is not None else (index.images_root or "",)
        self.is_remote = any(map(is_remote, places))

    def name(self, i: int) -> str:
        """What to call image ``i`` in messages: its location, or its file name and its shard."""
        file_name = self._file_names[i].as_py()
        if self._shards is not None:
            return f"{file_name} in {self._shards.files[self._shards.file_of[i]]}"
        return join(self._images_root or "", file_name)

    def read(self, i: int) -> bytes:
        """The encoded bytes of image ``i``.

        Raises:
            ImageError: no such file, not allowed to read it, or a file name that leads out of the images' folder.
            DataError: a shard is missing or ends too early, or the storage failed or refused; the image itself may be
                fine.
        """
        return self._read(i, None)

    def read_many(self, images: Sequence[int]) -> list[Callable[[], bytes]]:
        """Begins to read several images; each of the functions that it returns gives one, or raises, as `read` does.

        What is remote is read in threads, a bounded number at a time in the process; from shards, images that lie near
        each other by one request. What is local is read when it is asked for.
        """
        if not self.is_remote:
            return [functools.partial(self.read, i) for i in images]
        if self._shards is None:
            return [_reading_threads().submit(self.read, i).result for i in images]
        places, rows = self._shards, np.asarray(images, np.int64)
        offsets, lengths = places.offsets[rows], places.lengths[rows]
        reads: list[Callable[[], bytes]] = [bytes] * len(rows)
        for span in join_parts(places.file_of[rows], offsets, lengths):
            content = _reading_threads().submit(self._read_span, span, images[span.parts[0]])
            for part in span.parts:
                reads[part] = functools.partial(_cut, content, int(offsets[part]) - span.start, int(lengths[part]))
        return reads

    def read_head(self, i: int, num_bytes: int = _HEAD_BYTES) -> bytes:
        """The first bytes of image ``i``, enough for most headers; all of them where there are no more. See `read`."""
        return self._read(i, num_bytes)

    def read_size(self, i: int, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Size of image ``i`` by its header; see `read_image_size`. Reads little of the file where that is enough."""
        head = self.read_head(i)
        try:
            return read_image_size(head, self.name(i), size)
        except ImageError:
            if len(head) < _HEAD_BYTES:
                raise
        return read_image_size(self.read(i), self.name(i), size)

    def _read(self, i: int, num_bytes: int | None) -> bytes:
        if self._shards is not None:
            length = int(self._shards.lengths[i])
            wanted = length if num_bytes is None else min(num_bytes, length)
            return self._read_span(Span(int(self._shards.file_of[i]), int(self._shards.offsets[i]), wanted, (0,)), i)
        try:
            return self._read_file(i, num_bytes)
        except AccessDenied as error:  # credentials are of the storage, not of one image
            raise DataError(f"{self.name(i)}: {reason_of(error)}") from error
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
            raise ImageError(f"{self.name(i)}: {reason_of(error)}") from error
        except LocationError as error:
            raise DataError(str(error)) from error
        except OSError as error:
            raise DataError(f"{self.name(i)}: cannot be read: {reason_of(error)}") from error

    def _read_file(self, i: int, num_bytes: int | None) -> bytes:
        root, file_name = self._images_root or "", self._file_names[i].as_py()
        path = PurePosixPath(file_name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in file_name:
            raise ImageError(f"{file_name!r} in the folder {root}: a file name has to lie inside of the images' folder")

        def read_local() -> bytes:
            with Path(root, file_name).open("rb") as file:
                return file.read(-1 if num_bytes is None else num_bytes)

        def read_remote() -> bytes:
            # Not by an address of its own: a file's name may hold anything.
            file_system, folder = open_location(root)
            with file_system.open_input_file(f"{folder}/{file_name}") as file:
                return file.read(num_bytes)

        return patiently(self.name(i), read_remote if self.is_remote else read_local, remote=self.is_remote)

    def _read_span(self, span: Span, i: int) -> bytes:
        """A range of a shard that begins with, or is of, image ``i``."""
        try:
            data = self._shard_files.read(span.file, span.start, span.num_bytes)
        except FileNotFoundError as error:
            reason = f" ({reason_of(error)})" if self.is_remote else ""
            raise DataError(f"{self.name(i)}: the shard is missing{reason}") from error
        except OSError as error:
            raise DataError(f"{self.name(i)}: cannot be read: {reason_of(error)}") from error
        if len(data) < span.num_bytes:
            raise DataError(f"{self.name(i)}: the shard ends {span.num_bytes - len(data)} bytes too early")
        return data


def _cut(content: Future[bytes], start: int, num_bytes: int) -> bytes:
    return content.result()[start : start + num_bytes]


@functools.cache
def _reading_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="reading")
