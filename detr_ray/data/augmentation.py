"""The training augmentation of DETR: what is drawn for a sample, and what that does to its pixels and boxes.

One draw is: mirror or not; then either a resize of the short side to a random scale, or a resize to a small scale, a
random cut-out and a resize of the cut-out to a random scale. All of it is decided by an image's size and eight numbers
in 0..1, for any number of samples at once and without touching a pixel. Knows nothing of the order of samples or of
files.

Source of the rules: Carion et al. 2020, section A.4, and the transforms of the published code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate

from detr_ray.structures import SamplePlan

# Numbers in 0..1 that one sample takes: flip, branch, scale, crop scale, crop width, crop height, crop top, crop left.
DRAWS_PER_SAMPLE = 8
_DECIDING_SIZE = slice(1, 6)

# The cut-out branch resizes with no limit on the long side. An image so long that this side would pass the limit here
# (35 times as long as wide at the default scales) is not cut: one image would take gigabytes on its way.
LONGEST_UNCUT_PX = 21_000

_PIECE = 8192
"""Samples that are drawn at a time: all that is computed on the way then stays in the processor's cache."""


@dataclass(frozen=True, slots=True)
class AugmentValues:
    """What is drawn from.

    Attributes:
        flip: probability of mirroring left to right.
        scales: final lengths of the short side, pixels.
        max_size: most that the long side may have, pixels.
        crop: probability of the branch that cuts out.
        crop_scales: lengths of the short side before the cut, pixels.
        crop_min: least side of a cut-out where the image has as much, pixels.
        crop_max: most side of a cut-out, pixels.
        shared_draws: samples of like stored aspect that share the draws which decide their final size (branch, scales,
            sides of the cut-out), within a window of the stream. 1: each its own, as in the published code. More: each
            sample is augmented as before, but like ones together, which takes padding out of small data sets and
            levels the work of many workers.
    """

    flip: float = 0.5
    scales: tuple[int, ...] = tuple(range(480, 801, 32))
    max_size: int = 1333
    crop: float = 0.5
    crop_scales: tuple[int, ...] = (400, 500, 600)
    crop_min: int = 384
    crop_max: int = 600
    shared_draws: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """What was drawn for ``n`` samples, as columns; `SamplePlan` says what each means.

    Attributes:
        flip: ``[n]`` bool.
        resize: ``[n, 2]`` int32 (height, width); zeros where nothing is cropped.
        crop: ``[n, 4]`` int32 (top, left, height, width); zeros where nothing is cropped.
        size: ``[n, 2]`` int32 (height, width), final.
    """

    flip: np.ndarray
    resize: np.ndarray
    crop: np.ndarray
    size: np.ndarray

    def take(self, places: np.ndarray) -> Draws:
        """Those of some samples."""
        return Draws(self.flip[places], self.resize[places], self.crop[places], self.size[places])


def resized_size(size: tuple[int, int], short: int, max_size: int | None = None) -> tuple[int, int]:
    """Size of one image after its short side is brought to ``short``; see `resized_sizes`."""
    height, width = resized_sizes(np.array([size]), np.array([short]), max_size)[0].tolist()
    return height, width


def resized_sizes(sizes: np.ndarray, short: np.ndarray, max_size: int | None = None) -> np.ndarray:
    """Sizes of images after their short side is brought to ``short``, rounded as the published code does it.

    Args:
        sizes: ``[n, 2]`` (height, width) in pixels.
        short: ``[n]`` or one number, pixels.
        max_size: where the long side would pass it, the short side is made smaller instead (rounded, half to even);
            the long side, cut off to whole pixels, may then differ from it by rounding.

    Returns:
        ``[n, 2]`` int32 (height, width), at least 1 pixel.
    """
    # Column by column: reducing rows of two takes several times as long.
    heights, widths = np.ascontiguousarray(sizes.T, dtype=np.int64)
    shortest, longest = np.minimum(heights, widths), np.maximum(heights, widths)
    short = np.broadcast_to(np.asarray(short, dtype=np.int64), shortest.shape)
    if max_size is not None:
        too_long = longest / shortest * short > max_size
        short = np.where(too_long, np.rint(max_size * shortest / longest).astype(np.int64).clip(min=1), short)
    long = np.where(shortest == short, longest, (short * longest / shortest).astype(np.int64))
    is_wide = widths >= heights
    resized = np.empty((len(heights), 2), np.int32)
    resized[:, 0] = np.where(is_wide, short, long)
    resized[:, 1] = np.where(is_wide, long, short)
    return resized


