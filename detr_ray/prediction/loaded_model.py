"""A model that is loaded for use: `LoadedModel.predict`.

Prediction works like evaluation: images are resized, batched, normalised and post-processed by the same functions, at
the sizes of the model's evaluation. So it finds exactly the same boxes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
import torch

from detr_ray.config import Config
from detr_ray.data.evaluation_plan import plan_evaluation
from detr_ray.data.label_map import COCO_NUM_CLASSES, LabelMap
from detr_ray.data.sample import Instances, Picture, SamplePlan
from detr_ray.detector import Detector, build_detector, build_skeleton
from detr_ray.detector.artifact import SavedModel
from detr_ray.detector.inference import detect
from detr_ray.detector.package import ImageSizes, ModelFacts
from detr_ray.loss import ClassLoss
from detr_ray.model import DetectionModel
from detr_ray.model.exportable import reduce_to_inference
from detr_ray.model.state_dicts import OWN_FORMAT, WeightsError
from detr_ray.model.weights import PUBLISHED_ROWS, whole_state
from detr_ray.prediction.found import Prediction
from detr_ray.prediction.given_images import GivenImage, OpenedImage, is_single, open_images
from detr_ray.prediction.thresholds import Threshold, label_thresholds
from detr_ray.structures import Detections, PaddedBatch

Device = str | torch.device | None


class LoadedModel:
    """A detector with its weights, its labels and its image sizes.

    Attributes:
        model: the network as it predicts, reduced to inference (`reduce_to_inference`). `saved` has its weights under
            their names in training, and `new_network` gives a network with them.
        class_loss: reads its logits.
        label_map: its classes.
        config: the configuration of its training; for weights of other programs, the one that was given.
        sizes: sizes of its training and evaluation images.
        facts: what is known of it beside.
        source: where it was loaded from.
    """

    def __init__(self, saved: SavedModel, facts: ModelFacts, config: Config | None = None) -> None:
        """Builds the network and gives it its weights.

        Args:
            saved: the model that was read.
            facts: what is known of it beside.
            config: has architecture and sizes if the file does not; None for the defaults.

        Raises:
            WeightsError: the weights are of another model.
        """
        own = saved.config or config or Config()
        label_map = saved.label_map
        skeleton = build_skeleton(own.model, 1 if label_map is None else label_map.num_classes)
        weights = saved.weights_for(skeleton)
        if label_map is None:
            label_map = _numbered_labels(skeleton.weight_names.classes_in(weights.tensors))
            skeleton = build_skeleton(own.model, label_map.num_classes)
        state = whole_state(skeleton, weights, saved.source)
        self.label_map = label_map
        self.config = own
        detector = self._detector()
        self.model: DetectionModel = detector.model
        self.model.load_state_dict(state)
        # The model's own tensors: of those that are not folded, there is no second copy.
        self._state = self.model.state_dict()
        reduce_to_inference(self.model)
        if own.train.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.class_loss: ClassLoss = detector.criterion.class_loss
        self.sizes = ImageSizes.of(own)
        self.facts = facts
        self.source = saved.source
        self._step, self._is_averaged = saved.step, saved.is_averaged
        self._category_ids = label_map.category_ids_of(np.arange(label_map.num_classes))

    def _detector(self) -> Detector:
        """A detector of this architecture, with random weights."""
        with torch.random.fork_rng(devices=[]):  # does not change the program's random numbers
            return build_detector(self.config.model, self.config.loss, self.label_map.num_classes)

    def new_network(self) -> DetectionModel:
        """A network of its own with these weights, as it was trained: with norms, and the outputs of all layers.

        It is on the CPU, in evaluation mode.
        """
        network = self._detector().model
        network.load_state_dict(self._state)
        return network.eval()

    def with_config(self, config: Config) -> LoadedModel:
        """The same network with other settings of images, batches and precision.

        Args:
            config: with the same section ``model``.
        """
        other = copy.copy(self)
        other.config = config
        other.sizes = ImageSizes.of(config)
        return other

    @property
    def saved(self) -> SavedModel:
        """The model as a `SavedModel` on the CPU, with labels and configuration, for packages and other processes."""
        content = {"format": OWN_FORMAT, "model": dict(self._state), "ema": None}
        return SavedModel(self.source, self.label_map, self.config, self._is_averaged, self._step, content)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @overload
    def predict(  # type: ignore[overload-overlap]  # a text is a path, though it is iterable
        self,
        images: GivenImage,
        threshold: Threshold = None,
        top_k: int | None = None,
        batch_size: int | None = None,
        device: Device = None,
    ) -> Prediction: ...

    @overload
    def predict(
        self,
        images: Iterable[GivenImage],
        threshold: Threshold = None,
        top_k: int | None = None,
        batch_size: int | None = None,
        device: Device = None,
    ) -> list[Prediction]: ...

    def predict(
        self,
        images: GivenImage | Iterable[GivenImage],
        threshold: Threshold = None,
        top_k: int | None = None,
        batch_size: int | None = None,
        device: Device = None,
    ) -> Prediction | list[Prediction]:
        """Finds objects.

        Args:
            images: one image or several: paths, addresses (``s3://``, ``https://``, ...), bytes of image files, images
                of Pillow, arrays ``[H, W]`` or ``[H, W, C]``, tensors ``[C, H, W]``, or ``[B, ...]`` of these. Grey,
                palette, CMYK, alpha (which is dropped) and 16 bits are taken; arrays are uint8, uint16 or floats in
                0..1.
            threshold: lowest score of a detection; None for all; ``"best_f1"`` for the best threshold of each category
                on the validation set.
            top_k: largest number of objects of an image, by score; None for ``eval.max_detections``.
            batch_size: largest number of images in one forward pass; only images of equal size share one. None for
                ``eval.batch_size``.
            device: device to use; the model stays there. None: the GPU, if there is one.

        Returns:
            A `Prediction`; a list of them, in the order of the images, if several were given.

        Raises:
            ImageError: an image cannot be read; names it.
            ValueError: a threshold, number or device is not valid.
            WeightsError: the model gives predictions that are not finite.
        """
        thresholds = label_thresholds(threshold, self.label_map, self.facts.scores, self.source)
        top_k = self.config.eval.max_detections if top_k is None else _count("top_k", top_k)
        batch_size = self.config.eval.batch_size if batch_size is None else _count("batch_size", batch_size)
        place = self.to(device)
        single = is_single(images)
        opened = open_images([images] if single else images)  # type: ignore[list-item, arg-type]
        found: dict[int, Prediction] = {}
        for samples in self._plan(opened, batch_size):
            batch = self._batch([opened[sample.index] for sample in samples], samples)
            for sample, one in zip(samples, self.detect(batch, top_k, place), strict=True):
                image = opened[sample.index]
                found[sample.index] = self.prediction(one, image.name, image.size, thresholds, top_k)
        return found[0] if single else [found[number] for number in range(len(opened))]

    def to(self, device: Device) -> torch.device:
        """Moves the network to a device, and returns the device; None: the GPU, if there is one.

        Raises:
            ValueError: there is no such device.
        """
        try:
            place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device={device!r}: torch has no such device; give 'cpu', 'cuda' or 'cuda:0'") from error
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if place.type == "cuda" and (place.index or 0) >= gpus:
            raise ValueError(f"device={device}: torch finds {gpus or 'no'} GPU{'s' * (gpus > 1)} on this machine")
        if place != self.device:
            self.model.to(place)
        return self.device

    def detect(self, batch: PaddedBatch, max_detections: int, device: torch.device) -> list[Detections]:
        """Detects objects on a batch, one entry for each image, with the settings of the model's evaluation."""
        train = self.config.train
        return detect(
            self.model,
            batch,
            device,
            self.class_loss,
            precision="fp32" if train.precision == "fp16" and device.type == "cpu" else train.precision,
            channels_last=train.channels_last,
            max_detections=max_detections,
        )

    def prediction(
        self, found: Detections, name: str, size: tuple[int, int], thresholds: np.ndarray | None, top_k: int
    ) -> Prediction:
        """Selects the detections of an image by threshold and number.

        Args:
            found: the detections.
            name: name of the image.
            size: (height, width) in pixels of the image.
            thresholds: lowest score of each label (`label_thresholds`); None for all.
            top_k: most objects.

        Raises:
            WeightsError: scores or boxes are not finite.
        """
        scores, labels, boxes = (found[key].cpu().numpy() for key in ("scores", "labels", "boxes"))
        if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
            raise WeightsError(
                f"{self.source} gives predictions that are not finite on {name} with "
                f"train.precision={self.config.train.precision}; take an earlier checkpoint"
            )
        rows = np.flatnonzero(self._category_ids[labels] >= 0)
        if thresholds is not None:
            rows = rows[scores[rows] >= thresholds[labels[rows]]]
        rows = rows[np.argsort(-scores[rows], kind="stable")][:top_k]
        names = [str(self.label_map.names[label]) for label in labels[rows].tolist()]
        return Prediction(name, size, boxes[rows], scores[rows], self._category_ids[labels[rows]], names)

    def _plan(self, opened: Sequence[OpenedImage], batch_size: int) -> list[tuple[SamplePlan, ...]]:
        if not opened:
            return []
        heights, widths = np.array([image.size for image in opened], np.int64).T
        return plan_evaluation(
            heights,
            widths,
            np.arange(len(opened)),
            size=self.sizes.short_side,
            max_size=self.sizes.long_side,
            batch_size=batch_size,
        )

    def _batch(self, images: Sequence[OpenedImage], samples: Sequence[SamplePlan]) -> PaddedBatch:
        """A batch of images that are all resized to the same size, without padding."""
        none = (np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
        pixels = []
        for image, sample in zip(images, samples, strict=True):
            decoded = image.decode(sample.size, self.config.data.reduced_decoding).permute(1, 2, 0)
            pixels.append(sample.apply(Picture(decoded, Instances(*none, image.size))).pixels.numpy())
        return PaddedBatch(
            images=np.stack(pixels).transpose(0, 3, 1, 2),
            sizes=np.array([sample.size for sample in samples], np.int32),
            orig_sizes=np.array([image.size for image in images], np.int32),
            image_ids=np.array([sample.image_id for sample in samples], np.int64),
            positions=np.array([sample.position for sample in samples], np.int64),
            labels=none[1],
            boxes_cxcywh=none[0],
            counts=np.zeros(len(samples), np.int64),
        )


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: must be a whole number of at least 1 (got {value!r})")
    return value


def _numbered_labels(num_classes: int | None) -> LabelMap:
    """Labels of weights without class names: COCO's for the number of classes of published weights, or numbers."""
    if num_classes is None:
        num_classes = COCO_NUM_CLASSES
    if num_classes not in PUBLISHED_ROWS:
        return LabelMap(tuple(f"class {label}" for label in range(num_classes)), tuple(range(num_classes)))
    coco = LabelMap.coco91()
    others = (None,) * (num_classes - coco.num_classes)  # panoptic weights have further classes without boxes
    return LabelMap(coco.names + others, coco.category_ids + others)
