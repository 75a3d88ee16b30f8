"""Keys of the section `model`, seen in the model that a job builds and in what it gives."""

from __future__ import annotations

import pytest
import torch
from config_keys.registry import Place, same_weights, shows
from torch import nn
from torchvision.models import resnet18

from detr_ray.architectures import ARCHITECTURES
from detr_ray.config import ModelConfig
from detr_ray.loss import SetCriterion
from detr_ray.model.detr import Detr
from detr_ray.structures import ModelOutput


def output(model: Detr, *, train: bool = False, size: tuple[int, int] = (64, 96)) -> ModelOutput:
    torch.manual_seed(0)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        return model.train(train)(images, None)


def with_weights_of(model: Detr, other: Detr) -> Detr:
    model.load_state_dict(other.state_dict())
    return model


def blocks(model: Detr) -> list[int]:
    return [len(stage) for name, stage in model.body.named_children() if name.startswith("layer")]


def cells(model: Detr) -> int:
    """Cells of the feature map of an image of 64 by 96 pixels."""
    seen = []
    hook = model.input_proj.register_forward_hook(lambda module, inputs, found: seen.append(found.shape[2:]))
    output(model)
    hook.remove()
    return int(seen[0][0] * seen[0][1])


@shows("model.architecture")
def architecture(place: Place) -> None:
    """An architecture is what its line says: a second one needs nothing else."""
    assert type(place.model("model.architecture=detr")).__name__ == "Detr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "detr", f"{__name__}:another_architecture")
        assert place.model().found_by == "its line"


def another_architecture(section: ModelConfig, num_classes: int) -> Detr:
    model = Detr.from_config(section, num_classes)
    model.found_by = "its line"  # type: ignore[assignment]
    return model


WHOLE = ("model.backbone_norm=batch", "model.backbone_stride=32")


@shows("model.backbone")
def backbone(place: Place) -> None:
    found = {
        name: blocks(place.model(f"model.backbone={name}", *WHOLE)) for name in ("resnet18", "resnet34", "resnet50")
    }
    assert found == {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3], "resnet50": [3, 4, 6, 3]}
    assert place.model("model.backbone=resnet50", *WHOLE).input_proj.in_channels == 2048


@shows("model.backbone_norm")
def backbone_norm(place: Place) -> None:
    torch.save(resnet18().state_dict(), place.folder / "resnet18.pt")
    weights = f"model.backbone_weights={place.folder}/resnet18.pt"
    trained = {
        norm: {n for n, p in place.model(f"model.backbone_norm={norm}", weights).named_parameters() if p.requires_grad}
        for norm in ("frozen", "batch")
    }
    assert not any("bn" in name or "body.conv1" in name for name in trained["frozen"])
    assert any("bn1.weight" in name for name in trained["batch"]) and trained["frozen"] < trained["batch"]


@shows("model.backbone_stride")
def backbone_stride(place: Place) -> None:
    assert [cells(place.model(f"model.backbone_stride={stride}")) for stride in (8, 16, 32)] == [96, 24, 6]


@shows("model.backbone_weights")
def backbone_weights(place: Place) -> None:
    torch.manual_seed(5)
    weights = resnet18().state_dict()
    torch.save(weights, place.folder / "resnet18.pt")
    model = place.model(f"model.backbone_weights={place.folder}/resnet18.pt")
    assert torch.equal(model.body.get_parameter("conv1.weight"), weights["conv1.weight"])
    assert not torch.equal(place.model().body.get_parameter("conv1.weight"), weights["conv1.weight"])


@shows("model.dilation")
def dilation(place: Place) -> None:
    keys = ("model.backbone=resnet50", *WHOLE)
    assert cells(place.model(*keys)) == 6 and cells(place.model(*keys, "model.dilation=true")) == 24


@shows("model.position_embedding")
def position_embedding(place: Place) -> None:
    learned, sine = (place.model(f"model.position_embedding={kind}") for kind in ("learned", "sine"))
    assert set(learned.state_dict()) - set(sine.state_dict()) == {
        "backbone.1.row_embed.weight", "backbone.1.col_embed.weight",
    }  # fmt: skip


@shows("model.hidden_dim")
def hidden_dim(place: Place) -> None:
    assert place.model("model.hidden_dim=24").query_embed.embedding_dim == 24


@shows("model.num_heads")
def num_heads(place: Place) -> None:
    """The same weights give something else when they are cut into other heads."""
    two = place.model("model.num_heads=2")
    four = with_weights_of(place.model("model.num_heads=4"), two)
    assert not torch.allclose(output(two)["pred_logits"], output(four)["pred_logits"])


