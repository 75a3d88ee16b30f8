"""Data that packages exchange: targets, batches, model outputs, detections; with their shapes and units.

Letters: ``B`` images of a micro-batch, ``H`` x ``W`` its padded size in pixels, ``Q`` queries, ``C`` classes without
no-object, ``N`` boxes of one image, ``M`` boxes of the whole micro-batch, ``K`` detections.

Words: a *label* is a row of the classifier (``0..C-1``); *category_id* and *image_id* are ids of the annotation file.
A *step* is one optimizer update, computed from one *global batch*; a *micro-batch* is the input of one forward pass of
one worker. A *position* is the place of a sample in the training stream:
``step * global_batch_size + slot``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor


class Target(TypedDict):
    """Labels and boxes of one image, for the criterion.

    Attributes:
        labels: ``[N]`` int64, class index without no-object.
        boxes: ``[N, 4]`` float32 cxcywh in 0..1 of the unpadded image. ``N`` may be 0.
    """

    labels: Tensor
    boxes: Tensor


class LayerOutput(TypedDict):
    """Predictions of one decoder layer.

    Attributes:
        pred_logits: ``[B, Q, C + 1]`` with no-object last, or ``[B, Q, C]`` where classes are independent.
        pred_boxes: ``[B, Q, 4]`` cxcywh in 0..1.
    """

    pred_logits: Tensor
    pred_boxes: Tensor


class ModelOutput(LayerOutput):
    """Predictions of the last decoder layer, and what else a model predicts in training.

    Attributes:
        aux_outputs: of the earlier decoder layers, first layer first.
        enc_outputs: of the encoder, for each of its cells.
        interm_outputs: of the encoder, for the cells that became queries.
        one_to_many_outputs: of further queries, several of which are to find the same box; last layer and earlier ones.
        dn_outputs: of denoising queries, which start from noised copies of the boxes; last layer and earlier ones.
    """

    aux_outputs: NotRequired[list[LayerOutput]]
    enc_outputs: NotRequired[LayerOutput]
    interm_outputs: NotRequired[LayerOutput]
    one_to_many_outputs: NotRequired[ModelOutput]
    dn_outputs: NotRequired[DenoisingOutput]


class DenoisingOutput(ModelOutput):
    """Predictions of denoising queries.

    In each group as many queries are to find boxes as the image with the most boxes has: query ``i`` of a group box
    ``i`` of its image, where the image has that one. As many again are to find nothing.

    Attributes:
        groups: into how many groups of the same size the queries are divided.
    """

    groups: int


class Detections(TypedDict):
    """Detections of one image: one for each query, or the best ones where a query may stand for several classes.

    Attributes:
        scores: ``[K]`` in 0..1, the probability of ``labels``.
        labels: ``[K]`` int64, never no-object.
        boxes: ``[K, 4]`` xyxy in pixels of the image size given to post-processing.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """One micro-batch from the data tasks: numpy arrays on the host, images as uint8.

    Attributes:
        images: ``[B, 3, H, W]`` uint8 RGB, padded with zeros at the right and at the bottom.
        sizes: ``[B, 2]`` int32 (height, width) of the unpadded images in pixels.
        orig_sizes: ``[B, 2]`` int32 (height, width) of the stored images in pixels.
        image_ids: ``[B]`` int64.
        positions: ``[B]`` int64, place of each sample in the stream.
        labels: ``[M]`` int64, of all images, concatenated.
        boxes_cxcywh: ``[M, 4]`` float32 in 0..1 of the unpadded image.
        counts: ``[B]`` int64, boxes of each image; sums to M.
        bad_images: one line for each image that could not be read ("file: reason"). A sample that it belongs to is
            black and has no boxes, so that the planned shapes do not change.
        bad_image_ids: int64, the ids of these images. An image that was read as another sample's partner has its own id
            here, which need not be in ``image_ids``.
    """

    images: np.ndarray
    sizes: np.ndarray
    orig_sizes: np.ndarray
    image_ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    boxes_cxcywh: np.ndarray
    counts: np.ndarray
    bad_images: list[str] = field(default_factory=list)
    bad_image_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


