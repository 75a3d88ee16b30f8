"""Compares an exported model with the original: the inputs that are tried, and the comparison of results.

If additions are done in another order, results differ in the last digits. Where queries are chosen by score, or only
the best detections are kept, their order may differ, too. So results are compared as sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from detr_ray.data.sample import Instances, Picture, resized_sizes
from detr_ray.exporting.errors import ExportError
from detr_ray.exporting.source import ExportSource
from detr_ray.structures import PaddedBatch, padding_mask, to_device

TOLERANCE = 1e-3
"""Largest allowed difference of a probability, or of a box coordinate in 0..1."""
PIXEL_TOLERANCE = 1
"""Largest allowed difference of a resized pixel in 0..255: runtimes may round single pixels differently."""
BATCH_SIZES = (1, 3)
_SHORT_SIDE = 256

RunBatch = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""``(images [B, 3, H, W] float32, mask [B, H, W] bool) -> (logits [B, Q, C], boxes_cxcywh [B, Q, 4])``."""

RunImage = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""``image [H, W, 3] uint8 -> (boxes_xyxy_px [K, 4], scores [K], labels [K])``."""

Resize = Callable[[np.ndarray], np.ndarray]
"""``image [H, W, 3] uint8 -> pixels that the model sees [1, 3, h, w] uint8``."""


@dataclass(frozen=True)
class Agreement:
    """How well an exported model agrees with the model.

    Attributes:
        difference: largest difference of a probability or of a box in 0..1.
        tolerance: the largest allowed.
        tried: description of the inputs that were tried.
    """

    difference: float
    tolerance: float
    tried: str


def check_batches(source: ExportSource, run: RunBatch) -> Agreement:
    """Compares a runtime with the model on batches of two sizes and two shapes, padded ones among them.

    Raises:
        ExportError: they differ by more than `TOLERANCE`.
    """
    model = source.model.eval()
    worst, tried = 0.0, []
    for batch_size in BATCH_SIZES:
        for height, width in _shapes(source):
            images, mask = _batch(batch_size, height, width)
            with torch.inference_mode():
                output = model(images, mask)
            expected = _rows(source, output["pred_logits"].numpy(), output["pred_boxes"].numpy())
            found = _rows(source, *run(images.numpy(), mask.numpy()))
            worst = max([worst, *(largest_difference(e, f) for e, f in zip(expected, found, strict=True))])
            tried.append(f"{batch_size}x{height}x{width}")
    return _agreed(source, Agreement(worst, TOLERANCE, ", ".join(tried)))


def check_images(source: ExportSource, run: RunImage, resize: Resize) -> Agreement:
    """Compares a runtime with the model on images of two shapes, one after the other.

    Every detection of the runtime must be one of the model's, and the scores must be those of the model's best.
    Resizing is compared separately, and the model gets the pixels of the runtime: with queries from the best cells, a
    pixel that differs by one of 255 may make another cell a query.

    Args:
        source: the model.
        run: the exported detector.
        resize: its resizing alone.

    Raises:
        ExportError: they differ by more than `TOLERANCE`, or pixels by more than `PIXEL_TOLERANCE`.
    """
    worst, tried = 0.0, []
    for number, (height, width) in enumerate(_shapes(source)):
        image = np.random.default_rng(number).integers(0, 256, (height + 21, width + 34, 3), np.uint8)
        pixels = resize(image)
        _refuse_other_pixels(source, image, pixels)
        boxes, scores, labels = run(image)
        expected = _detections(source, pixels)
        sides = np.array(image.shape[:2])[[1, 0, 1, 0]]
        found = np.concatenate((boxes / sides, scores[:, None], labels[:, None]), axis=1)
        best = np.sort(expected[:, 4])[::-1][: len(found)]
        worst = max(worst, largest_difference(expected, found), float(np.abs(best - found[:, 4]).max()))
        tried.append(f"{image.shape[0]}x{image.shape[1]}")
    return _agreed(source, Agreement(worst, TOLERANCE, ", ".join(tried)))


def _refuse_other_pixels(source: ExportSource, image: np.ndarray, found: np.ndarray) -> None:
    """Refuses a resizing that is not that of evaluations."""
    (size,) = resized_sizes(np.array([image.shape[:2]]), np.array(source.size), source.max_size)
    nothing = Instances(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), image.shape[:2])
    picture = Picture(torch.from_numpy(image), nothing).resize((int(size[0]), int(size[1])))
    expected = picture.pixels.numpy().transpose(2, 0, 1)[None]
    if found.shape != expected.shape:
        raise ExportError(f"{source.name}: resizing gives {found.shape[2:]} pixels instead of {expected.shape[2:]}")
    difference = int(np.abs(found.astype(int) - expected).max())
    if difference > PIXEL_TOLERANCE:
        raise ExportError(
            f"{source.name}: resized pixels differ by {difference} of 255, and {PIXEL_TOLERANCE} is the most that is "
            "kept: nothing was written"
        )


def largest_difference(expected: np.ndarray, found: np.ndarray) -> float:
    """Pairs each row found with an expected row of its own, and gives the largest difference of a number in a pair.

    Args:
        expected: ``[N, D]``.
        found: ``[K, D]``, with K at most N.

    Returns:
        Infinity where a number is not finite, or where there are too many rows.
    """
    if len(found) > len(expected) or not (np.isfinite(expected).all() and np.isfinite(found).all()):
        return float("inf")
    distances = cdist(found, expected, "chebyshev")
    return float(distances[linear_sum_assignment(distances)].max(initial=0.0))


def _agreed(source: ExportSource, agreement: Agreement) -> Agreement:
    if agreement.difference <= agreement.tolerance:
        return agreement
    raise ExportError(
        f"{source.name}: the exported {source.architecture} differs from the model by {agreement.difference:.2g} "
        f"({agreement.tried}), and {agreement.tolerance:g} is the most that is kept: nothing was written"
    )


def _shapes(source: ExportSource) -> Iterator[tuple[int, int]]:
    """Two small shapes within the model's sizes; small ones are enough."""
    short = min(source.size, _SHORT_SIDE)
    yield short, min(short * 4 // 3, source.max_size)
    yield min(short * 5 // 4, source.max_size), short


def _batch(count: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise as normalised images; all but the first are padded."""
    generator = torch.Generator().manual_seed(count * height + width)
    images = torch.randn(count, 3, height, width, generator=generator)
    sizes = torch.tensor([(height, width), (height * 3 // 4, width), (height, width * 2 // 3)])[:count]
    mask = padding_mask(sizes, height, width)
    return images.masked_fill(mask[:, None], 0.0), mask


def _rows(source: ExportSource, logits: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Probabilities and boxes of each query, ``[B, Q, C + 4]``."""
    values = torch.from_numpy(np.asarray(logits, np.float32))
    probabilities = values.softmax(-1) if source.has_no_object else values.sigmoid()
    return np.concatenate((probabilities.numpy(), boxes), axis=-1)


@torch.inference_mode()
def _detections(source: ExportSource, pixels: np.ndarray) -> np.ndarray:
    """All detections of the model on a resized image, ``[N, 6]``: box in 0..1, score, label. The way of evaluations.

    Args:
        source: the model.
        pixels: ``[1, 3, h, w]`` uint8.
    """
    ids, size = np.zeros(1, np.int64), np.array([pixels.shape[2:]])
    padded = PaddedBatch(
        images=pixels, sizes=size, orig_sizes=size, image_ids=ids, positions=ids, labels=np.zeros(0, np.int64),
        boxes_cxcywh=np.zeros((0, 4), np.float32), counts=ids,
    )  # fmt: skip
    batch = to_device(padded, torch.device("cpu"), source.model.pixels)
    output = source.model.eval()(batch.images, batch.mask)
    logits = output["pred_logits"]
    found = source.class_loss.scores(logits.float(), logits[0].numel())
    boxes = output["pred_boxes"].take_along_dim(found.queries[..., None], dim=1)[0]
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    columns = (centre - half, centre + half, found.scores[0][:, None], found.labels[0][:, None])
    return torch.cat([column.to(torch.float32) for column in columns], dim=1).numpy()