def largest_side(sizes: np.ndarray, values: AugmentValues) -> int:
    """Length in pixels that no side of an augmented image exceeds, whatever is drawn.

    Args:
        sizes: ``[n, 2]`` (height, width) of the stored images in pixels, at least one.
        values: what is drawn from.
    """
    longest = max(int(resized_sizes(sizes, np.array(short), values.max_size).max()) for short in values.scales)
    if not values.crop:
        return longest
    for short in values.crop_scales:
        sides = resized_sizes(sizes, np.array(short)).astype(np.int64)
        least, most = np.minimum(values.crop_min, sides), np.minimum(values.crop_max, sides)
        # The most oblong cut-out: as long as can be along one side, as short as can be along the other.
        ratio = float(max((most[:, 0] / least[:, 1]).max(), (most[:, 1] / least[:, 0]).max(), 1))
        for scale in values.scales:
            long = int(scale * ratio)
            longest = max(longest, long if long <= values.max_size else values.max_size + int(ratio / 2), scale)
    return longest


def draw(sizes: np.ndarray, uniform: np.ndarray, values: AugmentValues) -> Draws:
    """Turns random numbers into what happens to each sample.

    Args:
        sizes: ``[n, 2]`` (height, width) of the stored images in pixels.
        uniform: ``[n, DRAWS_PER_SAMPLE]`` in [0, 1).
        values: what to draw from.
    """
    pieces = [
        _draw_piece(sizes[start : start + _PIECE], uniform[start : start + _PIECE], values)
        for start in range(0, max(len(sizes), 1), _PIECE)
    ]
    if len(pieces) == 1:
        return pieces[0]
    return Draws(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in Draws.__slots__))


def _draw_piece(sizes: np.ndarray, uniform: np.ndarray, values: AugmentValues) -> Draws:
    u_flip, u_crop, u_scale, u_crop_scale, u_width, u_height, u_top, u_left = np.ascontiguousarray(uniform.T)
    resize = resized_sizes(sizes, _choice(values.crop_scales, u_crop_scale))
    is_cropped = (u_crop < values.crop) & (np.maximum(resize[:, 0], resize[:, 1]) <= LONGEST_UNCUT_PX)
    crop_height = _between(values.crop_min, resize[:, 0], values.crop_max, u_height)
    crop_width = _between(values.crop_min, resize[:, 1], values.crop_max, u_width)
    top = _below(resize[:, 0] - crop_height + 1, u_top)
    left = _below(resize[:, 1] - crop_width + 1, u_left)
    crop = np.stack([top, left, crop_height, crop_width], axis=1) * is_cropped[:, None]
    before = np.where(is_cropped[:, None], crop[:, 2:], sizes)
    return Draws(
        flip=u_flip < values.flip,
        resize=resize * is_cropped[:, None],
        crop=crop.astype(np.int32),
        size=resized_sizes(before, _choice(values.scales, u_scale), values.max_size),
    )


