"""The ResNet: torchvision's values, cuts, dilation, norms, and the shrunken mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from detr_ray.model.backbone import Backbone, shrink_mask


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
    ours = Backbone(name, dilation=dilated)
    ours.body.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours(images, None)[0], theirs(images)["out"], atol=1e-4, rtol=1e-4)

    # Gradients are compared in float64: rounding decides which units of a ReLU near zero are on.
    ours.double(), theirs.double()
    images = images.double()
    expected, (got, _) = theirs(images)["out"], ours(images, None)
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
    ours = Backbone("resnet18", norm="batch")
    ours.body.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(ours(images, None)[0], theirs(images)["out"])
    assert all(parameter.requires_grad for parameter in ours.parameters())
    torch.testing.assert_close(ours.body.bn1.running_mean, theirs.bn1.running_mean)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(images, None)[0], theirs(images)["out"])


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
    backbone = Backbone(name, stride=stride, dilation=dilation)
    features, mask = backbone(torch.zeros(1, 3, 64, 64), None)
    assert backbone.num_channels == channels
    assert features.shape == (1, channels, cells, cells)
    assert mask is None


def test_nothing_is_kept_behind_the_cut() -> None:
    def stages(stride: int) -> set[str]:
        return {name.split(".")[0] for name in Backbone("resnet18", stride=stride).body.state_dict()}

    assert stages(32) == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    assert stages(16) == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    assert stages(8) == {"conv1", "bn1", "layer1", "layer2"}


def test_dilation_changes_no_name_and_no_shape() -> None:
    plain, dilated = Backbone("resnet50").state_dict(), Backbone("resnet50", dilation=True).state_dict()
    assert {name: value.shape for name, value in plain.items()} == {
        name: value.shape for name, value in dilated.items()
    }


def test_stem_and_first_stage_neither_train_nor_record() -> None:
    body = Backbone("resnet18").body
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
        ({"name": "resnet50", "stride": 4}, "32, 16 or 8, not 4"),
        ({"name": "resnet50", "norm": "sync"}, "'frozen' or 'batch', not 'sync'"),
    ],
)
def test_what_does_not_exist_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone(**arguments)


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
