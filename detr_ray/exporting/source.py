"""What is exported: a model, and the metadata that users of the file need."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from detr_ray import __version__
from detr_ray.data.label_map import LabelMap
from detr_ray.detector.package import packed_weights
from detr_ray.loss import ClassLoss
from detr_ray.model import DetectionModel
from detr_ray.prediction import LoadedModel


@dataclass(frozen=True)
class ExportSource:
    """A model to be exported.

    Attributes:
        model: the network, with its weights.
        class_loss: reads its logits.
        label_map: its labels.
        architecture: value of ``model.architecture``.
        size: short side in pixels that its images are resized to.
        max_size: longest long side in pixels.
        max_detections: detections kept an image, where a query may stand for several classes.
        name: where the model comes from, for the file and for messages.
        step: optimizer steps taken; None if unknown.
        weights_sha256: of the weights as a package has them, by which a registered version is recognised.
    """

    model: DetectionModel
    class_loss: ClassLoss
    label_map: LabelMap
    architecture: str
    size: int
    max_size: int
    max_detections: int
    name: str
    step: int | None
    weights_sha256: str

    @classmethod
    def of(cls, loaded: LoadedModel) -> ExportSource:
        """A loaded model, for export."""
        return cls(
            model=loaded.new_network(),
            class_loss=loaded.class_loss,
            label_map=loaded.label_map,
            architecture=loaded.config.model.architecture,
            size=loaded.sizes.short_side,
            max_size=loaded.sizes.long_side,
            max_detections=loaded.config.eval.max_detections,
            name=loaded.source,
            step=loaded.saved.step,
            weights_sha256=hashlib.sha256(packed_weights(loaded.saved)).hexdigest(),
        )

    @property
    def has_no_object(self) -> bool:
        """Whether the last logit stands for no-object: then a softmax gives the scores, otherwise a sigmoid."""
        return self.class_loss.num_logits > self.class_loss.num_classes

    def metadata(self) -> dict[str, str]:
        """The metadata of the file: each value is JSON."""
        values = {
            "names": self.label_map.names,
            "category_ids": self.label_map.category_ids,
            "size": self.size,
            "max_size": self.max_size,
            "mean": self.model.pixels.mean,
            "std": self.model.pixels.std,
            "scores": "softmax" if self.has_no_object else "sigmoid",
            "max_detections": self.max_detections,
            "architecture": self.architecture,
            "source": self.name,
            "step": self.step,
            "weights_sha256": self.weights_sha256,
            "detr_ray": __version__,
        }
        return {key: json.dumps(value) for key, value in values.items()}
