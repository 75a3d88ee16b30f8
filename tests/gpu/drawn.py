"""A small model, batches and a job, drawn from seeds: the same on every device."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detr_ray.config import Config, load_config
from detr_ray.data.label_map import LabelMap
from detr_ray.detector import Detector, build_detector
from detr_ray.engine.checkpoints.info import CheckpointInfo, best_of
from detr_ray.engine.context import LocalContext
from detr_ray.engine.training_step.optimizer import build_optimizer
from detr_ray.engine.training_step.step import TrainStep
from detr_ray.evaluation import GroundTruth
from detr_ray.loss import build_criterion
from detr_ray.model import DetectionModel, build_model
from detr_ray.structures import PaddedBatch

CLASSES = 5
FIRST_SCALE = 2.0**8
SETTINGS = (
    "model={backbone: resnet18, backbone_stride: 16, hidden_dim: 32, num_heads: 4, dim_feedforward: 64}",
    "model={encoder_layers: 1, decoder_layers: 2, num_queries: 20, dropout: 0, backbone_weights: none}",
    "tracking.report=false",
)


def settings(*overrides: str) -> Config:
    return load_config(None, [*SETTINGS, *overrides])


def draw_model(config: Config, device: torch.device | str = "cpu", channels_last: bool = False) -> DetectionModel:
    torch.manual_seed(1)
    model = build_model(config.model, CLASSES).to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def draw_batch(seed: int = 0, images: int = 3, height: int = 64, width: int = 96) -> PaddedBatch:
    """Images of noise with two boxes each, but for the last: it has none, and is narrower than the others."""
    rng = np.random.default_rng(seed)
    sizes = np.tile(np.array([height, width], np.int32), (images, 1))
    sizes[-1, 1] -= width // 4
    pixels = rng.integers(0, 256, (images, height, width, 3), dtype=np.uint8)
    pixels[-1, :, sizes[-1, 1] :] = 0
    counts = np.array([2] * (images - 1) + [0])
    sides = rng.uniform(0.1, 0.5, (counts.sum(), 2))
    centres = sides / 2 + rng.random(sides.shape) * (1 - sides)
    return PaddedBatch(
        images=pixels.transpose(0, 3, 1, 2),
        sizes=sizes,
        orig_sizes=sizes,
        image_ids=np.arange(images) + 1,
        positions=np.arange(images),
        labels=rng.integers(0, CLASSES, counts.sum()),
        boxes_cxcywh=np.concatenate([centres, sides], axis=1).astype(np.float32),
        counts=counts,
    )


def draw_step(
    device: torch.device | str,
    precision: str = "fp32",
    channels_last: bool = True,
    overrides: Iterable[str] = (),
    **options: Any,
) -> TrainStep:
    config = settings(*overrides)
    model = draw_model(config, device, channels_last)
    step = TrainStep(
        model,
        build_criterion(config, CLASSES, num_queries=model.num_queries).to(device),
        build_optimizer(model, {"lr": 1e-4, "lr_backbone": 1e-5}, weight_decay=1e-4),
        LocalContext(device),
        seed=0,
        precision=precision,
        clip_max_norm=0.1,
        channels_last=channels_last,
        **options,
    )
    if precision == "fp16":  # the usual one is too high for a model that has learnt nothing, and finds that out itself
        step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": FIRST_SCALE})
    return step


def deviation(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Length of the difference of all tensors together, as a share of the expected length."""
    assert found.keys() == expected.keys()
    pairs = [(found[name].detach().double().cpu(), value.detach().double().cpu()) for name, value in expected.items()]
    difference = sum(float((mine - theirs).square().sum()) for mine, theirs in pairs)
    return (difference / sum(float(theirs.square().sum()) for _, theirs in pairs)) ** 0.5


