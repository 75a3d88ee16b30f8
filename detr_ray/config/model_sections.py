"""The sections `model` and `loss`: what is trained, and for what.

Their defaults follow the architecture: those in the classes are DETR's, those of others are in `PUBLISHED`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from detr_ray.architectures import ARCHITECTURES, PUBLISHED
from detr_ray.config.fields import (
    Count,
    CountOrZero,
    NonNegative,
    Number,
    Positive,
    Schedule,
    Section,
    Share,
    Text,
    Violation,
    Weight,
)

if TYPE_CHECKING:
    Architecture = str
else:
    Architecture = Literal[tuple(ARCHITECTURES)]

OPTIONAL_KEYS = (
    "num_feature_levels",
    "encoder_points",
    "decoder_points",
    "box_refine",
    "two_stage",
    "mixed_query_selection",
    "look_forward_twice",
    "one_to_many_queries",
    "one_to_many_copies",
    "denoising_queries",
    "denoising_label_noise",
    "denoising_box_noise",
)
"""Keys of `model` of only some architectures; an architecture has those in its published values."""


class ModelConfig(Section):
    """The architecture: DETR, by default the original's with a ResNet-50; and the weights it starts from. Another
    architecture has defaults of its own, those of its published model; keys that are null by default are of some
    architectures alone.
    """

    architecture: Architecture = "detr"
    """Architecture of the detector. `detr`: Carion et al. 2020. `deformable_detr`: Zhu et al. 2020; reads several
    feature maps at few points, and learns in a tenth of the epochs. `dino`: Zhang et al. 2022; the same with queries
    that the encoder places and denoising in training. As published it needs the fewest epochs on COCO; on some hundred
    images from random weights, `deformable_detr` with `two_stage` learned more (docs/your_data.md)."""
    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    """Network that computes image features."""
    backbone_norm: Literal["frozen", "batch"] = "frozen"
    """Batch norm of the backbone. `frozen`: fixed, for pretrained weights; the stem and the first stage do not train
    either. `batch`: trains, for a backbone from random weights."""
    backbone_stride: Literal[32, 16, 8] = 32
    """Image pixels for each feature cell, along each side. The backbone ends at the stage with this stride. 16 and 8
    are for small images."""
    backbone_weights: Text = "imagenet"
    """First weights of the backbone: `imagenet` (downloaded once), `none` (random), or path or URL of a torchvision
    ResNet's state dict, as a torch file or safetensors. Not used with `model.init_from`."""
    dilation: bool = False
    """Dilate the last stage instead of halving its resolution (DC5): four times the features, better on small objects,
    slower."""
    ignore_padding: bool = False
    """Keep convolutions and norms of feature maps from looking at padding, so that an image gives the same alone and
    padded in a batch. false: as in the published models, which see it; weights must be used as they were trained."""
    position_embedding: Literal["sine", "learned"] = "sine"
    """Position embedding of the transformer: fixed sine waves, or learned (`detr` alone)."""
    position_temperature: Positive | None = None
    """Longest wavelength of the sine waves, in units of an image's side divided by two pi. null: as published, 10000
    for `detr` and `deformable_detr`, 20 for `dino`."""
    position_offset: Number | None = None
    """Added to the number of a cell, counted from 1, before it is divided by the number of cells. null: as published, 0
    for `detr` and `dino`, -0.5 for `deformable_detr`. Weights must be used with the temperature and the offset that
    they were trained with."""
    hidden_dim: Count = 256
    """Width of the transformer."""
    num_heads: Count = 8
    """Attention heads."""
    dim_feedforward: Count = 2048
    """Width of the transformer's feed-forward layers. `deformable_detr` has 1024 by default."""
    encoder_layers: CountOrZero = 6
    """Layers of the encoder."""
    decoder_layers: Count = 6
    """Layers of the decoder."""
    dropout: Annotated[Share, Field(lt=1)] = 0.1
    """Dropout in the transformer. `dino` has 0 by default."""
    pre_norm: bool = False
    """Normalise before each part of a transformer layer instead of after it (`detr` alone)."""
    num_queries: Count = 100
    """Number of queries: the largest number of objects that the model can find in one image. `deformable_detr` has 300
    by default, `dino` 900. The encoder of `dino` learns only at the cells of feature maps that became queries: from
    random weights, on small images, give it as many queries as an image has cells."""
    num_feature_levels: Annotated[Count, Field(le=8)] | None = None
    """Feature maps that `deformable_detr` and `dino` read: the last three stages of the backbone that
    `model.backbone_stride` leaves from stride 8 on, or fewer, and then maps of half the resolution of the one before.
    `dino` begins at stride 4 with 5 maps or more. null: as published, 4."""
    encoder_points: Count | None = None
    """Points that each head of `deformable_detr` and `dino` reads in each feature map, in the encoder. null: as
    published, 4."""
    decoder_points: Count | None = None
    """The same in the decoder."""
    box_refine: bool | None = None
    """Each decoder layer of `deformable_detr` corrects the boxes of the layer before. null: with `model.two_stage`."""
    two_stage: bool | None = None
    """The encoder of `deformable_detr` proposes boxes, and the best ones become the queries. Needs
    `model.box_refine`. null: false."""
    mixed_query_selection: bool | None = None
    """With `model.two_stage`: only the place of a query is the encoder's, its content is learned. null: false."""
    look_forward_twice: bool | None = None
    """With `model.box_refine`: a layer is also trained by the loss of the next layer's boxes. null: false."""
    one_to_many_queries: CountOrZero | None = None
    """Further queries of `deformable_detr` in training, several of which are to find the same object (H-DETR).
    null: 0."""
    one_to_many_copies: Count | None = None
    """How many of `model.one_to_many_queries` are to find each object; needs such queries. null: as published, 6."""
    denoising_queries: CountOrZero | None = None
    """About how many further queries of `dino` start, in training, from boxes moved a little, to find them; as many
    start from boxes moved further, to find nothing. More where an image has more boxes. 0: none. null: as published,
    100."""
    denoising_label_noise: Share | None = None
    """Half of this share of the denoising queries get another label than their box's. null: as published, 0.5."""
    denoising_box_noise: NonNegative | None = None
    """How far the corners of the denoising queries' boxes are moved. 1: by up to half the box's width and height, and
    by up to its width and height where nothing is to be found. null: as published, 1."""
    aux_loss: bool = True
    """Apply the loss to every decoder layer, not only to the last."""
    init_from: Text | None = None
    """Path or URL of DETR weights to start from, as a torch file or safetensors, or the folder of a run (its best
    checkpoint) or of a checkpoint; weights inside the checkpoint of another training program are found. For other
    classes the head is rebuilt, and rows of classes with the same name are copied. The backbone must be that of the
    file."""

    def own_defaults(self) -> Mapping[str, Any]:
        """The values of the architecture's published model."""
        published = dict(PUBLISHED[self.architecture]["model"])
        if "box_refine" in published:
            published["box_refine"] = bool(self.two_stage)
        return published

    def rules(self) -> Iterator[Violation]:
        """The width must be divisible, the backbone must support dilation, keys must mean something here."""
        yield from self._meaningless_keys()
        if self.hidden_dim % self.num_heads:
            yield Violation(("hidden_dim", "num_heads"), f"must be divisible by model.num_heads ({self.num_heads})")
        if self.hidden_dim % 4:
            yield Violation(("hidden_dim",), "must be divisible by 4: half of it encodes rows, half columns, in pairs")
        if self.dilation and self.backbone not in ("resnet50", "resnet101"):
            yield Violation(
                ("dilation", "backbone"), f"needs model.backbone=resnet50 or resnet101, not {self.backbone}"
            )
        if self.dilation and self.backbone_stride != 32:
            yield Violation(
                ("dilation", "backbone_stride"),
                f"needs the last stage of the backbone, which model.backbone_stride={self.backbone_stride} cuts off",
            )

    def _meaningless_keys(self) -> Iterator[Violation]:
        """Keys that are set, but have no meaning for the architecture."""
        architecture, published = self.architecture, PUBLISHED[self.architecture]["model"]
        for name in OPTIONAL_KEYS:
            if name not in published and getattr(self, name) is not None:
                yield Violation((name, "architecture"), f"means nothing for model.architecture={architecture}")
        if architecture != "detr" and self.pre_norm:
            yield Violation(("pre_norm", "architecture"), f"must be false for model.architecture={architecture}")
        if architecture != "detr" and not self.encoder_layers:
            yield Violation(("encoder_layers", "architecture"), f"must be at least 1 for {architecture}")
        if self.box_refine and not self.aux_loss:
            yield Violation(("aux_loss", "box_refine"), "must be true with model.box_refine: each layer has its heads")
        if self.position_embedding == "learned":
            if architecture != "detr":
                yield Violation(("position_embedding", "architecture"), f"must be sine for {architecture}")
            for name in ("position_temperature", "position_offset"):
                if getattr(self, name) != published[name]:
                    yield Violation((name, "position_embedding"), "needs model.position_embedding=sine")
        for name, needed in (
            ("two_stage", "box_refine"),
            ("look_forward_twice", "box_refine"),
            ("mixed_query_selection", "two_stage"),
        ):
            if name in published and getattr(self, name) and not getattr(self, needed):
                yield Violation((name, needed), f"needs model.{needed}=true")
        copies = published.get("one_to_many_copies")
        if copies not in (None, self.one_to_many_copies) and not self.one_to_many_queries:
            yield Violation(("one_to_many_copies", "one_to_many_queries"), "needs model.one_to_many_queries above 0")
        for name in ("denoising_label_noise", "denoising_box_noise"):
            if published.get(name) not in (None, getattr(self, name)) and not self.denoising_queries:
                yield Violation((name, "denoising_queries"), "needs model.denoising_queries above 0")


