"""ResNet feature maps, with frozen or trained batch norm.

The modules are torchvision's, with its parameter names and init. The forward pass is written here because frozen batch
norm is folded: a convolution followed by a fixed scale and shift is another convolution, whose weights are computed in
each forward pass.

Knows images and strides; knows nothing of padding, positions, attention or files.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from detr_ray.model.features import Backbone, blank_padding, is_misread_in_bf16
from detr_ray.structures import IMAGENET_PIXELS

if TYPE_CHECKING:
    from detr_ray.config import ModelConfig

BACKBONES = {
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
}
STAGES_OF_STRIDE = {4: 1, 8: 2, 16: 3, 32: 4}
"""Stride -> residual stage whose features have it."""

# Blocks of each stage, and whether they are bottlenecks.
_SHAPES = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
}


def resnets_with(names: Collection[str]) -> tuple[list[str], int]:
    """The networks that have layers of these parameter names, and the stride of the last stage among them.

    Args:
        names: as those of `ResNetBody`, for example ``layer3.5.conv1.weight``.

    Returns:
        Names of `BACKBONES`, and the stride. No names and 0 if no network has exactly these layers.
    """
    blocks: list[set[str]] = [
        {n.split(".")[1] for n in names if n.startswith(f"layer{stage}.")} for stage in range(1, 5)
    ]
    counts = tuple(len(numbers) for numbers in blocks if numbers)
    strides = {stage: stride for stride, stage in STAGES_OF_STRIDE.items() if stage > 1}
    if len(counts) not in strides:
        return [], 0
    has_bottlenecks = any(".conv3." in name for name in names)
    fitting = [
        name
        for name, (shape, bottleneck) in _SHAPES.items()
        if shape[: len(counts)] == counts and bottleneck == has_bottlenecks
    ]
    return fitting, strides[len(counts)] if fitting else 0


def _shrunk(mask: Tensor | None, stride: int) -> Tensor | None:
    """The mask of what a layer of this stride gives, from that of what it gets."""
    return None if mask is None else mask[:, ::stride, ::stride]


def _convolve(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.Module,
    shortcut: Tensor | None = None,
    relu: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """Convolution, norm, shortcut and ReLU; a frozen norm is folded into the convolution's weights.

    The folded weights are computed in the weights' own precision and, under autocast, rounded once afterwards. The
    gradient of ``conv.weight`` is computed through the scale.

    Args:
        x: ``[B, C_in, h, w]``.
        conv: the convolution.
        norm: frozen or trained batch norm over its output.
        shortcut: of the output's shape and type, added before the ReLU; None for none.
        relu: whether negative values become zero.
        mask: ``[B, h, w]``, True on padding that the convolution must not see; None for none.
    """
    out: Tensor
    if is_misread_in_bf16(x, conv):
        with torch.autocast("cpu", enabled=False):
            out = _convolve(x.float(), conv, norm, shortcut, relu, mask)
        return out.to(torch.get_autocast_dtype("cpu"))
    if conv.kernel_size != (1, 1):
        x = blank_padding(x, mask)
    if isinstance(norm, FrozenBatchNorm2d):
        weight, shift = _folded(conv, norm)
        out = F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)
    else:
        out = norm(conv(x))
    if shortcut is not None:
        out += shortcut
    return F.relu(out, inplace=True) if relu else out


def _folded(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals a convolution followed by a frozen norm."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale


@torch.no_grad()
def fold_frozen_norms(model: nn.Module) -> None:
    """Folds the frozen norms of a model's ResNet into the convolutions permanently, in place.

    The outputs stay the same to the last bit; the model can no longer train, nor load a checkpoint.
    """
    for module in model.modules():
        if isinstance(module, ResNetBody):
            _fold(module, "conv1", "bn1")
        elif isinstance(module, ResidualBlock):
            for number in (1, 2, 3) if module.has_bottleneck else (1, 2):
                _fold(module, f"conv{number}", f"bn{number}")
            if module.downsample is not None:
                _fold(module.downsample, "0", "1")


def _fold(module: nn.Module, conv_name: str, norm_name: str) -> None:
    """Folds a norm of a module into one of its convolutions; does nothing if the norm is not frozen."""
    conv, norm = module.get_submodule(conv_name), module.get_submodule(norm_name)
    assert isinstance(conv, nn.Conv2d)
    if isinstance(norm, FrozenBatchNorm2d):
        weight, shift = _folded(conv, norm)
        conv.weight, conv.bias = nn.Parameter(weight, False), nn.Parameter(shift, False)
        module.set_submodule(norm_name, nn.Identity())


class ResidualBlock(nn.Module):
    """A residual block, of either of torchvision's two kinds, that folds its frozen norms.

    Args:
        block: the block whose layers are taken over, under their names.
    """

    def __init__(self, block: resnet.Bottleneck | resnet.BasicBlock) -> None:
        super().__init__()
        self.conv1, self.bn1 = block.conv1, block.bn1
        self.conv2, self.bn2 = block.conv2, block.bn2
        self.has_bottleneck = isinstance(block, resnet.Bottleneck)
        if self.has_bottleneck:
            self.conv3, self.bn3 = block.conv3, block.bn3
        self.downsample, self.stride = block.downsample, block.stride

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[B, C_in, h, w]`` -> ``[B, C_out, h / stride, w / stride]``; ``[B, h, w]`` padding is not looked at."""
        shortcut = x
        if self.downsample is not None:
            shortcut = _convolve(x, self.downsample[0], self.downsample[1], relu=False)
        out = _convolve(x, self.conv1, self.bn1, mask=mask)
        if not self.has_bottleneck:
            return _convolve(out, self.conv2, self.bn2, shortcut, mask=_shrunk(mask, self.stride))
        out = _convolve(out, self.conv2, self.bn2, mask=mask)
        return _convolve(out, self.conv3, self.bn3, shortcut)


