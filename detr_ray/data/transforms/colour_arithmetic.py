"""Brightness, contrast, saturation and hue of an image, as torchvision's v2 functionals define them for float images.

Theirs take five times as long (on bytes; on Pillow's images twice). Here brightness and contrast are a table of levels,
and saturation and hue are computed together, in blocks that stay in the processor's cache. The result differs from
theirs by rounding alone.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_GREY = (0.2989, 0.587, 0.114)
"""Shares of red, green and blue in the brightness of a pixel, as in torchvision."""
_BLOCK = 1 << 14
"""Pixels of a block: twelve planes of floats fit into most second-level caches."""


def change_colours(pixels: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """Changes colours, in this order.

    Args:
        pixels: ``[H, W, 3]`` uint8 RGB.
        brightness: factor.
        contrast: factor of the difference to the image's mean brightness.
        saturation: factor of the difference to the pixel's brightness.
        hue: added to the hue, in turns of the colour wheel, -0.5..0.5.

    Returns:
        A new array of the same shape.
    """
    if brightness != 1 or contrast != 1:
        pixels = _change_levels(pixels, brightness, contrast)
    if saturation == 1 and hue == 0:
        return pixels
    flat = np.ascontiguousarray(pixels).reshape(-1, 3)
    changed = np.empty_like(flat)
    buffers = np.empty((10, min(_BLOCK, len(flat))), np.float32)
    for start in range(0, len(flat), _BLOCK):
        part = flat[start : start + _BLOCK]
        colours, free = buffers[:3, : len(part)], buffers[3:, : len(part)]
        np.copyto(colours, part.T)
        if saturation != 1:
            _saturate(colours, saturation, free)
        if hue != 0:
            _turn(colours, 6 * hue, free)
        np.rint(colours, out=colours)
        np.copyto(changed[start : start + _BLOCK].T, colours, casting="unsafe")
    return changed.reshape(pixels.shape)


def _change_levels(pixels: np.ndarray, brightness: float, contrast: float) -> np.ndarray:
    """Brightness and contrast: each level of a channel becomes another one."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    levels = np.minimum(np.arange(256) * brightness, 255)
    counts = np.array(image.histogram(), np.float64).reshape(3, 256)
    mean = float(np.array(_GREY) @ (counts @ levels)) / (image.width * image.height)
    table = np.rint((levels * contrast + (1 - contrast) * mean).clip(0, 255)).astype(np.uint8)
    # The fastest way through a table of bytes: numpy turns each into an index of eight first.
    changed = bytearray(image.tobytes()).translate(table.tobytes())
    return np.frombuffer(changed, np.uint8).reshape(pixels.shape)


def _saturate(colours: np.ndarray, factor: float, free: np.ndarray) -> None:
    grey, scratch = free[0], free[1]
    np.multiply(colours[0], _GREY[0] * (1 - factor), out=grey)
    for share, plane in zip(_GREY[1:], colours[1:], strict=True):
        np.add(grey, np.multiply(plane, share * (1 - factor), out=scratch), out=grey)
    np.add(np.multiply(colours, factor, out=colours), grey, out=colours)
    np.maximum(np.minimum(colours, 255, out=colours), 0, out=colours)


def _turn(colours: np.ndarray, sixths: float, free: np.ndarray) -> None:
    """Adds to the hues, in sixths of the colour wheel.

    A channel is at its most where the hue is within one sixth of its own (0, 2 and 4), at its least where it is more
    than two sixths away, and linear between.
    """
    (red, green, blue), (least, chroma, hue, scratch, mask) = colours, free[:5]
    most = free[5]
    np.maximum(np.maximum(red, green, out=most), blue, out=most)
    np.minimum(np.minimum(red, green, out=least), blue, out=least)
    np.subtract(most, least, out=chroma)

    # Where red is the most: (green - blue) / chroma. Two channels that are equally high give the same hue.
    np.subtract(green, blue, out=hue)
    for first, second, channel, own_hue in ((blue, red, green, 2), (red, green, blue, 4)):
        np.equal(channel, most, out=mask)
        np.subtract(first, second, out=scratch)
        np.add(scratch, np.multiply(chroma, own_hue, out=free[6]), out=scratch)
        np.subtract(scratch, hue, out=scratch)
        np.multiply(scratch, mask, out=scratch)
        np.add(hue, scratch, out=hue)
    np.maximum(chroma, 1e-6, out=scratch)
    np.divide(hue, scratch, out=hue)

    np.add(hue, sixths, out=hue)
    np.floor(np.multiply(hue, 1 / 6, out=scratch), out=scratch)
    np.subtract(hue, np.multiply(scratch, 6, out=scratch), out=hue)

    for plane, own_hue in ((red, 3), (green, 2), (blue, 4)):
        np.abs(np.subtract(hue, own_hue, out=plane), out=plane)
        # Red's distance is taken from the opposite hue, because its own is at both ends.
        if own_hue == 3:
            np.subtract(plane, 1, out=plane)
        else:
            np.subtract(2, plane, out=plane)
        np.minimum(plane, 1, out=plane)
        np.maximum(plane, 0, out=plane)
        np.add(np.multiply(plane, chroma, out=plane), least, out=plane)
