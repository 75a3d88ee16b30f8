"""The interface of models, for all architectures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from detr_ray.model.encoder_layers import EncoderLayers
from detr_ray.model.features import Backbone
from detr_ray.structures import Batch, LayerOutput, ModelOutput, PixelStatistics


@dataclass(frozen=True)
class WeightNames:
    """The tensors of a model that depend on the data set or on settings, for loading weights of other models.

    Attributes:
        class_heads: modules whose ``weight`` and ``bias`` have a row a class.
        has_no_object: whether the last row of these is for no-object.
        query_tables: tensors with a row a query.
        input_projections: tensors that depend on the backbone's channels.
        backbone: what the names of the backbone's own tensors start with.
        signs: prefixes of names; a file of this architecture has at least one of them.
        object_heads: modules like the class heads, but their first row is for objects of any class.
        class_tables: tensors with a row a class, and one more row at the end.
    """

    class_heads: tuple[str, ...]
    has_no_object: bool
    query_tables: tuple[str, ...]
    input_projections: tuple[str, ...]
    backbone: str
    signs: tuple[str, ...]
    object_heads: tuple[str, ...] = ()
    class_tables: tuple[str, ...] = ()

    def classes_in(self, state: Mapping[str, Tensor]) -> int | None:
        """Classes without no-object of the first class head in a state dict; None where it has no such head."""
        bias = state.get(f"{self.class_heads[0]}.bias")
        return None if bias is None or bias.dim() != 1 else len(bias) - self.has_no_object

    def is_class_row(self, name: str) -> bool:
        """Whether a tensor has a row a class."""
        return name.rpartition(".")[0] in self.class_heads


class DetectionModel(nn.Module):
    """A detector: images in, a set of classes and boxes out.

    Attributes:
        num_classes: classes without no-object.
        num_queries: objects that can be found in one image.
        pixels: statistics for the normalisation of images.
        weight_names: the tensors that depend on the data set or on settings.
        aux_loss: whether the output has the predictions of every decoder layer, not only of the last.
        advice_on_twins: end of the error about a file where names of `published_twins` have different values.
    """

    advice_on_twins: str = ""
    num_classes: int
    num_queries: int
    pixels: PixelStatistics
    weight_names: WeightNames
    aux_loss: bool

    def forward(self, images: Tensor, mask: Tensor | None = None) -> ModelOutput:
        """Predicts a set of objects for each image. Further arguments differ between models (``inputs_of``).

        Args:
            images: ``[B, 3, H, W]`` float, normalised with ``pixels``.
            mask: ``[B, H, W]`` bool, True on padding; None where no image is padded (same result, less work).
        """
        raise NotImplementedError

    @property
    def published_twins(self) -> dict[str, str]:
        """Further names of tensors in published files -> name here."""
        return {}

    @property
    def body(self) -> nn.Module:
        """The backbone's network, whose tensors have the names of the backbone's own weight files."""
        return self.get_submodule(self.weight_names.backbone.removesuffix("."))

    @property
    def named_backbone(self) -> tuple[str, Backbone]:
        """The backbone and its name."""
        return next((name, part) for name, part in self.named_modules() if isinstance(part, Backbone))

    def train(self, mode: bool = True) -> Self:
        """Sets training mode, except for modules whose parameters are all frozen, so that their statistics stay."""
        super().train(mode)
        if mode:
            _evaluate_frozen(self)
        return self

    def recompute_encoder(self) -> None:
        """Has the backward pass compute the encoder's inner values again, instead of keeping them: less memory."""
        for module in self.modules():
            if isinstance(module, EncoderLayers):
                module.recompute = True

    def inputs_of(self, batch: Batch) -> tuple[Any, ...]:
        """The arguments of ``forward`` for a batch."""
        return batch.images, batch.mask

    def parameter_groups(self) -> dict[str, list[str]]:
        """Key of `optim` for a learning rate -> names of the parameters with this rate, in the order of the groups.

        Everything but the backbone, and the backbone (with learned positions, as in the original).
        """
        names = [name for name, _ in self.named_parameters()]
        return {
            "lr": [name for name in names if not name.startswith("backbone.")],
            "lr_backbone": [name for name in names if name.startswith("backbone.")],
        }


def output_of_layers(logits: Tensor, boxes_cxcywh: Tensor, every_layer: bool) -> ModelOutput:
    """Makes a model's output from the predictions of its decoder layers.

    Args:
        logits: ``[L, B, Q, num_logits]``, the first layer first.
        boxes_cxcywh: ``[L, B, Q, 4]`` in 0..1.
        every_layer: give the earlier layers as well as the last.
    """
    output = ModelOutput(pred_logits=logits[-1], pred_boxes=boxes_cxcywh[-1])
    if every_layer:
        output["aux_outputs"] = [
            LayerOutput(pred_logits=layer_logits, pred_boxes=layer_boxes)
            for layer_logits, layer_boxes in zip(logits[:-1], boxes_cxcywh[:-1], strict=True)
        ]
    return output


def _evaluate_frozen(part: nn.Module) -> set[bool]:
    """Puts modules whose parameters are all frozen into evaluation mode.

    Returns:
        The values of ``requires_grad`` of its parameters: both if only some train; empty without parameters.
    """
    found = {parameter.requires_grad for parameter in part.parameters(recurse=False)}
    for child in part.children():
        found |= _evaluate_frozen(child)
    if found == {False}:
        part.eval()
    return found
