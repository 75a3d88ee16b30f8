"""The ResNet: torchvision's values, cuts, dilation, norms, and the shrunken mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from detr_ray.config import load_config
from detr_ray.model.backbones import build_backbone
from detr_ray.model.backbones.resnet import ResNetBackbone
from detr_ray.model.features import shrink_mask


def torchvision_body(name: str, norm: type[nn.Module], last: str = "layer4", dilated: bool = False) -> nn.Module:
    network = getattr(resnet, name)(norm_layer=norm, replace_stride_with_dilation=[False, False, dilated])
    return IntermediateLayerGetter(network, {last: "out"})


def randomise_norms(module: nn.Module) -> None:
    """Statistics as training leaves them; fresh ones (mean 0, variance 1) would hide a wrong fold."""
    for name, value in module.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            value.normal_(std=0.2)
        elif ".bn" in name or name.startswith("bn") or ".downsample.1." in name:
            value.uniform_(0.5, 1.0)


@pytest.mark.parametrize(("name", "dilated"), [("resnet18", False), ("resnet50", False), ("resnet50", True)])
def test_folded_norm_gives_torchvisions_features_and_gradients(name: str, dilated: bool) -> None:
    torch.manual_seed(0)
    theirs = torchvision_body(name, FrozenBatchNorm2d, dilated=dilated)
    randomise_norms(theirs)
    ours = ResNetBackbone(name, dilation=dilated)
    ours.body.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours(images, None)[0].features, theirs(images)["out"], atol=1e-4, rtol=1e-4)

    # Gradients are compared in float64: rounding decides which units of a ReLU near zero are on.
    ours.double(), theirs.double()
    images = images.double()
    expected, got = theirs(images)["out"], ours(images, None)[0].features
    torch.testing.assert_close(got, expected)

    seed = torch.randn_like(expected)
    (expected * seed).sum().backward()
    (got * seed).sum().backward()
    trained = [n for n, p in ours.body.named_parameters() if p.requires_grad]
    assert trained
    for name in trained:
        reference = theirs.get_parameter(name).grad
        torch.testing.assert_close(ours.body.get_parameter(name).grad, reference, msg=name)


def test_trained_norm_is_torchvisions_batch_norm() -> None:
    torch.manual_seed(0)
    theirs = torchvision_body("resnet18", nn.BatchNorm2d)
    ours = ResNetBackbone("resnet18", norm="batch")
    ours.body.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(ours(images, None)[0].features, theirs(images)["out"])
    assert all(parameter.requires_grad for parameter in ours.parameters())
    torch.testing.assert_close(ours.body.bn1.running_mean, theirs.bn1.running_mean)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(images, None)[0].features, theirs(images)["out"])


@pytest.mark.parametrize(
    ("name", "stride", "dilation", "channels", "cells"),
    [
        ("resnet18", 32, False, 512, 2),
        ("resnet18", 16, False, 256, 4),
        ("resnet18", 8, False, 128, 8),
        ("resnet50", 32, True, 2048, 4),
        ("resnet50", 16, False, 1024, 4),
        ("resnet50", 16, True, 1024, 8),
        ("resnet50", 8, False, 512, 8),
    ],
)
def test_cut_and_dilation_decide_the_feature_map(
    name: str, stride: int, dilation: bool, channels: int, cells: int
) -> None:
    backbone = ResNetBackbone(name, strides=(stride,), dilation=dilation)
    ((features, mask, cell),) = backbone(torch.zeros(1, 3, 64, 64), None)
    assert backbone.channels == (channels,) and backbone.strides == (cell,) == (64 // cells,)
    assert features.shape == (1, channels, cells, cells)
    assert mask is None


def test_several_levels_are_the_same_maps_with_the_mask_at_each_resolution() -> None:
    torch.manual_seed(0)
    several = ResNetBackbone("resnet18", strides=(8, 16, 32)).eval()
    images, mask = torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool)
    mask[:, :, 48:] = True
    levels = several(images, mask)
    assert [level.stride for level in levels] == list(several.strides) == [8, 16, 32]
    for level, channels, stride in zip(levels, several.channels, (8, 16, 32), strict=True):
        one = ResNetBackbone("resnet18", strides=(stride,)).eval()
        one.load_state_dict({name: several.state_dict()[name] for name in one.state_dict()})
        assert torch.equal(level.features, one(images, mask)[0].features)
        assert level.features.shape == (1, channels, 64 // stride, 96 // stride)
        assert torch.equal(level.padding, shrink_mask(mask, 64 // stride, 96 // stride))


def test_nothing_is_kept_behind_the_cut() -> None:
    def stages(stride: int) -> set[str]:
        return {name.split(".")[0] for name in ResNetBackbone("resnet18", strides=(stride,)).body.state_dict()}

    assert stages(32) == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    assert stages(16) == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    assert stages(8) == {"conv1", "bn1", "layer1", "layer2"}


def test_dilation_changes_no_name_and_no_shape() -> None:
    plain, dilated = ResNetBackbone("resnet50").state_dict(), ResNetBackbone("resnet50", dilation=True).state_dict()
    assert {name: value.shape for name, value in plain.items()} == {
        name: value.shape for name, value in dilated.items()
    }


def test_stem_and_first_stage_neither_train_nor_record() -> None:
    body = ResNetBackbone("resnet18").body
    trained = {name.split(".")[0] for name, parameter in body.named_parameters() if parameter.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    recorded = []
    body.get_submodule("layer2.0").register_forward_pre_hook(lambda _, args: recorded.append(args[0].requires_grad))
    body.get_submodule("layer2.1").register_forward_pre_hook(lambda _, args: recorded.append(args[0].requires_grad))
    body(torch.zeros(1, 3, 64, 64))
    assert recorded == [False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet152"}, "no backbone named 'resnet152'.*resnet101"),
        ({"name": "resnet18", "dilation": True}, "resnet18.*cannot dilate.*resnet50"),
        ({"name": "resnet50", "strides": (64,)}, r"some of 4, 8, 16 and 32, ascending, not \[64\]"),
        ({"name": "resnet50", "strides": (32, 16)}, r"ascending, not \[32, 16\]"),
        ({"name": "resnet50", "strides": ()}, r"ascending, not \[\]"),
        ({"name": "resnet50", "norm": "sync"}, "'frozen' or 'batch', not 'sync'"),
    ],
)
def test_what_does_not_exist_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNetBackbone(**arguments)


def test_mask_is_read_at_each_cells_corner() -> None:
    mask = torch.ones(2, 64, 100, dtype=torch.bool)
    mask[0, :33, :50] = False
    mask[1, :, :] = False
    small = shrink_mask(mask, 2, 4)
    assert (~small[0]).tolist() == [[True, True, False, False], [True, True, False, False]]
    assert not small[1].any()


def test_every_image_keeps_a_cell() -> None:
    small = shrink_mask(torch.ones(2, 64, 64, dtype=torch.bool), 2, 2)
    assert (~small).flatten(1).sum(1).tolist() == [1, 1]


def test_mask_is_read_where_interpolation_reads_it() -> None:
    """To the last rounding: the stripes of all widths in a column tell which column was read."""
    for width in (32, 97, 333, 500, 801, 1066, 1333):
        columns = torch.arange(width)
        stripes = torch.stack([(columns >> bit) % 2 == 1 for bit in range(11)])[:, None, :].repeat(1, 3, 1)
        for cells in {-(-width // 32), -(-width // 16), -(-width // 8), width // 5, width}:
            expected = nn.functional.interpolate(stripes[:, None].float(), size=(3, cells))[:, 0].bool()
            expected[:, 0, 0] = False
            assert torch.equal(shrink_mask(stripes, 3, cells), expected), (width, cells)
            assert torch.equal(shrink_mask(stripes.mT, cells, 3), expected.mT)


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_images_one_cell_wide_give_in_bf16_what_they_give_in_fp32(norm: str) -> None:
    """With AMX, torch's own convolution gives NaN, or something else, for the last map."""
    torch.manual_seed(0)
    keys = [f"model.backbone_norm={norm}", "model.backbone=resnet18", "model.backbone_weights=none"]
    backbone = build_backbone(load_config(None, keys).model, (8, 16, 32)).to(memory_format=torch.channels_last).eval()
    images = torch.randn(2, 3, 128, 32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = backbone(images, None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = backbone(images, None)
    for one, other in zip(exact, found, strict=True):
        assert (one[0] - other[0].float()).norm() < 0.03 * one[0].norm()
