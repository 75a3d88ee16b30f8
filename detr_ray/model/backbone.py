"""ResNet feature maps, with batch norm frozen or trained.

The network's modules are torchvision's, so that parameter names and init are its own; the order of computation is
written here, because frozen batch norm is not computed at all: a convolution followed by a fixed scale and shift is
another convolution, whose weights are made at each forward pass.

Knows images, masks and strides; knows nothing of positions, attention or files.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

BACKBONES = {
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
}
STAGES_OF_STRIDE = {8: 2, 16: 3, 32: 4}
"""How many residual stages are kept, by the stride of the last one."""

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
        Names of `BACKBONES`, none where no network has these layers alone; 0 with them.
    """
    blocks: list[set[str]] = [
        {n.split(".")[1] for n in names if n.startswith(f"layer{stage}.")} for stage in range(1, 5)
    ]
    counts = tuple(len(numbers) for numbers in blocks if numbers)
    strides = {stages: stride for stride, stages in STAGES_OF_STRIDE.items()}
    if len(counts) not in strides:
        return [], 0
    has_bottlenecks = any(".conv3." in name for name in names)
    fitting = [
        name
        for name, (shape, bottleneck) in _SHAPES.items()
        if shape[: len(counts)] == counts and bottleneck == has_bottlenecks
    ]
    return fitting, strides[len(counts)] if fitting else 0


def _convolve(x: Tensor, conv: nn.Conv2d, norm: nn.Module, shortcut: Tensor | None = None, relu: bool = True) -> Tensor:
    """Convolution, the norm behind it, shortcut and ReLU; a frozen norm is folded into the convolution's weights.

    The fold is computed in the weights' own precision and, under autocast, rounded once afterwards. The gradient
    reaches ``conv.weight`` through the scale.

    Args:
        x: ``[B, C_in, h, w]``.
        conv: the convolution.
        norm: frozen or trained batch norm over its output.
        shortcut: of the output's shape and type, added before the ReLU; None for none.
        relu: whether negative values become zero.
    """
    out: Tensor
    if isinstance(norm, FrozenBatchNorm2d):
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        weight = conv.weight * scale.view(-1, 1, 1, 1)
        out = F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)
    else:
        out = norm(conv(x))
    if shortcut is not None:
        out += shortcut
    return F.relu(out, inplace=True) if relu else out


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
        self.downsample = block.downsample

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, h, w]`` -> ``[B, C_out, h / stride, w / stride]``."""
        shortcut = x
        if self.downsample is not None:
            shortcut = _convolve(x, self.downsample[0], self.downsample[1], relu=False)
        out = _convolve(x, self.conv1, self.bn1)
        if not self.has_bottleneck:
            return _convolve(out, self.conv2, self.bn2, shortcut)
        out = _convolve(out, self.conv2, self.bn2)
        return _convolve(out, self.conv3, self.bn3, shortcut)


class ResNetBody(nn.Module):
    """The convolutional part of a torchvision ResNet, up to a stage.

    Args:
        network: the whole network; what lies behind the cut, and its classifier, are left out.
        num_stages: residual stages to keep, 1 to 4.
    """

    def __init__(self, network: resnet.ResNet, num_stages: int) -> None:
        super().__init__()
        self.conv1 = network.conv1
        self.bn1 = network.bn1
        self.num_stages = num_stages
        for stage in range(1, num_stages + 1):
            blocks = network.get_submodule(f"layer{stage}").children()
            self.add_module(f"layer{stage}", nn.Sequential(*map(ResidualBlock, blocks)))

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` -> the last stage's features ``[B, C, h, w]``."""
        x = _convolve(images, self.conv1, self.bn1)
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for stage in range(1, self.num_stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return x


class Backbone(nn.Module):
    """A ResNet that gives one feature map.

    With frozen norm the stem and the first stage do not train, as in the original; with batch norm everything does.

    Args:
        name: resnet18, resnet34, resnet50 or resnet101.
        norm: "frozen" (four buffers a norm, made for pretrained weights) or "batch" (trained, for a start from
            scratch).
        stride: 32, 16 or 8: pixels of the image a cell of the feature map, before dilation.
        dilation: the last stage that is kept keeps the resolution of the one before and dilates its kernels instead;
            halves the stride (DC5, where the stride is 32).

    Attributes:
        num_channels: channels of the feature map.

    Raises:
        ValueError: a value is none of these, or dilation is asked of a network of basic blocks.
    """

    def __init__(self, name: str, norm: str = "frozen", stride: int = 32, dilation: bool = False) -> None:
        super().__init__()
        if name not in BACKBONES:
            raise ValueError(f"no backbone named {name!r}: choose from {', '.join(BACKBONES)}")
        if norm not in ("frozen", "batch"):
            raise ValueError(f"backbone norm is 'frozen' or 'batch', not {norm!r}")
        if stride not in STAGES_OF_STRIDE:
            raise ValueError(f"backbone stride is 32, 16 or 8, not {stride}")
        if dilation and name in ("resnet18", "resnet34"):
            raise ValueError(f"{name} is made of basic blocks, which cannot dilate: use resnet50 or resnet101")
        num_stages = STAGES_OF_STRIDE[stride]
        network = BACKBONES[name](
            weights=None,
            norm_layer=FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d,
            replace_stride_with_dilation=[dilation and stage == num_stages for stage in (2, 3, 4)],
        )
        self.body = ResNetBody(network, num_stages)
        widest = 2048 if name in ("resnet50", "resnet101") else 512
        self.num_channels = widest * stride // 32
        if norm == "frozen":
            for frozen in (self.body.conv1, self.body.get_submodule("layer1")):
                frozen.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Sets training mode; a backbone none of whose weights train keeps its statistics too, in evaluation mode."""
        return super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))

    def forward(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features and the mask at their resolution.

        Args:
            images: ``[B, 3, H, W]`` normalised.
            mask: ``[B, H, W]`` bool, True on padding; None where nothing is padded.

        Returns:
            ``[B, num_channels, h, w]``, and ``[B, h, w]`` bool or None.
        """
        features = self.body(images)
        return features, None if mask is None else shrink_mask(mask, features.shape[-2], features.shape[-1])


def shrink_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Reads a mask at the corner pixel of each cell (nearest interpolation).

    The first cell counts as valid whatever the mask says: attention over no cell at all gives NaN, and an image
    padded at the right and at the bottom has its first cell anyway.

    Args:
        mask: ``[B, H, W]`` bool, True on padding.
        height: rows of cells.
        width: columns of cells.

    Returns:
        ``[B, height, width]`` bool.
    """
    small = F.interpolate(mask[:, None].to(torch.float32), size=(height, width))[:, 0].to(torch.bool)
    small[:, 0, 0] = False
    return small
