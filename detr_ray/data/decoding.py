"""From the bytes of an image file to RGB pixels.

Every readable image becomes ``uint8 [3, H, W]`` RGB, whatever its file format and mode. An unreadable one raises an
`ImageError` that names the file and the reason. (If data is damaged in the middle of a JPEG, and its end is valid, the
JPEG library fills the lost pixels without an error.) The EXIF orientation is applied, and EXIF that can't be read is
ignored. An alpha channel is dropped, as ``convert("RGB")`` of Pillow does. 16-bit images keep the high byte, unless
they say that they use fewer bits; they are refused where they would be nearly black. Of animations the first frame is
taken. Knows nothing of boxes, augmentation or batches.
"""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_ray.data.image_headers import (
    JPEG_START,
    ImageError,
    ImageHeader,
    WrongSizeError,
    damaged,
    describe,
    has_16_bit_channels,
    is_white_zero,
    jpeg_frame,
    late_orientation,
    quiet_pillow,
    read_header,
    refuse_early,
    refuse_too_large,
    significant_bits,
)


def reduction(stored: tuple[int, int], wanted: tuple[int, int], margin: float) -> int:
    """The factor (1, 2, 4 or 8) by which an image may be made smaller while it is decoded.

    Args:
        stored: (height, width) in pixels. The factor divides both.
        wanted: (height, width) that the image is resized to next.
        margin: the reduced image has at least this many times as many pixels along each side as are wanted.
    """
    fitting = (
        k for k in (8, 4, 2) if all(a % k == 0 and a >= k * margin * b for a, b in zip(stored, wanted, strict=True))
    )
    return next(fitting, 1)


def decode_image(data: bytes, name: str, size: tuple[int, int] | None = None, reduced: int = 1) -> Tensor:
    """Decodes an image file of any format that torchvision or Pillow know.

    JPEGs are decoded by torchvision (which reports truncated data). Other formats, and kinds of JPEG that it does not
    know, are decoded by Pillow.

    Args:
        data: the file's content.
        name: what to call the image in messages.
        size: (height, width) in pixels that the annotations were made on. Some annotation tools ignore the EXIF
            orientation: where only the image as stored has this size, it is left as stored.
        reduced: 2, 4 or 8: decode a JPEG at ``size`` divided by this number, which must divide both sides. The decoder
            then skips the finest frequencies instead of computing pixels that are averaged afterwards. Other formats,
            and JPEGs that the decoder cannot reduce, have their full size.

    Returns:
        ``[3, H, W]`` uint8 RGB; not contiguous (the channels of a pixel lie together, as decoders leave them).

    Raises:
        ImageError: no content, not an image, damaged, truncated, a pixel type without a defined range, or another size
            than ``size``.
    """
    refuse_early(data, name)
    if not data.startswith(JPEG_START):
        return _decode_with_pillow(data, name, size)
    header = _jpeg_header(data, name)
    is_upright = header.turn(name, size)  # before decoding: an image with a damaged header may take gigabytes
    pixels = _decode_reduced(data, name, header, reduced) if size is not None and reduced > 1 else None
    if pixels is None:
        pixels = _decode_jpeg(data, name)
    if pixels is None:
        return _decode_with_pillow(data, name, size)
    return (_turned(pixels, header.orientation) if is_upright else pixels).permute(2, 0, 1)


def _jpeg_header(data: bytes, name: str) -> ImageHeader:
    """The header of a JPEG. Pillow is used only for what nothing else reads, which is rare."""
    frame = jpeg_frame(data)
    if frame is None or b"Exif\0\0" in data or b"http://ns.adobe.com/xap/" in data:
        return read_header(data, name)
    return ImageHeader("JPEG", "", frame.size)


def _decode_jpeg(data: bytes, name: str) -> Tensor | None:
    """The pixels as stored, ``[H, W, 3]``; None for a JPEG of a kind that this decoder does not know."""
    from torchvision.io import ImageReadMode  # takes a second; other formats do not need it

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        # torchvision.io.decode_jpeg is this operator, and warns at each call that it will move to another package.
        return torch.ops.image.decode_jpeg(encoded, ImageReadMode.RGB.value, False).permute(1, 2, 0)
    except RuntimeError as error:
        # Pillow is tried only for kinds of JPEG that this decoder does not know: Pillow also accepts damaged ones.
        if "support" not in str(error):
            raise damaged(name, error) from error
    return None


