"""Preflight of the first weights: they exist, are readable, and fit the model and the classes."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torchvision.models import get_model_weights

from detr_ray.config import Config
from detr_ray.data.label_map import LabelMap
from detr_ray.detector import build_skeleton
from detr_ray.engine.preflight.findings import Level, Report
from detr_ray.model.weights import WeightsError, load_backbone_weights, load_initial_weights, read_checkpoint

AREA = "weights"
TIMEOUT_S = 5.0
"""How long a server may take to answer."""

# Status codes of servers that refuse HEAD requests; the file may exist all the same.
_NO_ANSWER = (401, 403, 405, 501)


def starts_from_official_weights(config: Config) -> bool:
    """Whether the first weights use COCO's label space. Weights on a server are not downloaded: the answer is a guess.

    False for a file that cannot be read; `check_weights` reports it.
    """
    source = config.model.init_from
    if source is None:
        return False
    readable = _local_file(source)
    if readable is None:
        # Weights on a server are usually the published ones.
        return True
    try:
        return read_checkpoint(readable)["class_names"] is None
    except (WeightsError, OSError):
        return False


def check_weights(config: Config, label_map: LabelMap | None, report: Report) -> None:
    """Checks the first weights. Reads local files; downloads nothing.

    Args:
        config: the configuration.
        label_map: the labels of training; None if unknown: then the head is not checked.
        report: findings are added to it.
    """
    key = "model.backbone_weights" if config.model.init_from is None else "model.init_from"
    given = config.model.init_from or config.model.backbone_weights
    if given == "none":
        report.add("ok", AREA, "the backbone starts from random weights (model.backbone_weights=none)")
        return
    source = get_model_weights(config.model.backbone)["IMAGENET1K_V1"].url if given == "imagenet" else given
    readable = _local_file(source)
    if readable is None:
        _check_server(key, source, report)
        return
    names = (label_map or LabelMap.coco91()).names
    model = build_skeleton(config.model, len(names))
    try:
        if config.model.init_from is None:
            load_backbone_weights(model, readable, config.model.backbone)
            report.add("ok", AREA, f"{key}: {readable} fits {config.model.backbone}")
            return
        if label_map is None:
            read_checkpoint(readable)
            report.add("ok", AREA, f"{key}: {readable} can be read")
            return
        found = load_initial_weights(model, readable, names, LabelMap.coco91().names)
    except (WeightsError, OSError) as error:
        report.add("error", AREA, f"{key}: {error}")
        return
    notes = [f"{name}: {what}" for name, what in found.rebuilt.items()]
    missing = [f"{name}: not in the file, starts from random weights" for name in found.missing]
    report.add(
        "ok", AREA,
        f"{key}: {readable} can be read: {len(found.loaded)} tensors are taken, {len(found.rebuilt)} rebuilt, "
        f"{len(found.missing)} missing, {len(found.unused)} unused", names=notes,
    )  # fmt: skip
    if missing:
        report.add("warning", AREA, f"{key}: {len(missing)} tensors of the model are not in the file", names=missing)


def _local_file(source: str) -> str | None:
    """The local file of a source: itself, or the copy of an earlier download; None if there is none."""
    if urlsplit(source).scheme not in ("http", "https"):
        return source
    kept = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(source).path).name
    return str(kept) if kept.is_file() else None


def _check_server(key: str, url: str, report: Report) -> None:
    """Queries the size of a file on a server."""
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "detr_ray"})
    advice = f"without internet access, download it elsewhere and set {key} to its path"
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            size = response.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        level: Level = "warning" if error.code in _NO_ANSWER else "error"
        report.add(level, AREA, f"{key}: {url}: the server answers {error.code} {error.reason}", advice)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        report.add("error", AREA, f"{key}: {url} cannot be fetched ({reason})", advice)
    else:
        megabytes = f" ({int(size) / 1e6:.0f} MB)" if size is not None and size.isdecimal() else ""
        report.add("ok", AREA, f"{key}: {url} is fetched when training starts{megabytes}; not looked into here")