class MemoryCheckpoints:
    """Checkpoints of a run as bytes in memory, made and read as those on a disk are.

    Those on a disk go through pyarrow, which a machine need not have to try its GPU.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[CheckpointInfo, dict[str, bytes]]] = {}

    def save(
        self,
        step: int,
        files: Mapping[str, Any],
        details: Mapping[str, Any],
        *,
        evaluation_due: bool = False,
        held: bool = False,
    ) -> CheckpointInfo:
        written = {}
        for name, content in files.items():
            file = io.BytesIO()
            torch.save(content, file)
            written[name] = file.getvalue()
        recorded = {name: {"bytes": len(content), "sha256": ""} for name, content in written.items()}
        info = CheckpointInfo(step, f"memory/step_{step:08d}", None, dict(details), recorded, evaluation_due)
        self._kept[step] = (info, written)
        return info

    def load(self, info: CheckpointInfo, name: str) -> Any:
        return torch.load(io.BytesIO(self._kept[info.step][1][name]), map_location="cpu", weights_only=True)

    def annotate(
        self,
        info: CheckpointInfo,
        metrics: Mapping[str, float] | None,
        problem: str = "",
        measured_on: Mapping[str, Any] | None = None,
    ) -> CheckpointInfo:
        noted = info.with_scores(metrics, problem, measured_on)
        self._kept[info.step] = (noted, self._kept[info.step][1])
        return noted

    def write_beside(self, folder: str, name: str, content: bytes) -> None:
        self._kept[int(folder[-8:])][1][name] = content

    def checkpoints(self) -> list[CheckpointInfo]:
        return [info for info, _ in self._kept.values()]

    def latest(self) -> CheckpointInfo | None:
        return max(self.checkpoints(), key=lambda info: info.step, default=None)

    def best_of(self, found: Iterable[CheckpointInfo]) -> CheckpointInfo | None:
        return best_of(found, "val/AP")

    def prune(self, keep_last: int, found: Iterable[CheckpointInfo], also: Collection[int]) -> None:
        """All are kept."""


class DrawnJob:
    """A job whose images are drawn: two steps an epoch, and a validation set of one batch.

    Offers what `TrainJob` does, without the files that its data sets and its run are made of.

    Args:
        overrides: of the configuration.
        validates: whether there is a validation set.
    """

    steps_per_epoch = 2
    fork = None
    code_version = None
    hold_evaluated = False

    def __init__(self, *overrides: str, validates: bool = False) -> None:
        self.config = settings("train.global_batch_size=3", "train.log_every_steps=1", *overrides)
        self.total_steps = self.config.train.epochs * self.steps_per_epoch
        self.run = SimpleNamespace(
            name="drawn", path="memory", run_id="drawn", local_path=None, checkpoints=MemoryCheckpoints()
        )
        names = {"names": [f"class {i}" for i in range(CLASSES)], "category_ids": list(range(1, CLASSES + 1))}
        label_map = LabelMap.from_dict(names)
        val = _ground_truth(label_map) if validates else None
        self.data = SimpleNamespace(
            config=self.config, train=None, val=val, label_map=label_map, measured_on={"data": "drawn"}, fingerprints={}
        )

    def build_detector(self) -> Detector:
        torch.manual_seed(self.config.run.seed)
        return build_detector(self.config.model, self.config.loss, CLASSES)

    def train_batches(self, first_step: int, last_step: int) -> Iterator[list[PaddedBatch]]:
        """As `BatchSource`."""
        for step in range(first_step, last_step):
            yield [draw_batch(seed=step)]

    def limit_micro_batches(self, size: int) -> None:
        raise NotImplementedError

    def evaluation_batches(self) -> Iterator[PaddedBatch]:
        """As `BatchSource`."""
        yield draw_batch(seed=99)


def _ground_truth(label_map: LabelMap) -> GroundTruth:
    """The boxes of the validation batch as an annotation file has them."""
    batch = draw_batch(seed=99)
    scale = batch.sizes[np.repeat(np.arange(len(batch.counts)), batch.counts)][:, ::-1].astype(np.float64)
    centres, sides = batch.boxes_cxcywh[:, :2] * scale, batch.boxes_cxcywh[:, 2:] * scale
    return GroundTruth(
        image_ids=batch.image_ids.astype(np.int64),
        first_box=np.concatenate([[0], batch.counts.cumsum()]),
        boxes_xywh_px=np.concatenate([centres - sides / 2, sides], axis=1),
        category_ids=label_map.category_ids_of(batch.labels),
        areas=sides.prod(axis=1),
        is_crowd=np.zeros(len(sides), bool),
        annotation_ids=np.arange(len(sides)),
        categories=label_map.categories,
    )
