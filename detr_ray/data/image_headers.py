"""What the header of an image file says, before a pixel is decoded: format, pixel type, size, orientation.

Decoding begins by reading the header in the same way: what is refused here is refused there, with the same message.
Some images can only be refused when they are decoded (`ImageHeader.is_certain` is False).
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError

from detr_ray.data.errors import DataError

MOST_PIXELS = 178_956_970
"""Images above this are refused, whatever their format: 13,377 pixels squared, 0.5 GB as RGB. It is what Pillow refuses
by itself (twice its ``MAX_IMAGE_PIXELS``), which other decoders don't."""

JPEG_START = b"\xff\xd8\xff"
_ORIENTATION = 0x0112
_COMPRESSION, _JPEG_COMPRESSION, _PHOTOMETRIC, _WHITE_IS_ZERO, _MAX_SAMPLE_VALUE = 259, 7, 262, 0, 281
# JPEG markers of a frame header, which holds the size: all of C0..CF but the tables (C4, CC) and the reserved C8.
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Padding and markers without a length.
_BARE_MARKERS = frozenset({0x00, 0x01, *range(0xD0, 0xDA), 0xFF}) - {0xD9}
# Baseline, extended and progressive, Huffman or arithmetic coding. The others are lossless or hierarchical.
_READ_MARKERS = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})
_HEIC_STARTS = frozenset({b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1"})
_PNG_METADATA = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"})


class ImageError(DataError):
    """One image that cannot be used; the message names the file and the reason."""


class WrongSizeError(ImageError):
    """An image of another size than the annotations say.

    Args:
        name: what to call the image.
        found: (height, width) of the image.
        wanted: (height, width) of the annotations.
    """

    def __init__(self, name: str, found: tuple[int, int], wanted: tuple[int, int]) -> None:
        super().__init__(
            f"{name}: the image is {found[0]}x{found[1]} (height x width) but the annotations say "
            f"{wanted[0]}x{wanted[1]}"
        )
        self.found = (int(found[0]), int(found[1]))
        self.wanted = (int(wanted[0]), int(wanted[1]))


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image's header says.

    Attributes:
        format: file format as Pillow names it.
        mode: pixel type as Pillow names it.
        stored: (height, width) in pixels as stored.
        orientation: EXIF orientation, 1 (upright) to 8.
        has_unreadable_exif: whether there is EXIF that can't be read; the image then counts as upright.
        is_certain: whether the header is enough to accept the image, unless the data after it is damaged.
        num_bytes: least length of the whole file; 0 where the header does not say.
    """

    format: str
    mode: str
    stored: tuple[int, int]
    orientation: int = 1
    has_unreadable_exif: bool = False
    is_certain: bool = True
    num_bytes: int = 0

    @property
    def upright(self) -> tuple[int, int]:
        """(height, width) in pixels after turning."""
        return self.stored[::-1] if self.orientation >= 5 else self.stored

    def turn(self, name: str, size: tuple[int, int] | None) -> bool:
        """Whether to turn the image upright, so that it has the size that its annotations were made on.

        Args:
            name: what to call the image.
            size: (height, width) of the annotations; None for none.

        Raises:
            WrongSizeError: it has another size either way.
        """
        if size is None or tuple(size) == self.upright:
            return True
        if tuple(size) == self.stored:
            return False
        raise WrongSizeError(name, self.upright, size)


def read_header(data: bytes, name: str, *, is_whole: bool = True) -> ImageHeader:
    """Reads an image's header.

    Args:
        data: the file's content, or the first part of it.
        name: what to call the image in messages.
        is_whole: whether ``data`` is all of the file.

    Raises:
        ImageError: no content, not an image, too large, or of a pixel type without a defined range.
    """
    refuse_early(data, name)
    try:
        with quiet_pillow(), Image.open(io.BytesIO(data)) as image:
            return describe(image, data, name, is_whole=is_whole)
    except Exception as error:
        frame = jpeg_frame(data) if data.startswith(JPEG_START) else None
        if frame is None or isinstance(error, ImageError | MemoryError):
            raise damaged(name, error, data) from error
        # JPEGs are decoded by torchvision, which takes some that Pillow does not.
        return ImageHeader("JPEG", "unknown", frame.size, is_certain=False)


def refuse_early(data: bytes, name: str) -> None:
    """Refuses images by their first bytes, before a decoder is chosen.

    Raises:
        ImageError: no content, or a JPEG that is too large or of a kind that is not read.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty")
    frame = jpeg_frame(data) if data.startswith(JPEG_START) else None
    if frame is None:
        return
    if frame.marker not in _READ_MARKERS or frame.bits != 8:
        kind = "lossless or hierarchical" if frame.bits == 8 else f"of {frame.bits} bits"
        raise ImageError(f"{name}: a JPEG that is {kind}, which is not read; convert it to a usual one")
    refuse_too_large(name, frame.size)


def refuse_too_large(name: str, size: tuple[int, int]) -> None:
    """Refuses an image with more pixels than are read.

    Raises:
        ImageError: the image has more.
    """
    if size[0] * size[1] > MOST_PIXELS:
        raise _too_large(name, f"{size[0]}x{size[1]} (height x width) are ")


def describe(image: Image.Image, data: bytes, name: str, *, is_whole: bool = True) -> ImageHeader:
    """The header of an image that Pillow has opened but not decoded.

    Raises:
        ImageError: too large, or a pixel type without a defined range.
    """
    refuse_too_large(name, (image.height, image.width))
    file_format = image.format or "unknown"
    if image.mode == "F":
        raise _without_range(name, "floats")
    if image.mode == "I" and file_format not in ("PPM", "PNG"):  # these two are scaled to 16 bits, all others are not
        raise _without_range(name, "signed or 32-bit integers")
    orientation, unreadable, is_early = _orientation(image, data, is_whole)
    stored = (image.height, image.width)
    return ImageHeader(
        format=file_format,
        mode=image.mode,
        # A TIFF has the size that it will have once it is turned, which Pillow does while it decodes.
        stored=stored[::-1] if file_format == "TIFF" and orientation >= 5 else stored,
        orientation=orientation,
        has_unreadable_exif=unreadable,
        is_certain=is_early
        and (is_whole or file_format != "TIFF")  # its tags may stand anywhere
        and not has_16_bit_channels(image)
        and image.mode[0] != "I",
        num_bytes=_least_bytes(image, data),
    )


def significant_bits(image: Image.Image) -> int:
    """Number of bits that the pixels of a 16-bit image use, as stated in its file; 16 if it is not stated."""
    if _raw_mode(image) == "I;12":
        return 12
    tags: Any = getattr(image, "tag_v2", {})
    most = tags.get(_MAX_SAMPLE_VALUE)
    most = most[0] if isinstance(most, tuple) and most else most
    if isinstance(most, int) and 0xFF < most < 0xFFFF and (most + 1).bit_count() == 1:
        return most.bit_length()
    return 16


def is_white_zero(image: Image.Image) -> bool:
    """Whether 0 means white; Pillow turns 8-bit pixels of this kind over, and leaves 16-bit ones as they are."""
    tags: Any = getattr(image, "tag_v2", {})
    return bool(tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO)


def has_16_bit_channels(image: Image.Image) -> bool:
    """Whether the file has 16 bits a channel, of which Pillow leaves the upper eight in colour images."""
    raw_mode = _raw_mode(image)
    return ";16" in raw_mode and not raw_mode.startswith("BGR")  # which are 16 bits a pixel


def _raw_mode(image: Image.Image) -> str:
    """How the pixels lie in the file, as Pillow names it; empty where its decoder says nothing of it."""
    tiles: Any = getattr(image, "tile", None)
    if not tiles:
        return ""
    args = tiles[0][3]
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _orientation(image: Image.Image, data: bytes, is_whole: bool) -> tuple[int, bool, bool]:
    """EXIF orientation, whether it can't be read, and whether it is known before the pixels are decoded."""
    # Pillow would decode a PNG to look for what stands behind the pixels.
    if image.format == "PNG" and "exif" not in image.info and (not is_whole or _has_late_metadata(data)):
        return 1, False, False
    # Of a PNG without early EXIF the method of all images, for the reason above.
    found = _read_orientation(lambda: Image.Image.getexif(image) if image.format == "PNG" else image.getexif())
    return found or 1, found is None, True


def late_orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image that is decoded, wherever in its file it stood."""
    return _read_orientation(image.getexif) or 1


def _read_orientation(read_exif: Callable[[], Image.Exif]) -> int | None:
    """The orientation in the EXIF data; 1 if it is missing or not valid; None if EXIF can't be read."""
    try:
        found = read_exif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises almost anything on EXIF that is damaged
        return None
    return found if isinstance(found, int) and found in range(1, 9) else 1


def _has_late_metadata(data: bytes) -> bool:
    """Whether a PNG has chunks behind its pixels that may hold EXIF."""
    place, has_pixels = 8, False
    while place + 8 <= len(data):
        kind = data[place + 4 : place + 8]
        has_pixels |= kind == b"IDAT"
        if has_pixels and kind in _PNG_METADATA:
            return True
        place += 12 + int.from_bytes(data[place : place + 4])
    return False


def _least_bytes(image: Image.Image, data: bytes) -> int:
    if image.format == "WEBP":
        return 8 + int.from_bytes(data[4:8], "little")
    if image.format == "BMP":
        return int.from_bytes(data[2:6], "little")
    if image.format == "TIFF":
        tags: Any = getattr(image, "tag_v2", {})
        for starts, lengths in ((273, 279), (324, 325)):  # strips, tiles
            if tags.get(_COMPRESSION) == _JPEG_COMPRESSION:  # whose tables may stand behind them
                break
            parts = tags.get(starts), tags.get(lengths)
            if all(isinstance(part, tuple) and part for part in parts):
                return max(map(sum, zip(*parts, strict=False)))
    return 0


@dataclass(frozen=True, slots=True)
class JpegFrame:
    """A JPEG's frame header: its marker, bits a channel, and (height, width) in pixels."""

    marker: int
    bits: int
    size: tuple[int, int]


def jpeg_frame(data: bytes) -> JpegFrame | None:
    """The frame header of a JPEG; None where it has none that can be followed."""
    place = data.find(0xFF, 2)  # decoders skip bytes that are no marker
    while place >= 0 and place + 9 <= len(data):
        marker = data[place + 1]
        if marker in _FRAME_MARKERS:
            height, width = int.from_bytes(data[place + 5 : place + 7]), int.from_bytes(data[place + 7 : place + 9])
            return JpegFrame(marker, data[place + 4], (height, width))
        if marker in _BARE_MARKERS:
            place += 1
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4])
        place = data.find(0xFF, place)
    return None


