"""First weights of a model: ImageNet backbones, published DETR checkpoints, or this project's own.

Knows parameter names and the rows of the classifier; the classes of the rows come from the caller or the file. Resuming
a run, with its optimizer, is not done here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torchvision.models import get_model_weights

from detr_ray.model.backbones.resnet import resnets_with
from detr_ray.model.checkpoint_file import read_checkpoint
from detr_ray.model.detection_model import DetectionModel, WeightNames
from detr_ray.model.published import missing_counters, under_own_names
from detr_ray.model.state_dicts import StateDict, WeightsError, is_counter, shorten_names, without_prefix
from detr_ray.printable import printable

PUBLISHED_ROWS = (91, 250)
"""Classes of the published weights: COCO's 91 ids, alone or followed by those of the panoptic ones."""

_NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_NAMES_SHOWN = 6


@dataclass(frozen=True)
class InitReport:
    """What was done with each tensor when a model was started from a file's weights.

    Attributes:
        source: the file.
        weights: "model", or "ema" where the file holds averaged weights, which are then preferred.
        loaded: names of the model taken over whole.
        rebuilt: names of the model whose shape differs from the file's -> the part that was kept.
        missing: names of the model that are not in the file; their values do not change.
        unused: names of the file that are not in the model.
    """

    source: str
    weights: str
    loaded: tuple[str, ...]
    rebuilt: Mapping[str, str]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def table(self) -> str:
        """The report as lines of text: a count and the names of each kind; many names are shortened to prefixes."""
        averaged = " (averaged weights)" if self.weights == "ema" else ""
        lines = [f"weights from {self.source}{averaged}"]
        for kind in ("loaded", "missing", "unused"):
            names: tuple[str, ...] = getattr(self, kind)
            lines.append(f"  {kind:<8}{len(names):>5}  {shorten_names(names)}".rstrip())
        lines.insert(2, f"  {'rebuilt':<8}{len(self.rebuilt):>5}")
        lines[3:3] = [f"{'':17}{printable(f'{name}: {what}')}" for name, what in self.rebuilt.items()]
        return "\n".join(lines)


def load_backbone_weights(model: DetectionModel, source: str, backbone: str) -> None:
    """Loads a classifier's weights into the model's ResNet; every tensor of the ResNet must be there.

    Args:
        model: the model to change.
        source: "imagenet" (torchvision's first ImageNet weights, which the original starts from), "none", or path or
            URL of a torchvision ResNet state dict. Its classifier and the stages behind the model's cut are left out.
        backbone: the ResNet's name, for "imagenet".

    Raises:
        WeightsError: the file cannot be fetched or read, or is of another network.
    """
    if source == "none":
        return
    if source == "imagenet":
        source = get_model_weights(backbone)["IMAGENET1K_V1"].url
    checkpoint = read_checkpoint(source)
    own = model.body.state_dict()
    stored = checkpoint["ema"] if checkpoint.get("ema") is not None else checkpoint["model"]
    state = without_prefix(stored, own, source).tensors
    wanted = [name for name in own if name in state or not is_counter(name)]
    missing = [name for name in wanted if name not in state]
    if any(model.weight_names.backbone in name for name in stored):
        raise WeightsError(f"{source} is no {backbone}: it holds DETR weights, which model.init_from takes")
    if missing:
        raise WeightsError(f"{source} is no {backbone}; it lacks {shorten_names(missing)}")
    kept = {name.split(".")[0] for name in own}
    strangers = [name for name in state if name.split(".")[0] in kept and name not in own and not is_counter(name)]
    if strangers:
        raise WeightsError(f"{source} is no {backbone}: it has more, {shorten_names(strangers)}")
    _refuse_other_shapes(source, {name: (state[name], own[name]) for name in wanted}, "is model.backbone the same?")
    _refuse_unusable_values(source, {name: state[name] for name in wanted})
    with torch.no_grad():
        for name in wanted:
            own[name].copy_(state[name])