class StepInfo(NamedTuple):
    """What all micro-batches of a step share, whichever worker has them.

    Attributes:
        seed: of the run.
        step: the optimizer step.
        most_boxes: boxes of the image of the global batch that has the most.
    """

    seed: int
    step: int
    most_boxes: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch on the device, ready for the model.

    Attributes:
        images: ``[B, 3, H, W]`` float32, normalised by the model's `PixelStatistics`, zero on padding.
        mask: ``[B, H, W]`` bool, True on padding; None if no image of the batch is padded.
        targets: one for each image.
        image_ids: ``[B]`` int64 on the host.
        positions: ``[B]`` int64 on the host.
        orig_sizes: ``[B, 2]`` int64 (height, width) on the host.
        padded_pixels: pixels of the padded batch, B x H x W.
        image_pixels: pixels without padding.
        step_info: of the step that it is trained in; None in evaluation.
    """

    images: Tensor
    mask: Tensor | None
    targets: list[Target]
    image_ids: Tensor
    positions: Tensor
    orig_sizes: Tensor
    padded_pixels: int
    image_pixels: int
    step_info: StepInfo | None = None


class PixelStatistics(NamedTuple):
    """Mean and standard deviation of red, green and blue, in 0..1, by which a backbone's images are normalised."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET_PIXELS = PixelStatistics(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def padding_mask(sizes: Tensor, height: int, width: int) -> Tensor:
    """Mask ``[B, height, width]``, True on padding, from the unpadded sizes ``[B, 2]`` (height, width)."""
    rows = torch.arange(height, device=sizes.device)[None, :, None]
    columns = torch.arange(width, device=sizes.device)[None, None, :]
    return (rows >= sizes[:, 0, None, None]) | (columns >= sizes[:, 1, None, None])


def copied(array: np.ndarray, device: torch.device) -> Tensor:
    """Copies an array to a device, into writable memory (arrays from the object store are read-only)."""
    if device.type == "cpu":
        return torch.from_numpy(np.require(array, requirements=["W", "C"]))
    # From pinned memory the copy to the GPU is asynchronous. Torch reuses the memory after the copy.
    host = torch.from_numpy(np.empty(0, array.dtype)).new_empty(array.shape, pin_memory=device.type == "cuda")
    host.numpy()[...] = array
    return host.to(device, non_blocking=True)


class HostCopy:
    """An asynchronous copy of a tensor to the host. Reading it waits for the copy; creating it does not.

    A plain copy would wait for all earlier work of the device.

    Args:
        values: the tensor; must not be changed afterwards.
    """

    def __init__(self, values: Tensor) -> None:
        self._host = values.to("cpu", non_blocking=True)  # from a GPU: into pinned memory
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def read(self) -> Tensor:
        """The values on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


def to_device(
    padded: PaddedBatch,
    device: torch.device,
    pixels: PixelStatistics,
    channels_last: bool = False,
    step_info: StepInfo | None = None,
) -> Batch:
    """Copies a padded batch to a device (images as uint8) and normalises it there.

    Args:
        padded: the batch.
        device: the target device.
        pixels: statistics for the normalisation, from the model.
        channels_last: whether images have the channels-last memory format.
        step_info: of the step that it is trained in; None in evaluation.
    """
    height, width = padded.images.shape[2:]
    padded_pixels = padded.images.shape[0] * height * width
    image_pixels = int(padded.sizes.astype(np.int64).prod(axis=1).sum())

    # In the memory order of the array: channels last.
    images = copied(padded.images.transpose(0, 2, 3, 1), device).permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    mean, std = (copied(np.array(values, np.float32) * 255, device) for values in pixels)
    images = images.to(torch.float32).sub_(mean.view(1, 3, 1, 1)).div_(std.view(1, 3, 1, 1))
    mask = None
    if image_pixels < padded_pixels:
        mask = padding_mask(copied(padded.sizes.astype(np.int64), device), height, width)
        images.masked_fill_(mask[:, None], 0.0)

    labels, boxes = copied(padded.labels, device), copied(padded.boxes_cxcywh, device)
    counts = padded.counts.tolist()
    targets = [
        Target(labels=image_labels, boxes=image_boxes)
        for image_labels, image_boxes in zip(labels.split(counts), boxes.split(counts), strict=True)
    ]
    return Batch(
        images=images,
        mask=mask,
        targets=targets,
        image_ids=torch.tensor(padded.image_ids),
        positions=torch.tensor(padded.positions),
        orig_sizes=torch.from_numpy(padded.orig_sizes.astype(np.int64)),
        padded_pixels=padded_pixels,
        image_pixels=image_pixels,
        step_info=step_info,
    )