@shows("model.dim_feedforward")
def dim_feedforward(place: Place) -> None:
    state = place.model("model.dim_feedforward=40").state_dict()
    assert {len(value) for name, value in state.items() if name.endswith("linear1.weight")} == {40}


@shows("model.encoder_layers", "model.decoder_layers")
def layers(place: Place) -> None:
    model = place.model("model.encoder_layers=3", "model.decoder_layers=4")
    assert (len(model.transformer.encoder.layers), len(model.transformer.decoder.layers)) == (3, 4)
    assert len(output(model)["aux_outputs"]) == 3
    seen = place.train("model.encoder_layers=0", "model.decoder_layers=4", stop_after=1)
    assert len(seen.losses[0].outputs["aux_outputs"]) == 3 and seen.metric("train/loss_ce_2")


@shows("model.dropout")
def dropout(place: Place) -> None:
    """Where it is drawn: ``tests/seams/test_where_dropout_is.py``."""
    seen = [place.train(f"model.dropout={share}", stop_after=1).training[0].output for share in (0, 0.5, 0.5)]
    assert not torch.equal(seen[0]["pred_logits"], seen[1]["pred_logits"])
    assert torch.equal(seen[1]["pred_logits"], seen[2]["pred_logits"])
    model = place.model("model.dropout=0")
    assert not any(module.p for module in model.modules() if isinstance(module, nn.Dropout))


@shows("model.pre_norm")
def pre_norm(place: Place) -> None:
    pre, post = place.model("model.pre_norm=true"), place.model("model.pre_norm=false")
    pre.load_state_dict(post.state_dict(), strict=False)
    assert not torch.allclose(output(pre)["pred_logits"], output(post)["pred_logits"])
    assert set(pre.state_dict()) - set(post.state_dict()) == {
        "transformer.encoder.norm.weight", "transformer.encoder.norm.bias",
    }  # fmt: skip


@shows("model.num_queries")
def num_queries(place: Place) -> None:
    seen = place.train("model.num_queries=11", stop_after=1)
    assert seen.training[0].output["pred_boxes"].shape[1] == 11
    boxes = sum(len(target["labels"]) for target in seen.losses[0].targets)
    assert seen.losses[0].normalisers[1] == pytest.approx(boxes + 0.1 * (4 * 11 - boxes)), "of all queries"


@shows("model.aux_loss")
def aux_loss(place: Place) -> None:
    without = place.train("model.aux_loss=false", stop_after=1)
    assert "aux_outputs" not in without.training[0].output and not without.metric("train/loss_ce_0")
    criterion: SetCriterion = without.loop.criterion
    expected = sum(
        criterion.weights[n] * without.metric(f"train/{n}")[0] for n in ("loss_ce", "loss_bbox", "loss_giou")
    )
    assert without.metric("train/loss")[0] == pytest.approx(expected)
    assert place.train(stop_after=1).metric("train/loss_ce_0")


@shows("model.init_from")
def init_from(place: Place) -> None:
    first = place.train("run.name=first", "optim.lr=1e-2", "train.max_steps=2")
    assert first.result is not None
    path = f"{first.result.run_path}/checkpoints/step_00000002/model.pt"
    model = place.model(f"model.init_from={path}")
    assert same_weights(model, first.models[0]) and not same_weights(model, place.model())
    started = place.train(f"model.init_from={path}", stop_after=1)
    statistics = ("running", "num_batches")
    for name, value in first.models[0].state_dict().items():
        if not any(part in name for part in statistics):
            assert torch.equal(started.training[0].weights[name], value), name
    assert same_weights(place.model(f"model.init_from={first.result.run_path}"), model)
    with pytest.raises(Exception, match=r"model\.init_from: .* is neither a run nor a checkpoint"):
        place.model(f"model.init_from={first.result.run_path}/checkpoints")
    with pytest.raises(Exception, match="there is no file"):
        place.model(f"model.init_from={path}-not-there")


@shows("model.ignore_padding")
def ignore_padding(place: Place) -> None:
    """The part that it plays is in tests/model/test_padding.py."""
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[:, 40:] = True
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 96)
    noise = images.clone()
    noise[:, :, 40:] = 5
    for ignored in (True, False):
        model = place.model(f"model.ignore_padding={str(ignored).lower()}").eval()
        with torch.no_grad():
            same = torch.equal(model(images, mask)["pred_boxes"], model(noise, mask)["pred_boxes"])
        assert same == ignored
