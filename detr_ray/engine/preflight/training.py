"""Preflight of the training: its first weights, number of steps, batches, image sizes, and length."""

from __future__ import annotations

import http.client
import math
import urllib.error
import urllib.request
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from torchvision.models import get_model_weights

from detr_ray.architectures import FROM_SCRATCH
from detr_ray.config import Config, ConfigError
from detr_ray.data.balance import takings, takings_of_sources
from detr_ray.data.errors import DataError
from detr_ray.data.index import DatasetIndex
from detr_ray.data.label_map import LabelMap
from detr_ray.data.loader import padded_size
from detr_ray.data.planner import split_global_batch
from detr_ray.data.sample import SamplePlan
from detr_ray.data.statistics import count_boxes
from detr_ray.detector import build_skeleton
from detr_ray.engine.checkpoints.found_model import weights_file
from detr_ray.engine.context import uses_gpu
from detr_ray.engine.cpu import slow_precision
from detr_ray.engine.job import total_steps
from detr_ray.engine.preflight.findings import Level, Report
from detr_ray.engine.preflight.memory import check_memory
from detr_ray.engine.stream.planned_data import PlannedData, refuse_positions_out_of_reach
from detr_ray.engine.training_step.parameters import refuse_misnamed
from detr_ray.model.checkpoint_file import read_checkpoint
from detr_ray.model.state_dicts import WeightsError
from detr_ray.model.weights import load_backbone_weights, load_initial_weights

TRAINING, WEIGHTS = "training", "weights"
TIMEOUT_S = 5.0
"""How long a server may take to answer."""

# Status codes of servers that refuse HEAD requests; the file may exist all the same.
_NO_ANSWER = (401, 403, 405, 501)

_SMALL_SIDE_PX = 240
_MOST_LEFT_OUT = 0.1
_MOST_ENLARGED = 2.0
_MOST_PLANNED = 200_000
_MOST_REPEATED = 20


def starts_from_official_weights(config: Config) -> bool:
    """Whether the first weights use COCO's label space. Weights on a server are not downloaded: the answer is a guess.

    False for a file that cannot be read; `check_weights` reports it.
    """
    if config.model.init_from is None:
        return False
    try:
        readable = _local_file(weights_file(config.model.init_from, "model.init_from"))
    except ConfigError:
        return False
    if readable is None:
        # Weights on a server are usually the published ones.
        return True
    try:
        return read_checkpoint(readable)["class_names"] is None
    except (WeightsError, OSError):
        return False


def check_weights(config: Config, label_map: LabelMap | None, report: Report) -> None:
    """Checks the first weights. Reads local files; downloads nothing.

    Args:
        config: the configuration.
        label_map: the labels of training; None if unknown: then the head is not checked.
        report: findings are added to it.
    """
    key = "model.backbone_weights" if config.model.init_from is None else "model.init_from"
    given = config.model.init_from or config.model.backbone_weights
    if given == "none":
        report.add("ok", WEIGHTS, "the backbone starts from random weights (model.backbone_weights=none)")
        return
    source = get_model_weights(config.model.backbone)["IMAGENET1K_V1"].url if given == "imagenet" else given
    if config.model.init_from is not None:
        try:
            source = weights_file(given, key)
        except ConfigError as error:
            report.add("error", WEIGHTS, str(error))
            return
    readable = _local_file(source)
    if readable is None:
        _check_server(key, source, report)
        return
    names = (label_map or LabelMap.coco91()).names
    model = build_skeleton(config.model, len(names))
    try:
        if config.model.init_from is None:
            load_backbone_weights(model, readable, config.model.backbone)
            report.add("ok", WEIGHTS, f"{key}: {readable} fits {config.model.backbone}")
            return
        if label_map is None:
            read_checkpoint(readable)
            report.add("ok", WEIGHTS, f"{key}: {readable} can be read")
            return
        found = load_initial_weights(model, readable, names, LabelMap.coco91().names)
    except (WeightsError, OSError) as error:
        report.add("error", WEIGHTS, f"{key}: {error}")
        return
    notes = [f"{name}: {what}" for name, what in found.rebuilt.items()]
    missing = [f"{name}: not in the file, starts from random weights" for name in found.missing]
    report.add(
        "ok", WEIGHTS,
        f"{key}: {readable} can be read: {len(found.loaded)} tensors are taken, {len(found.rebuilt)} rebuilt, "
        f"{len(found.missing)} missing, {len(found.unused)} unused", names=notes,
    )  # fmt: skip
    if missing:
        report.add("warning", WEIGHTS, f"{key}: {len(missing)} tensors of the model are not in the file", names=missing)