def load_initial_weights(
    model: DetectionModel,
    source: str,
    class_names: Sequence[str | None],
    coco91_names: Sequence[str | None] | None = None,
) -> InitReport:
    """Starts a model from another model's weights, as far as they fit.

    The classifier may be for other classes: rows of classes with the same name are copied, and the no-object row, too.
    There may be fewer queries, or more, whose additional rows stay random. The projection after another backbone's last
    stage stays random. The backbone itself must be complete: frozen layers would stay random, and stages without some
    of their layers give other features. Any other difference in shape is a mistake in the config, and an error.

    Args:
        model: the model to change; tensors that are not in the file do not change.
        source: path or URL, as ``read_checkpoint`` takes it. Averaged weights are preferred where there are any.
        class_names: the model's classes, one a row without no-object; None where a row has no class.
        coco91_names: names of the 91 official ids, for official files, which do not name their classes. The panoptic
            ones start with the same 91.

    Raises:
        WeightsError: the file cannot be fetched or read, has weights of another model or backbone, or its shapes do not
            fit.
    """
    assert len(class_names) == model.num_classes, "one name a class"
    checkpoint = read_checkpoint(source)
    weights = "model" if checkpoint.get("ema") is None else "ema"
    own = model.state_dict()
    found = find_detector(checkpoint, model, source)
    state = found.tensors
    used = [name for name in own if name in state]
    names, rows = model.weight_names, _Rows((), "")
    old_classes = names.classes_in(state)
    if old_classes is not None:
        old_names = _class_names_of(source, checkpoint["class_names"], old_classes, coco91_names)
        rows = _matching_rows(old_names, class_names, old_classes, names.has_no_object)
    parts = {name: _fitting_part(names, name, state[name], own[name], rows) for name in used}
    _refuse_other_shapes(
        source,
        {name: (state[name], own[name]) for name, part in parts.items() if part is None},
        "are model.hidden_dim, dim_feedforward, backbone and position_embedding the same?",
    )
    _refuse_other_backbone(source, model.weight_names.backbone, own, state)
    _refuse_unusable_values(source, {name: state[name] for name in used})
    fitting = {name: part for name, part in parts.items() if part is not None}
    with torch.no_grad():
        for name, part in fitting.items():
            own[name][part.where] = part.values.to(own[name])
    return InitReport(
        source=source,
        weights=weights,
        loaded=tuple(name for name, part in fitting.items() if not part.note),
        rebuilt={name: part.note for name, part in fitting.items() if part.note},
        missing=tuple(name for name in own if name not in state and not is_counter(name)),
        unused=tuple(
            name
            for name in [*(found.prefix + name for name in state if name not in own), *found.beside]
            if not is_counter(name)
        ),
    )


def find_detector(checkpoint: Mapping[str, Any], model: DetectionModel, source: str) -> StateDict:
    """The detector's weights in what `read_checkpoint` gave; averaged ones where there are any.

    Args:
        checkpoint: the file's content.
        model: the model that they are for; only its names count.
        source: the file, for messages.

    Raises:
        WeightsError: they are not of such a detector, or there are several.
    """
    stored = checkpoint["ema"] if checkpoint.get("ema") is not None else checkpoint["model"]
    names, own_names = model.weight_names, list(model.state_dict())
    found = without_prefix(stored, own_names, source)
    found = replace(found, tensors=under_own_names(model, found.tensors, source))
    if not any(name in found.tensors and name.startswith(names.signs) for name in own_names):
        raise WeightsError(
            f"{source} holds no DETR weights, only {shorten_names(list(stored))}; "
            "a ResNet's weights go into model.backbone_weights"
        )
    for head in names.class_heads:
        bias, weight = (found.tensors.get(f"{head}.{kind}") for kind in ("bias", "weight"))
        if bias is not None and (bias.dim() != 1 or len(bias) < 2 or weight is None or weight.shape[:1] != bias.shape):
            raise WeightsError(f"{source} is damaged: {head}.bias and {head}.weight are no head of a classifier")
    return found