class LossConfig(Section):
    """Class loss, and the weights of the matching costs and of the losses. A weight is a number, or a schedule over
    epochs such as `{points: [[0, 1], [50, 2]], interpolation: linear}`.
    """

    class_loss: Literal["softmax", "focal", "vfl", "mal"] = "softmax"
    """Loss of the classes, which also says what a class costs in the matching and how scores are read. `softmax`:
    cross-entropy with a class for no-object (`detr` alone). The others have a sigmoid a class, for all other
    architectures: `focal`: sigmoid focal loss, their default. `vfl`: varifocal loss, where scores learn how well
    boxes fit. `mal`: matchability-aware loss, the same with more weight on boxes that do not fit yet."""
    focal_alpha: Share | None = None
    """`focal`: weight of logits whose target is 1; those whose target is 0 have one minus this. `vfl`: weight of logits
    whose target is 0. null: 0.25 for `focal`, 0.75 for `vfl`."""
    focal_gamma: NonNegative | None = None
    """Exponent of the probability in the class loss's weights; for `mal` also of the IoU that a score learns. null: 2,
    and 1.5 for `mal`."""

    cost_class: Weight = 1.0
    """Weight of the class when queries are matched with boxes. `deformable_detr` and `dino` have 2 by default."""
    cost_bbox: Weight = 5.0
    """Weight of the L1 distance of boxes in the matching."""
    cost_giou: Weight = 2.0
    """Weight of the generalised IoU in the matching."""
    ce: Weight = 1.0
    """Weight of the classification loss. `deformable_detr` has 2 by default."""
    bbox: Weight = 5.0
    """Weight of the L1 loss of matched boxes."""
    giou: Weight = 2.0
    """Weight of the generalised IoU loss of matched boxes."""
    eos_coef: Weight = 0.1
    """Weight of no-object among the classes of the class loss `softmax`."""

    def own_defaults(self) -> Mapping[str, Any]:
        """The defaults of the class loss."""
        alpha, gamma = {"softmax": (None, None), "focal": (0.25, 2.0), "vfl": (0.75, 2.0), "mal": (None, 1.5)}[
            self.class_loss
        ]
        return {"focal_alpha": alpha, "focal_gamma": gamma}

    def for_architecture(self, architecture: str) -> Self:
        """The same section with an architecture's published values for the keys that were not given."""
        return self.with_defaults(PUBLISHED[architecture]["loss"])

    def rules(self) -> Iterator[Violation]:
        """At least one matching cost must not be 0."""
        costs = ("cost_class", "cost_bbox", "cost_giou")
        if all(_is_always_zero(getattr(self, name)) for name in costs):
            yield Violation(costs, "must not be 0 together with loss.cost_bbox and loss.cost_giou")


def _is_always_zero(weight: float | Schedule) -> bool:
    return weight.is_zero if isinstance(weight, Schedule) else weight == 0