def _local_file(source: str) -> str | None:
    """The local file of a source: itself, or the copy of an earlier download; None if there is none."""
    if urlsplit(source).scheme not in ("http", "https"):
        return source
    kept = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(source).path).name
    return str(kept) if kept.is_file() else None


def _check_server(key: str, url: str, report: Report) -> None:
    """Queries the size of a file on a server."""
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "detr_ray"})
    advice = f"without internet access, download it elsewhere and set {key} to its path"
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            size = response.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        level: Level = "warning" if error.code in _NO_ANSWER else "error"
        report.add(level, WEIGHTS, f"{key}: {url}: the server answers {error.code} {error.reason}", advice)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        report.add("error", WEIGHTS, f"{key}: {url} cannot be fetched ({reason})", advice)
    else:
        megabytes = f" ({int(size) / 1e6:.0f} MB)" if size is not None and size.isdecimal() else ""
        report.add("ok", WEIGHTS, f"{key}: {url} is fetched when training starts{megabytes}; not looked into here")


def check_plan(config: Config, opened: dict[str, DatasetIndex], label_map: LabelMap | None, report: Report) -> None:
    """Checks length, batch shapes and number format of the training."""
    _check_precision(config, report)
    train = opened.get("train")
    if train is None:
        return
    batch = config.train.global_batch_size
    data = PlannedData(config, train, opened.get("val"), label_map or LabelMap.contiguous(train.categories))
    try:
        steps_per_epoch, samples = data.planner.steps_per_epoch, data.planner.epoch_samples
    except DataError as error:
        report.add("error", TRAINING, str(error))
        return
    _check_sources(data, report)
    _check_balance(data, report)
    steps = total_steps(config, steps_per_epoch)
    report.add("ok", TRAINING, f"steps: {steps_per_epoch} an epoch, {steps} in all, of {batch} images each")
    left_out = samples % batch
    if left_out > _MOST_LEFT_OUT * samples:
        report.add(
            "warning", TRAINING,
            f"{left_out} of {samples} images are left out of each epoch (others each time): they fill no batch",
            "choose train.global_batch_size so that the number of images divided by it leaves a smaller remainder",
        )  # fmt: skip

    def positions() -> None:
        refuse_positions_out_of_reach(config, config.model, train, opened.get("val"))

    def names() -> None:
        refuse_misnamed(config)

    is_refused = False
    for refuse in (positions, names):
        try:
            refuse()
        except ConfigError as error:
            is_refused = True
            for line in error.errors:
                report.add("error", TRAINING, line)
    sizes, largest_batch = _check_shapes(data, min(steps, steps_per_epoch), report)
    if not is_refused:  # the model takes no batch out of reach, and cannot be frozen by names that it lacks
        check_memory(config, data.label_map.num_classes, largest_batch, count_boxes(train).most, TRAINING, report)
    _check_enlargement(train, sizes, report)
    _check_ends(config, report)
    _check_length(config, len(train), steps * batch, float(np.median(sizes[:, 1:].min(axis=1))), report)


def _check_sources(data: PlannedData, report: Report) -> None:
    """Says how many of an epoch's samples are of each of several data sets."""
    train = data.train
    assert train is not None
    repeats = np.ones(len(train)) if data.repeats is None else data.repeats
    sources = takings_of_sources(train, repeats)
    if sources:
        names = [
            f"{t.name}: {t.images} images: {t.samples:.0f} samples ({t.samples / repeats.sum():.0%})" for t in sources
        ]
        report.add("ok", TRAINING, f"an epoch takes from {len(sources)} data sets (data.sources):", names=names)


def _check_balance(data: PlannedData, report: Report) -> None:
    """Says what an epoch takes where images are repeated."""
    repeats, train = data.repeats, data.train
    if repeats is None or train is None:
        return
    of_classes = takings(train, repeats)
    background = count_boxes(train).per_image == 0
    share = float(repeats[background].sum() / repeats.sum())
    names = [f"{t.name}: {t.images} images, taken {t.factor:.2f} times: {t.samples:.0f} samples" for t in of_classes]
    report.add(
        "ok", TRAINING,
        f"an epoch has {data.planner.epoch_samples} samples of {len(train)} images (data.balance); {share:.1%} of them "
        f"have no box ({background.sum()} images); classes by how often their images are taken:", names=names,
    )  # fmt: skip
    most = float(repeats.max())
    if most > _MOST_REPEATED:
        report.add(
            "warning", TRAINING, f"images are taken up to {most:.0f} times in an epoch: they may be learnt by heart",
            "lower data.balance.repeat_threshold, class_weights or background",
        )  # fmt: skip