def whole_state(model: DetectionModel, found: StateDict, source: str) -> dict[str, Tensor]:
    """All weights of a model, to use it as it was trained; none may be missing.

    Args:
        model: the model; only its names and shapes count.
        found: weights, as `find_detector` gave them. What is beside the detector in the file is left out.
        source: the file, for messages.

    Raises:
        WeightsError: they are of another model, or not usable.
    """
    own, state = model.state_dict(), found.tensors
    parts = {name.split(".")[0] for name in own}
    missing = [name for name in own if name not in state and not is_counter(name)]
    strangers = [name for name in state if name not in own and name.split(".")[0] in parts and not is_counter(name)]
    _refuse_other_shapes(
        source,
        {name: (state[name], own[name]) for name in own if name in state},
        "is the model section the one that the weights were trained with?",
    )
    _refuse_other_backbone(source, model.weight_names.backbone, own, state)
    for names, what in ((missing, "it lacks"), (strangers, "it has more,")):
        if names:
            raise WeightsError(f"{source} does not fit the model section: {what} {shorten_names(names)}")
    used = {name: state[name] for name in own if name in state}
    _refuse_unusable_values(source, used)
    return used | missing_counters(model, used)


@dataclass(frozen=True)
class _Part:
    """The part of a tensor that is copied.

    Attributes:
        where: index of the rows in the model's tensor; ``...`` for all of it.
        values: the new values.
        note: text for the report; empty if the whole tensor is copied.
    """

    where: EllipsisType | slice | list[int]
    values: Tensor
    note: str


@dataclass(frozen=True)
class _Rows:
    """Pairs (row here, row in the file) with the same class; ``note`` if some rows stay random."""

    pairs: tuple[tuple[int, int], ...]
    note: str


def _fitting_part(names: WeightNames, name: str, value: Tensor, target: Tensor, rows: _Rows) -> _Part | None:
    """The part of the file's ``value`` that fits the model's ``target``; None if the shapes do not fit."""
    if names.is_class_row(name) and value.shape[1:] == target.shape[1:]:
        return _Part([here for here, _ in rows.pairs], value[[there for _, there in rows.pairs]], rows.note)
    if name in names.class_tables and value.shape[1:] == target.shape[1:]:
        pairs = [*rows.pairs, (len(target) - 1, len(value) - 1)]
        return _Part([here for here, _ in pairs], value[[there for _, there in pairs]], rows.note)
    if value.shape == target.shape:
        return _Part(..., value, "")
    if name.rpartition(".")[0] in names.object_heads and value.shape[1:] == target.shape[1:]:
        return _Part(
            slice(1), value[:1], "the row that says whether there is an object copied, the others are not used"
        )
    if name in names.query_tables and value.shape[1:] == target.shape[1:]:
        kept = min(len(value), len(target))
        note = f"{kept} of the file's {len(value)} queries copied, {len(target) - kept} fresh"
        return _Part(slice(kept), value[:kept], note)
    if name in names.input_projections and value.shape[0] == target.shape[0]:
        note = f"fresh: the file's backbone gives {value.shape[1]} channels, this one {target.shape[1]}"
        return _Part(slice(0), target[:0], note)
    return None


def _class_names_of(
    source: str, names: Sequence[str | None] | None, rows: int, coco91_names: Sequence[str | None] | None
) -> Sequence[str | None] | None:
    """Names of a file's classifier rows without no-object; None if they are unknown."""
    if names is not None:
        if len(names) != rows:
            raise WeightsError(f"{source} is damaged: its label map names {len(names)} classes, its head has {rows}")
        return names
    if coco91_names is not None and rows in PUBLISHED_ROWS:
        return [*coco91_names, *[None] * (rows - len(coco91_names))]
    return None