def damaged(name: str, error: Exception, data: bytes = b"") -> ImageError:
    """The `ImageError` for an exception of a decoder; decoders raise almost any exception for damaged data.

    Args:
        name: what to call the image.
        error: the exception.
        data: the file's content, or its beginning, where that is at hand.
    """
    if isinstance(error, MemoryError):
        raise error
    if isinstance(error, ImageError):
        return error
    if isinstance(error, Image.DecompressionBombError):
        return _too_large(name)
    if isinstance(error, UnidentifiedImageError):
        what_to_do = "; HEIC is not read: convert it to JPEG" if data[4:12] in _HEIC_STARTS else ""
        return ImageError(f"{name}: not an image, or of a format that is not known{what_to_do}")
    reason = re.sub(r"^.*\.(cpp|h):\d+, ", "", str(error).strip().split("\n")[0])
    return ImageError(f"{name}: damaged image: {reason or type(error).__name__}")


def _too_large(name: str, found: str = "") -> ImageError:
    return ImageError(
        f"{name}: too large: {found}more than the {MOST_PIXELS:,} pixels that are read; cut it into smaller images"
    )


def _without_range(name: str, pixels: str) -> ImageError:
    return ImageError(f"{name}: its pixels are {pixels}, without a defined range; convert it to 8 or 16 bits")


# Pillow's warnings


class _PillowFilter:
    """One entry in Python's list of warning filters, there while any thread is inside of Pillow.

    `warnings.catch_warnings` would leave the list changed when several threads use it, and `filterwarnings` would have
    other warnings shown a second time.
    """

    def __init__(self) -> None:
        self._entry: Any = ("ignore", None, Warning, re.compile(r"PIL\b"), 0)
        self._lock = threading.Lock()
        self._users = 0

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._entry not in warnings.filters:
                warnings.filters.insert(0, self._entry)  # type: ignore[attr-defined]

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._entry in warnings.filters:
                warnings.filters.remove(self._entry)  # type: ignore[attr-defined]


_FILTER = _PillowFilter()


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Hides Pillow's warnings: they name no image, and all that they warn of is refused, handled or harmless here."""
    with _FILTER:
        yield
