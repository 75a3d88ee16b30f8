"""Keys of Deformable DETR, and those of its class loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from config_keys.registry import Place, shows

from detr_ray.config import ConfigError, load_config
from detr_ray.loss.sigmoid_losses import FocalLoss, MatchabilityLoss, VarifocalLoss
from detr_ray.model.deformable_detr import DeformableDetr

DEFORMABLE = ("model.architecture=deformable_detr",)
TWO_STAGE = (*DEFORMABLE, "model.two_stage=true")


def deformable(place: Place, *overrides: str) -> DeformableDetr:
    model: Any = place.model(*DEFORMABLE, *overrides)
    assert isinstance(model, DeformableDetr)
    return model


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, list(overrides))
    return str(caught.value)


@shows("model.position_temperature", "model.position_offset")
def positions(place: Place) -> None:
    for overrides, expected in ((DEFORMABLE, (10000, -0.5)), ((), (10000, 0)), (("model.architecture=dino",), (20, 0))):
        encoding = place.model(*overrides).backbone[1]
        assert (encoding.temperature, encoding.offset) == expected
    encoding = place.model("model.position_temperature=20", "model.position_offset=0.25").backbone[1]
    rows = encoding(torch.zeros(1, 1, 2, 2), None)[0, :, 0, :2]
    assert rows[0, 0] == pytest.approx(float(torch.tensor(1.25 / 2 * 2 * torch.pi).sin()), abs=1e-5)
    assert "needs model.position_embedding=sine" in refused(
        "model.position_embedding=learned", "model.position_temperature=20"
    )


@shows("model.num_feature_levels")
def num_feature_levels(place: Place) -> None:
    model = deformable(place, "model.num_feature_levels=3")
    assert len(model.input_proj) == len(model.transformer.level_embed) == 3
    assert len(deformable(place).input_proj) == 4
    assert "means nothing for model.architecture=detr" in refused("model.num_feature_levels=3")


@shows("model.encoder_points", "model.decoder_points")
def points(place: Place) -> None:
    transformer = deformable(place, "model.encoder_points=2", "model.decoder_points=3").transformer
    assert transformer.encoder.layers[0].self_attn.num_points == 2
    assert transformer.decoder.layers[0].cross_attn.num_points == 3


@shows("model.box_refine", "model.look_forward_twice")
def box_refine(place: Place) -> None:
    refined = deformable(place, "model.box_refine=true", "model.look_forward_twice=true")
    assert len(refined.bbox_embed) == 2 and refined.look_forward_twice
    assert len(deformable(place).bbox_embed) == 1
    assert "needs model.box_refine=true" in refused(*DEFORMABLE, "model.look_forward_twice=true")
    assert "must be true with model.box_refine" in refused(*DEFORMABLE, "model.box_refine=true", "model.aux_loss=false")


@shows("model.two_stage", "model.mixed_query_selection")
def two_stage(place: Place) -> None:
    seen = place.train(*TWO_STAGE, stop_after=1)
    assert "enc_outputs" in seen.training[0].output and seen.metric("train/loss_ce_enc")[0] > 0
    assert "query_embed.weight" not in seen.training[0].weights
    mixed = deformable(place, "model.two_stage=true", "model.mixed_query_selection=true")
    assert mixed.query_embed.num_embeddings == mixed.num_queries
    assert "needs model.two_stage=true" in refused(*DEFORMABLE, "model.mixed_query_selection=true")


@shows("model.one_to_many_queries", "model.one_to_many_copies")
def one_to_many(place: Place) -> None:
    keys = (*TWO_STAGE, "model.one_to_many_queries=7", "model.one_to_many_copies=2")
    seen = place.train(*keys, stop_after=1)
    assert seen.training[0].output["one_to_many_outputs"]["pred_boxes"].shape[1] == 7
    assert seen.metric("train/loss_giou_one2many")[0] > 0
    boxes = sum(len(target["labels"]) for target in seen.losses[0].targets)
    assert seen.losses[0].normalisers[-2:] == (2 * boxes, 2 * boxes)
    unused = refused(*TWO_STAGE, "model.one_to_many_copies=2")
    assert unused.startswith("model.one_to_many_copies: needs model.one_to_many_queries above 0")


@shows("loss.class_loss", "loss.focal_alpha", "loss.focal_gamma")
def class_loss(place: Place) -> None:
    kinds = {"focal": FocalLoss, "vfl": VarifocalLoss, "mal": MatchabilityLoss}
    for kind, expected in kinds.items():
        found = place.job(*DEFORMABLE, f"loss.class_loss={kind}").build_detector().criterion.class_loss
        assert type(found) is expected
    chosen = place.job(*DEFORMABLE, "loss.focal_alpha=0.4", "loss.focal_gamma=3").build_detector().criterion.class_loss
    assert (chosen.alpha, chosen.gamma) == (0.4, 3)
    assert "must be softmax for detr" in refused("loss.class_loss=focal")
    assert "must be focal, vfl or mal" in refused(*DEFORMABLE, "loss.class_loss=softmax")
    assert "means nothing for focal" in refused(*DEFORMABLE, "loss.eos_coef=0.2")
    assert "means nothing for softmax" in refused("loss.focal_alpha=0.3")
    assert "means nothing for mal" in refused(*DEFORMABLE, "loss.class_loss=mal", "loss.focal_alpha=0.3")