def _matching_rows(
    old_names: Sequence[str | None] | None, new_names: Sequence[str | None], old_rows: int, has_no_object: bool
) -> _Rows:
    """The rows of two classifiers with the same class; a row for no-object is the last of each.

    Without names in the file, rows are paired by position if the numbers are equal, and not at all otherwise.
    """
    last = ((len(new_names), old_rows),) if has_no_object else ()
    if old_names is None and old_rows != len(new_names):
        kept = " but for the no-object row" if has_no_object else ""
        return _Rows(last, f"fresh{kept}: the file does not name its classes")
    if old_names is None or list(old_names) == list(new_names):
        return _Rows((*((row, row) for row in range(old_rows)), *last), "")
    old_row_of = {name.casefold(): row for row, name in reversed(list(enumerate(old_names))) if name is not None}
    named = [(row, name) for row, name in enumerate(new_names) if name is not None]
    pairs = [(row, old_row_of[name.casefold()]) for row, name in named if name.casefold() in old_row_of]
    if len(pairs) == len(new_names):
        return _Rows((*pairs, *last), "")
    note = f"{'the no-object row and ' if has_no_object else ''}{len(pairs)} of {len(named)} classes copied by name"
    fresh = [name for _, name in named if name.casefold() not in old_row_of]
    if fresh:
        more = f" and {len(fresh) - _NAMES_SHOWN} more" if len(fresh) > _NAMES_SHOWN else ""
        note += f"; fresh: {', '.join(fresh[:_NAMES_SHOWN])}{more}"
    return _Rows((*pairs, *last), note)


def _refuse_other_shapes(source: str, pairs: Mapping[str, tuple[Tensor, Tensor]], question: str) -> None:
    """Raises where the file's tensor (first of a pair) has another shape than the model's."""
    differing = [
        f"{name} {list(value.shape)} there, {list(target.shape)} here"
        for name, (value, target) in pairs.items()
        if value.shape != target.shape
    ]
    if differing:
        more = f"; and {len(differing) - _NAMES_SHOWN} more" if len(differing) > _NAMES_SHOWN else ""
        raise WeightsError(f"{source} does not fit ({question}): {'; '.join(differing[:_NAMES_SHOWN])}{more}")


def _refuse_other_backbone(source: str, body: str, own: Collection[str], state: Collection[str]) -> None:
    """Raises if a file's backbone lacks layers of the model's, or has more layers in the model's stages.

    Args:
        source: the file, for messages.
        body: what the names of the backbone start with.
        own: the model's names.
        state: the file's names.
    """
    mine, theirs = (
        {name.removeprefix(body) for name in names if name.startswith(body) and not is_counter(name)}
        for names in (own, state)
    )
    kept = {name.split(".")[0] for name in mine}
    missing = sorted(mine - theirs)
    more = sorted(name for name in theirs - mine if name.split(".")[0] in kept)
    if not missing and not more:
        return
    what = f"lacks {shorten_names(missing)}" if missing else f"has more, {shorten_names(more)}"
    names, stride = resnets_with(theirs)
    if names:
        advice = f"set model.backbone={' or '.join(names)} and model.backbone_stride={stride} (or less), as in the file"
    else:
        advice = "take a file that holds the whole detector"
    raise WeightsError(f"{source} does not fit: its backbone is another one, it {what}; {advice}")


def _refuse_unusable_values(source: str, state: Mapping[str, Tensor]) -> None:
    """Raises if weights are not real floating-point numbers, or contain NaN or infinity.

    With NaN or infinity, training would fail at its first step, far from the cause. Whole numbers are quantised
    weights, which are useless without their scales.
    """
    values = {name: value for name, value in state.items() if not is_counter(name)}
    odd = {name: value for name, value in values.items() if not _is_plain(value)}
    if odd:
        value = next(iter(odd.values()))
        kind = str(value.dtype).removeprefix("torch.") if value.layout is torch.strided else str(value.layout)
        raise WeightsError(
            f"{source} holds {shorten_names(list(odd))} as {kind}: weights have to be dense tensors of float32, "
            "float16, bfloat16 or float64; convert them where the file was made"
        )
    bad = [name for name, value in values.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise WeightsError(f"{source} holds NaN or infinity in {shorten_names(bad)}: take an earlier checkpoint")


def _is_plain(value: Tensor) -> bool:
    return value.layout is torch.strided and value.dtype in _NUMBERS and not value.is_quantized and not value.is_meta
