"""Numbers of the published Deformable DETR and DINO for weights that a rule gives: reading them, and the rule itself.

``load_family_golden(shared_data, name)`` reads a case of ``golden_family``; ``family_config(golden)`` is its
configuration; ``load_family_weights(model, golden)`` gives a model its weights under the published names.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detr_ray.config import Config, load_config
from detr_ray.model import DetectionModel, load_published
from detr_ray.structures import Target

LOGITS, BOXES, LOSS, TOTAL, GRADIENT, SCORES = 2e-4, 2e-5, 2e-5, 5e-6, 2e-3, 1e-4
"""Tolerances of the reference numbers; those of losses, their total and gradient norms are relative."""


@dataclass(frozen=True)
class FamilyGolden:
    """One case.

    Attributes:
        described: what the case's JSON file says.
        arrays: inputs and expected numbers by their names in the file.
        targets: one an image.
    """

    described: dict[str, Any]
    arrays: dict[str, Tensor]
    targets: list[Target]

    @property
    def settings(self) -> dict[str, Any]:
        """The case's own configuration, in the words of its file."""
        return self.described["config"]

    @property
    def losses(self) -> dict[str, float]:
        """The values that are losses, under the published names, unweighted."""
        return {
            key.removeprefix("loss/"): float(value)
            for key, value in self.arrays.items()
            if key.startswith(("loss/loss_ce", "loss/loss_bbox", "loss/loss_giou"))
        }


def load_family_golden(shared_data: Path, name: str) -> FamilyGolden:
    """Reads the case ``name``."""
    folder = shared_data / "golden_family"
    described = json.loads((folder / f"{name}.json").read_text())
    described["state_dict"] = dict(described["state_dict"])
    with np.load(folder / f"{name}.npz") as archive:
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files}
    targets = [
        Target(labels=arrays[f"target{i}/labels"], boxes=arrays[f"target{i}/boxes"])
        for i in range(len(arrays["images"]))
    ]
    return FamilyGolden(described, arrays | {"images": arrays["images"].float()}, targets)


def family_config(golden: FamilyGolden, *overrides: str) -> Config:
    """The case's configuration: dropout 0, the rest as its file says."""
    of_file = golden.settings
    names = {
        "num_feature_levels": "num_feature_levels", "hidden_dim": "hidden_dim", "nheads": "num_heads",
        "dim_feedforward": "dim_feedforward", "enc_layers": "encoder_layers", "dec_layers": "decoder_layers",
        "dec_n_points": "decoder_points", "enc_n_points": "encoder_points", "num_queries": "num_queries",
        "with_box_refine": "box_refine", "two_stage": "two_stage", "dn_number": "denoising_queries",
        "dn_label_noise_ratio": "denoising_label_noise", "dn_box_noise_scale": "denoising_box_noise",
    }  # fmt: skip
    architecture = {"deformable": "deformable_detr", "dino": "dino"}[golden.described["family"]]
    given = [f"model.{key}={json.dumps(of_file[name])}" for name, key in names.items() if name in of_file]
    return load_config(None, [f"model.architecture={architecture}", "model.dropout=0", *given, *overrides])


def load_family_weights(model: DetectionModel, golden: FamilyGolden) -> None:
    """Gives a model the weights of the rule, as a published file would."""
    same = golden.described["same_tensor"]
    state = {
        name: family_tensor(same.get(name, name), tuple(shape))
        for name, shape in golden.described["state_dict"].items()
    }
    load_published(model, state)


def family_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """The rule's value of a tensor; ``name`` is the shortest of its names."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(np.asarray(_scaled(name, noise), dtype=np.float32))


def _scaled(name: str, noise: np.ndarray) -> np.ndarray:
    is_class = "class_embed" in name
    if name.endswith("running_var"):
        return 1 + 0.2 * np.abs(noise)
    if name.endswith("running_mean"):
        return 0.1 * noise
    if name.endswith(("query_embed.weight", "tgt_embed.weight", "label_enc.weight")):
        return 2 * noise
    if name.endswith(("level_embed", "sampling_offsets.bias")):
        return noise
    if name.endswith("enc_output.bias"):
        return 0 * noise
    if name.endswith("bias"):
        return 0.5 * noise - 2 if is_class else 0.05 * noise
    if noise.ndim == 1:
        is_late = "layer" in name and name.endswith(("bn2.weight", "bn3.weight"))
        return (1 + 0.1 * noise) * np.float32(0.3 if is_late else 1)
    scale = math.sqrt(1 / math.prod(noise.shape[1:]))
    if noise.ndim == 4:
        noise = noise - noise.mean(axis=1, keepdims=True)
    if name.endswith("sampling_offsets.weight"):
        scale *= 0.5
    elif name.endswith("value_proj.weight") or is_class:
        scale *= 1.5
    elif noise.ndim == 4:
        scale *= math.sqrt(2)
    return noise * np.float32(scale)