def share_draws(uniform: np.ndarray, sizes: np.ndarray, count: int) -> np.ndarray:
    """Lets samples of like aspect have the same random numbers where these decide the final size.

    Which numbers a sample gets does not depend on its own shape: each one's augmentation is distributed as without
    sharing, only no longer independently of the others'.

    Args:
        uniform: ``[n, DRAWS_PER_SAMPLE]``.
        sizes: ``[n, 2]`` (height, width) of the stored images.
        count: samples that share, 1 for none.

    Returns:
        The numbers for `draw`, ``[n, DRAWS_PER_SAMPLE]``.
    """
    if count == 1:
        return uniform
    by_aspect = np.argsort(sizes[:, 0] / sizes[:, 1], kind="stable")
    givers = by_aspect[np.arange(len(sizes)) // count * count]
    shared = uniform.copy()
    shared[by_aspect, _DECIDING_SIZE] = uniform[givers, _DECIDING_SIZE]
    return shared


def _below(counts: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Whole numbers 0..counts-1."""
    return np.minimum((uniform * counts).astype(np.int64), counts - 1)


def _choice(values: tuple[int, ...], uniform: np.ndarray) -> np.ndarray:
    return np.array(values, dtype=np.int64)[_below(np.array(len(values)), uniform)]


def _between(least: int, side: np.ndarray, most: int, uniform: np.ndarray) -> np.ndarray:
    """Whole numbers least..most, both included, and neither above the side that they are cut out of."""
    low, high = np.minimum(least, side), np.minimum(side, most)
    return low + _below(high - low + 1, uniform)


def apply_to_image(image: Tensor, plan: SamplePlan) -> Tensor:
    """Does to the pixels what the plan says.

    Args:
        image: ``[3, H, W]`` uint8, of the stored size; not changed. Fastest where its memory is ordered as HWC, which
            is how JPEG decoding leaves it.
        plan: flip, resize, crop and size are followed.

    Returns:
        ``[3, *plan.size]`` uint8, its memory ordered as HWC.
    """
    pixels = image.permute(1, 2, 0)
    if plan.flip:
        pixels = pixels.flip(1)
    if plan.resize is not None:
        pixels = _resize(pixels, plan.resize)
    if plan.crop is not None:
        top, left, height, width = plan.crop
        pixels = pixels[top : top + height, left : left + width]
    return _resize(pixels, plan.size).permute(2, 0, 1)


def _resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with antialiasing, in whole numbers: ``[H, W, 3]`` uint8 to ``[*size, 3]``.

    Called on bytes in HWC order this is what `torchvision.transforms.v2.functional.resize` does to such images, to the
    last bit, without the seconds that importing it takes.
    """
    if pixels.shape[:2] == size:
        return pixels
    batch = pixels.contiguous().unsqueeze(0).permute(0, 3, 1, 2)
    resized = interpolate(batch, size=size, mode="bilinear", align_corners=False, antialias=True)
    return resized.permute(0, 2, 3, 1).squeeze(0)


def apply_to_boxes(
    boxes_xyxy_px: np.ndarray, areas: np.ndarray, labels: np.ndarray, orig_size: tuple[int, int], plan: SamplePlan
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Does to the boxes what the plan says.

    Args:
        boxes_xyxy_px: ``[n, 4]`` float32 in pixels of the stored image, inside of it; not changed.
        areas: ``[n]`` float32, square pixels.
        labels: ``[n]`` int64.
        orig_size: (height, width) of the stored image in pixels.
        plan: flip, resize, crop and size are followed.

    Returns:
        labels ``[m]`` int64; boxes_cxcywh ``[m, 4]`` float32 in 0..1 of the final image; areas ``[m]`` float32 in
        square pixels of the final image. Boxes of which the crop leaves nothing are gone; the others' areas are those
        of the clipped boxes from there on.
    """
    boxes = boxes_xyxy_px.astype(np.float32)
    areas = areas.astype(np.float32)
    size = orig_size
    if plan.flip:
        boxes = boxes[:, [2, 1, 0, 3]] * np.array([-1, 1, -1, 1], np.float32) + _corners((0, size[1]))
    if plan.resize is not None:
        boxes, areas = _scale(boxes, areas, size, plan.resize)
        size = plan.resize
    if plan.crop is not None:
        top, left, *cut = plan.crop
        size = (cut[0], cut[1])
        boxes = (boxes - _corners((top, left))).clip(0, _corners(size))
        sides = boxes[:, 2:] - boxes[:, :2]
        keep = (sides > 0).all(axis=1)
        boxes, areas, labels = boxes[keep], sides[keep].prod(axis=1), labels[keep]
    boxes, areas = _scale(boxes, areas, size, plan.size)
    left_top, right_bottom = boxes[:, :2], boxes[:, 2:]
    boxes_cxcywh = np.concatenate([(left_top + right_bottom) / 2, right_bottom - left_top], axis=1)
    return labels, boxes_cxcywh / _corners(plan.size), areas


def _corners(size: tuple[int, int]) -> np.ndarray:
    """(vertical, horizontal) as an addend or divisor of boxes: [x, y, x, y]."""
    return np.array([size[1], size[0], size[1], size[0]], dtype=np.float32)


def _scale(
    boxes: np.ndarray, areas: np.ndarray, size: tuple[int, int], new_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    ratio_height, ratio_width = new_size[0] / size[0], new_size[1] / size[1]
    ratios = np.array([ratio_width, ratio_height, ratio_width, ratio_height], dtype=np.float32)
    return boxes * ratios, areas * np.float32(ratio_width * ratio_height)