class Stage(nn.Sequential):
    """Residual blocks one after the other; the first one may halve the resolution."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As each of its blocks."""
        for block in self:
            assert isinstance(block, ResidualBlock)
            x, mask = block(x, mask), _shrunk(mask, block.stride)
        return x

    @property
    def stride(self) -> int:
        """Of all blocks together."""
        # A list: torch.compile cannot trace a generator here.
        return math.prod([block.stride for block in self if isinstance(block, ResidualBlock)])


class ResNetBody(nn.Module):
    """The convolutional part of a torchvision ResNet, up to a stage.

    Args:
        network: the whole network; later stages and the classifier are left out.
        stages: residual stages (1 to 4) whose features are given, ascending; the last one is where the network is cut.
    """

    def __init__(self, network: resnet.ResNet, stages: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = network.conv1
        self.bn1 = network.bn1
        self.stages = tuple(stages)
        for stage in range(1, self.stages[-1] + 1):
            blocks = network.get_submodule(f"layer{stage}").children()
            self.add_module(f"layer{stage}", Stage(*map(ResidualBlock, blocks)))

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Images ``[B, 3, H, W]`` -> features ``[B, C, h, w]`` of each of ``stages``.

        Padding in ``mask``, ``[B, H, W]``, is not looked at; None: it is part of the image, as in the original.
        """
        x = _convolve(images, self.conv1, self.bn1, mask=mask)
        mask = _shrunk(mask, 2)
        x = F.max_pool2d(blank_padding(x, mask), kernel_size=3, stride=2, padding=1)
        mask = _shrunk(mask, 2)
        maps = []
        for number in range(1, self.stages[-1] + 1):
            stage = self.get_submodule(f"layer{number}")
            assert isinstance(stage, Stage)
            x, mask = stage(x, mask), _shrunk(mask, stage.stride)
            if number in self.stages:
                maps.append(x)
        return tuple(maps)


class ResNetBackbone(Backbone):
    """A ResNet that gives feature maps.

    With frozen norm the stem and the first stage do not train, as in the original; with batch norm everything does.

    Args:
        name: resnet18, resnet34, resnet50 or resnet101.
        norm: "frozen" (four buffers a norm, made for pretrained weights) or "batch" (trained, for a start from
            scratch).
        strides: 4, 8, 16 or 32 for each map, ascending: pixels of the image a cell, before dilation.
        dilation: the last stage that is kept keeps the resolution of the one before and dilates its kernels instead;
            halves its stride (DC5, where the stride is 32).
        ignore_padding: keep convolutions from looking at padding, so that an image has the same features alone and
            padded in a batch.

    Attributes:
        channels: channels of each map.
        strides: pixels of the image a cell of each map.
        pixels: the ImageNet statistics.
        layers: the stem and each stage.

    Raises:
        ValueError: a value is none of these, or dilation is set for a network of basic blocks.
    """

    pixels = IMAGENET_PIXELS

    def __init__(
        self,
        name: str,
        norm: str = "frozen",
        strides: Sequence[int] = (32,),
        dilation: bool = False,
        ignore_padding: bool = False,
    ) -> None:
        super().__init__()
        self.ignore_padding = ignore_padding
        if name not in BACKBONES:
            raise ValueError(f"no backbone named {name!r}: choose from {', '.join(BACKBONES)}")
        if norm not in ("frozen", "batch"):
            raise ValueError(f"backbone norm is 'frozen' or 'batch', not {norm!r}")
        if list(strides) != sorted(set(strides)) or not set(strides) <= STAGES_OF_STRIDE.keys() or not strides:
            raise ValueError(f"backbone strides are some of 4, 8, 16 and 32, ascending, not {list(strides)}")
        if dilation and name in ("resnet18", "resnet34"):
            raise ValueError(f"{name} is made of basic blocks, which cannot dilate: use resnet50 or resnet101")
        stages = [STAGES_OF_STRIDE[stride] for stride in strides]
        network = BACKBONES[name](
            weights=None,
            norm_layer=FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d,
            replace_stride_with_dilation=[dilation and stage == stages[-1] for stage in (2, 3, 4)],
        )
        self.body = ResNetBody(network, stages)
        self.layers = (("body.conv1.", "body.bn1."), *((f"body.layer{n}.",) for n in range(1, stages[-1] + 1)))
        widest = 2048 if name in ("resnet50", "resnet101") else 512
        self.channels = tuple(widest * stride // 32 for stride in strides)
        self.strides = (*strides[:-1], strides[-1] // 2 if dilation else strides[-1])
        if norm == "frozen":
            for frozen in (self.body.conv1, self.body.get_submodule("layer1")):
                frozen.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg_model: ModelConfig, strides: Sequence[int]) -> Self:
        """The network of a config's ``model`` section, with random weights, that gives maps of these strides."""
        return cls(
            cfg_model.backbone,
            cfg_model.backbone_norm,
            strides,
            cfg_model.dilation,
            getattr(cfg_model, "ignore_padding", False),
        )

    def maps(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """The kept stages' features."""
        maps: tuple[Tensor, ...] = self.body(images, mask if self.ignore_padding else None)
        return maps