def _check_precision(config: Config, report: Report) -> None:
    """Checks the processor of this machine; workers on a cluster may have another one."""
    line = slow_precision(config.train.precision, "cuda" if uses_gpu(config.train.use_gpu) else "cpu")
    if line is not None:
        message, _, advice = line.partition("; ")
        report.add("warning", TRAINING, message, advice)


def _check_shapes(data: PlannedData, steps: int, report: Report) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Plans the first epoch.

    Returns:
        Its samples as ``[n, 3]`` (row of the index, height, width), and the images, height and width of the largest
        batch of a forward pass.
    """
    config = data.config
    # With the smallest number of workers, each has the largest share.
    workers = config.train.worker_range[0] if config.train.worker_range else None
    most = None if config.train.micro_batch_size == "auto" else config.train.micro_batch_size
    plan = data.plan(1, 0)
    samples, largest, largest_batch = [], (0, 0), (0, 0, 0)
    for step in range(min(steps, max(1, _MOST_PLANNED // config.train.global_batch_size))):
        batch = tuple(chain.from_iterable(plan.step(step)))
        samples += [(sample.index, *sample.size) for sample in batch]
        largest = max([largest, *(sample.size for sample in batch)], key=math.prod)
        for rank in range(workers or 1):
            for part in split_global_batch(batch, workers or 1, rank, most):
                largest_batch = max(largest_batch, _padded(part, config.data.pad_multiple), key=math.prod)
    count, height, width = largest_batch
    share = f"{workers} workers" if workers else "one worker; more workers share it"
    share += "; cut as memory allows" if config.train.micro_batch_size == "auto" else ""
    message = (
        f"largest training image {largest[0]}x{largest[1]} (height x width), largest batch of a forward pass "
        f"{count} x {height}x{width} ({share})"
    )
    if plan.evaluation:
        count, height, width = max((_padded(part, 1) for part in plan.evaluation), key=math.prod)
        message += f"; in validation {count} x {height}x{width}"
    report.add("ok", TRAINING, message)
    return np.array(samples, np.int64), largest_batch


def _padded(samples: tuple[SamplePlan, ...], multiple: int) -> tuple[int, int, int]:
    """Number of images, height and width of a padded batch."""
    return len(samples), *padded_size(samples, multiple)


def _check_ends(config: Config, report: Report) -> None:
    """Checks that transforms that are to end do so before the training does."""
    epochs = config.train.epochs
    ends = [(t.name, getattr(t, "until_epoch", None)) for t in config.data.augment.transforms]
    late = [f"{name} (until_epoch: {end})" for name, end in ends if end is not None and end >= epochs]
    if late:
        report.add(
            "warning", TRAINING,
            f"data.augment.transforms: {', '.join(late)} would be on until the end: train.epochs is {epochs}",
            f"set until_epoch to {max(1, epochs * 3 // 4)} or so, or to null",
        )  # fmt: skip


def _check_enlargement(train: DatasetIndex, samples: np.ndarray, report: Report) -> None:
    stored = np.minimum(train.heights, train.widths)[samples[:, 0]]
    enlarged = float(np.median(samples[:, 1:].min(axis=1) / stored))
    if enlarged > _MOST_ENLARGED:
        report.add(
            "warning", TRAINING,
            f"training enlarges its images {enlarged:.1f} times (median; their short side is {np.median(stored):.0f} "
            "pixels as stored): slower, with little gain",
            "set data.augment.scales, max_size, crop_scales, crop_min and crop_max, and eval.size, nearer to the "
            "stored sizes",
        )  # fmt: skip


def _check_length(config: Config, num_images: int, passes: int, short_side_px: float, report: Report) -> None:
    if config.model.init_from is not None:
        return
    architecture = config.model.architecture
    needed = FROM_SCRATCH[architecture]
    enough = needed.small if short_side_px <= _SMALL_SIDE_PX else needed.photographs
    if passes < enough:
        report.add(
            "warning", TRAINING,
            f"training from scratch sees {passes} images ({num_images}, {passes / num_images:.0f} times each); with "
            f"images of this size {architecture} usually needs about {enough} before it finds much",
            "start from trained weights (model.init_from), or train for more epochs on more images; simple objects may "
            "need less",
        )  # fmt: skip
