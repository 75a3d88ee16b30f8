"""The original DETR's numbers for weights that a rule gives: reading them, and the rule itself.

``load_golden(shared_data, "small" | "r50")`` reads inputs and expected numbers; ``golden_config(golden)`` is the model
section that the case was made with; ``golden_state_dict(model)`` gives a model's weights by the rule.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detr_ray.structures import Target


@dataclass(frozen=True)
class Golden:
    """One case: what went into the original, and what came out of it.

    Attributes:
        name: "small" (resnet18, hidden 64, 2+3 layers, 12 queries) or "r50" (the default model).
        settings: the case's own configuration, in the words of its file.
        num_classes: classes without no-object.
        images: ``[2, 3, H, W]`` float32.
        mask: ``[2, H, W]`` bool, True on padding.
        targets: of both images; the second has no box.
        pred_logits: ``[2, Q, C+1]``.
        pred_boxes: ``[2, Q, 4]`` cxcywh.
        aux_pred_boxes: of the earlier decoder layers, first layer first.
        matches: (query, target) indices of each image, last layer.
        losses: the criterion's values under the original's keys, unweighted.
        total: their weighted sum (1/5/2 on each layer).
        detections: post-processed for an image of height 480 and width 640.
        grad_norms: gradient norm of every trained parameter after backward of the total.
    """

    name: str
    settings: dict[str, Any]
    num_classes: int
    images: Tensor
    mask: Tensor
    targets: list[Target]
    pred_logits: Tensor
    pred_boxes: Tensor
    aux_pred_boxes: list[Tensor]
    matches: list[tuple[Tensor, Tensor]]
    losses: dict[str, float]
    total: float
    detections: list[dict[str, Tensor]]
    grad_norms: dict[str, float]


def load_golden(shared_data: Path, name: str) -> Golden:
    """Reads the case ``name`` from ``shared_data/golden``."""
    folder = shared_data / "golden"
    described = json.loads((folder / f"{name}.json").read_text())
    with np.load(folder / f"{name}.npz") as archive:
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files}
    images = range(len(arrays["images"]))
    aux_layers = sum(key.startswith("aux") for key in arrays)
    return Golden(
        name=name,
        settings=described["config"],
        num_classes=described["config"]["num_classes"],
        images=arrays["images"],
        mask=arrays["mask"],
        targets=[Target(labels=arrays[f"target{i}/labels"], boxes=arrays[f"target{i}/boxes"]) for i in images],
        pred_logits=arrays["pred_logits"],
        pred_boxes=arrays["pred_boxes"],
        aux_pred_boxes=[arrays[f"aux{layer}/pred_boxes"] for layer in range(aux_layers)],
        matches=[(arrays[f"match{i}/query"], arrays[f"match{i}/target"]) for i in images],
        losses={key.removeprefix("loss/"): float(value) for key, value in arrays.items() if key.startswith("loss/")},
        total=float(arrays["total"]),
        detections=[{key: arrays[f"post{i}/{key}"] for key in ("scores", "labels", "boxes")} for i in images],
        grad_norms=described["grad_norms"],
    )


def model_section(**changes: Any) -> SimpleNamespace:
    """The model section's defaults without weights to fetch, with ``changes``; unknown names are an error."""
    defaults = {
        "backbone": "resnet50",
        "backbone_norm": "frozen",
        "backbone_stride": 32,
        "backbone_weights": "none",
        "dilation": False,
        "position_embedding": "sine",
        "hidden_dim": 256,
        "num_heads": 8,
        "dim_feedforward": 2048,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "dropout": 0.1,
        "pre_norm": False,
        "num_queries": 100,
        "aux_loss": True,
        "init_from": None,
    }
    unknown = changes.keys() - defaults.keys()
    assert not unknown, f"no such key in the model section: {sorted(unknown)}"
    return SimpleNamespace(**(defaults | changes))


def golden_config(golden: Golden) -> SimpleNamespace:
    """The model section of a case: dropout 0, everything else as its file says."""
    settings = golden.settings
    return model_section(
        backbone=settings["backbone"],
        dilation=settings["dilation"],
        position_embedding=settings["position"],
        hidden_dim=settings["hidden_dim"],
        num_heads=settings["nheads"],
        dim_feedforward=settings["dim_feedforward"],
        encoder_layers=settings["enc_layers"],
        decoder_layers=settings["dec_layers"],
        dropout=0.0,
        pre_norm=settings["pre_norm"],
        num_queries=settings["num_queries"],
    )


def golden_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """The rule's value of the weight or buffer ``name``: noise seeded by the name, scaled by the name's kind."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    fan_in = math.prod(shape[1:])
    if name == "query_embed.weight":
        value = 3 * noise
    elif name.endswith("running_var"):
        value = 1 + 0.2 * np.abs(noise)
    elif name.endswith("running_mean"):
        value = 0.1 * noise
    elif name.endswith("bias"):
        value = 0.05 * noise
    elif len(shape) == 1:
        value = 1 + 0.1 * noise
        if "layer" in name and name.endswith(("bn2.weight", "bn3.weight")):
            value = 0.3 * value
    elif name.startswith("input_proj"):
        value = 0.3 * noise * np.sqrt(1 / fan_in)
    elif "attn.in_proj_weight" in name:
        value = 6 * noise * np.sqrt(1 / fan_in)
    elif len(shape) == 4:
        value = noise * np.sqrt(2 / fan_in)
    else:
        value = noise * np.sqrt(1 / fan_in)
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def golden_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """State dict for ``model`` by the rule; load it with ``model.load_state_dict(...)``."""
    return {name: golden_tensor(name, tuple(value.shape)) for name, value in model.state_dict().items()}