def _decode_reduced(data: bytes, name: str, header: ImageHeader, reduced: int) -> Tensor | None:
    """The pixels as stored, at a fraction of their size; None if the decoder gives another size."""
    wanted = (header.stored[0] // reduced, header.stored[1] // reduced)
    try:
        with quiet_pillow(), Image.open(io.BytesIO(data)) as image:
            if image.format != "JPEG" or image.mode not in ("L", "RGB"):
                return None
            image.draft(None, (image.width // reduced, image.height // reduced))
            if (image.height, image.width) != wanted:
                return None
            image.load()
            return torch.from_numpy(_to_rgb(image, name))
    except Exception as error:
        raise damaged(name, error) from error


def _decode_with_pillow(data: bytes, name: str, size: tuple[int, int] | None) -> Tensor:
    """An image of any format that Pillow knows, ``[3, H, W]``; upright where ``size`` does not say otherwise."""
    try:
        with quiet_pillow(), Image.open(io.BytesIO(data)) as image:
            return _decode_opened(image, data, name, size)
    except Exception as error:
        raise damaged(name, error) from error


def decode_opened(image: Image.Image, name: str) -> Tensor:
    """The pixels of an image that Pillow has opened, or made in memory; upright by its EXIF.

    Args:
        image: of any mode that `decode_image` takes from files; it is not changed, but its pixels may be loaded.
        name: what to call it in messages.

    Returns:
        ``[3, H, W]`` uint8 RGB.

    Raises:
        ImageError: damaged, closed, too large, or a pixel type without a defined range.
    """
    try:
        with quiet_pillow():
            return _decode_opened(image, b"", name, None)
    except Exception as error:
        raise damaged(name, error) from error


def _decode_opened(image: Image.Image, data: bytes, name: str, size: tuple[int, int] | None) -> Tensor:
    header = describe(image, data, name)
    if size is not None and sorted(size) != sorted(header.stored):
        raise WrongSizeError(name, header.upright, size)  # before decoding: see above
    pixels = torch.from_numpy(_to_rgb(image, name))
    if not header.is_certain and header.orientation == 1:
        header = replace(header, orientation=late_orientation(image))
    is_upright, comes_upright = header.turn(name, size), header.format == "TIFF"
    if is_upright and not comes_upright:
        pixels = _turned(pixels, header.orientation)
    elif comes_upright and not is_upright:
        pixels = _turned(pixels, _OPPOSITE.get(header.orientation, header.orientation))
    return pixels.permute(2, 0, 1)


_OPPOSITE = {6: 8, 8: 6}
"""EXIF orientations that undo each other; all others undo themselves."""


def _turned(pixels: Tensor, orientation: int) -> Tensor:
    """An image as stored, ``[H, W, 3]``, turned as its EXIF orientation says."""
    if orientation >= 5:
        pixels = pixels.transpose(0, 1)
    mirrored = {2: [1], 3: [0, 1], 4: [0], 6: [1], 7: [0, 1], 8: [0]}.get(orientation)
    return pixels if mirrored is None else pixels.flip(mirrored)


_DARK = 0x0FFF
"""A 16-bit image none of whose pixels is above this has 12 bits or fewer in its lower bits, or shows nearly nothing."""


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    """``[H, W, 3]`` uint8 of an image of any mode."""
    is_deep, bits = has_16_bit_channels(image), significant_bits(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int32)
        if is_white_zero(image):
            values = (1 << bits) - 1 - values
        most = int(values.max())
        if bits == 16 and 0 < most <= _DARK:
            raise _nearly_black(name, most)
        grey = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("La", "RGBa"):  # colours multiplied by their alpha
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode == "PA" or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")  # straight to RGB is not possible, or warns
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    if is_deep and pixels.max() <= _DARK >> 8:
        raise _nearly_black(name, _DARK)
    return pixels


def decode_array(values: np.ndarray, name: str) -> Tensor:
    """The pixels of an array as `decode_image` gives those of a file.

    Args:
        values: ``[H, W]``, or ``[H, W, C]`` with one channel (grey), two (grey, alpha), three (RGB) or four (RGB,
            alpha): uint8; uint16, whose high byte is taken; or floats in 0..1.
        name: what to call it in messages.

    Returns:
        ``[3, H, W]`` uint8 RGB.

    Raises:
        ImageError: another shape or type, or values out of range.
    """
    if values.ndim not in (2, 3) or not values.size or (values.ndim == 3 and values.shape[2] > 4):
        raise ImageError(
            f"{name}: has the shape {list(values.shape)}; an array is [height, width] or [height, width, channels] "
            "with 1 to 4 channels, a tensor [channels, height, width]"
        )
    refuse_too_large(name, (values.shape[0], values.shape[1]))
    if values.dtype.kind == "f":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ImageError(f"{name}: its floats are not all in 0..1; divide by 255, or give uint8")
        values = (values.astype(np.float32) * 255).round().astype(np.uint8)
    elif values.dtype == np.uint16:
        if 0 < (most := int(values.max())) <= _DARK:
            raise _nearly_black(name, most)
        values = (values >> 8).astype(np.uint8)
    elif values.dtype != np.uint8:
        raise ImageError(f"{name}: its pixels are {values.dtype}; give uint8, uint16, or floats in 0..1")
    channels = values.reshape(*values.shape[:2], -1)
    rgb = channels[:, :, :3] if channels.shape[2] > 2 else np.repeat(channels[:, :, :1], 3, axis=2)
    return torch.from_numpy(rgb.copy()).permute(2, 0, 1)


def _nearly_black(name: str, most: int) -> ImageError:
    return ImageError(
        f"{name}: its 16-bit pixels reach {most} at most, of 65535, and would be nearly black: 12 bits or fewer in 16? "
        "Scale them to 16 bits (12 bits: times 16), or write 8 bits"
    )
