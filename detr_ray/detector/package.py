"""A model package: a folder with everything that is needed to use a model, and no code.

    weights.safetensors    the weights for use: the averaged ones, if there are any
    model.json             the description of the model: `PackageRecord`

Registries, servers and exports use packages. ``model.json`` has the SHA-256 of each other file; a file with another
hash is refused, and files that are not listed are not read. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import safetensors
import safetensors.torch
from pydantic import BaseModel, ConfigDict, ValidationError

from detr_ray import __version__
from detr_ray.addresses import LocationError, join, name_of, parent
from detr_ray.callbacks import Say
from detr_ray.config import Config
from detr_ray.config.addresses import refuse_credentials
from detr_ray.data.errors import DataError
from detr_ray.data.label_map import LabelMap
from detr_ray.detector import build_skeleton
from detr_ray.detector.artifact import SavedModel, read_saved_model, stored_config
from detr_ray.locations import make_folder, read_buffer, write_bytes
from detr_ray.model.checkpoint_file import changed
from detr_ray.model.state_dicts import OWN_FORMAT, DamagedFileError, WeightsError
from detr_ray.model.weights import whole_state
from detr_ray.retries import reason_of

PACKAGE_FILE = "model.json"
WEIGHTS_FILE = "weights.safetensors"
FORMAT_VERSION = 1

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class ImageSizes:
    """Sizes in pixels of the images that a model was trained and evaluated on.

    Attributes:
        short_side: length of the short side in evaluation, and so in prediction.
        long_side: longest allowed long side in evaluation.
        trained_short_sides: lengths of the short side in training.
        trained_long_side: longest allowed long side in training.
    """

    short_side: int
    long_side: int
    trained_short_sides: tuple[int, ...]
    trained_long_side: int

    @classmethod
    def of(cls, config: Config) -> ImageSizes:
        """The sizes that a configuration asks for."""
        augment = config.data.augment
        return cls(config.eval.size, config.eval.max_size, tuple(augment.scales), augment.max_size)


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model: where it comes from, and how good it is.

    Attributes:
        code_version: version of this program that trained the model; empty if unknown.
        evaluation: ``metrics``, the numbers of its evaluation by name (``val/AP``), and ``measured_on``, data and
            settings of the evaluation; empty if it was not evaluated.
        scores: the quality of its scores, see `detr_ray.evaluation.score_quality`; None if it was not measured.
        origin: where it comes from, as its writer noted it: run, checkpoint, fingerprints of data, commit of the code.
    """

    code_version: str = ""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)


class PackageRecord(BaseModel):
    """The content of ``model.json``."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    format: Literal["detr_ray model package"]
    format_version: int
    code_version: str
    step: int | None
    is_averaged: bool
    label_map: dict[str, list[Any]]
    config: dict[str, Any]
    sizes: dict[str, Any]
    evaluation: dict[str, Any]
    scores: dict[str, Any] | None
    origin: dict[str, Any]
    files: dict[str, str]


@dataclass(frozen=True)
class ModelPackage:
    """A package that was read.

    Attributes:
        saved: its model.
        facts: what it says about the model.
    """

    saved: SavedModel
    facts: ModelFacts


def write_package(folder: str, saved: SavedModel, facts: ModelFacts = ModelFacts()) -> PackageRecord:
    """Writes a package, ``model.json`` last: a folder with this file is complete.

    Args:
        folder: path or URI; files of these names in it are replaced.
        saved: the model, with its labels and its configuration.
        facts: facts about it.

    Raises:
        ValueError: the model has no labels or no configuration. For weights of other programs, set them:
            ``dataclasses.replace(saved, label_map=..., config=...)``.
        WeightsError: the weights are not those of the configuration's model.
        ConfigError: the configuration holds credentials.
        OSError: it could not be written.
    """
    if saved.label_map is None or saved.config is None:
        raise ValueError(f"{saved.source} does not say its labels and its configuration, which a package needs")
    refuse_credentials(saved.config.to_dict())
    weights = packed_weights(saved)
    record = PackageRecord(
        format="detr_ray model package",
        format_version=FORMAT_VERSION,
        code_version=facts.code_version,
        step=saved.step,
        is_averaged=saved.is_averaged,
        label_map=saved.label_map.to_dict(),
        config=saved.config.to_dict(),
        sizes=_described(ImageSizes.of(saved.config)),
        evaluation=dict(facts.evaluation),
        scores=None if facts.scores is None else dict(facts.scores),
        origin=dict(facts.origin),
        files={WEIGHTS_FILE: hashlib.sha256(weights).hexdigest()},
    )
    make_folder(folder)
    write_bytes(join(folder, WEIGHTS_FILE), weights)
    write_bytes(join(folder, PACKAGE_FILE), (json.dumps(record.model_dump(), indent=1) + "\n").encode())
    return record


def packed_weights(saved: SavedModel) -> bytes:
    """The content of ``weights.safetensors`` for a model with labels and configuration.

    Raises:
        WeightsError: the weights are not those of the configuration's model.
    """
    assert saved.label_map is not None and saved.config is not None
    skeleton = build_skeleton(saved.config.model, saved.label_map.num_classes)
    state = whole_state(skeleton, saved.weights_for(skeleton), saved.source)
    # Copies: safetensors does not write tensors that share memory.
    return safetensors.torch.save({name: value.detach().contiguous().clone() for name, value in state.items()})


def read_package(folder: str, say: Say = lambda line: None) -> ModelPackage:
    """Reads a package.

    Args:
        folder: path or URI.
        say: shows a line about keys of the configuration that this version does not know.

    Raises:
        WeightsError: a file is missing, damaged, or not the one that was recorded.
        ConfigError: the configuration is none for this version.
    """
    record = _read_record(folder)
    contents = {name: _content(folder, name, sha256) for name, sha256 in record.files.items()}
    place = join(folder, WEIGHTS_FILE)
    try:
        state = safetensors.torch.load(contents[WEIGHTS_FILE])
    except (safetensors.SafetensorError, ValueError) as error:
        raise DamagedFileError(f"{place} is no safetensors file: {error}") from error
    try:
        label_map = LabelMap.from_dict(record.label_map)
    except (DataError, KeyError, TypeError) as error:
        raise WeightsError(f"{join(folder, PACKAGE_FILE)} is damaged: label_map: {error}") from error
    checkpoint = {
        "format": OWN_FORMAT,
        "model": state,
        "ema": None,
        "class_names": list(label_map.names),
        "label_map": record.label_map,
        "config": record.config,
        "step": record.step,
    }
    saved = SavedModel(
        source=folder,
        label_map=label_map,
        config=stored_config(record.config, folder, say),
        is_averaged=record.is_averaged,
        step=record.step,
        checkpoint=checkpoint,
    )
    return ModelPackage(saved, ModelFacts(record.code_version, record.evaluation, record.scores, record.origin))


def read_model(source: str, say: Say, sha256: str | None = None) -> SavedModel:
    """Reads a package if the source ends in ``model.json``, otherwise a model file.

    Args:
        source: path, address or URL.
        say: see `read_package`.
        sha256: of a model file's content, where it was recorded.

    Raises:
        WeightsError: it cannot be fetched, is damaged, or was changed.
        ConfigError: its configuration is none for this version.
    """
    folder = package_of(source)
    return read_saved_model(source, say, sha256) if folder is None else read_package(folder, say).saved


def package_of(source: str) -> str | None:
    """The folder of a package, from the location of its ``model.json``; None for other locations."""
    return parent(source) if name_of(source) == PACKAGE_FILE else None


def _read_record(folder: str) -> PackageRecord:
    place = join(folder, PACKAGE_FILE)
    data = _read(place)
    try:
        values = json.loads(data)
    except ValueError as error:
        raise DamagedFileError(f"{place} is damaged: no JSON: {error}") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise WeightsError(
            f"{place} has format version {version}, and this version of detr_ray ({__version__}) reads "
            f"{FORMAT_VERSION} at most: it was written by a newer one"
        )
    try:
        record = PackageRecord.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "its content"
        raise WeightsError(f"{place} is no record of a model package: {key}: {first['msg']}") from error
    odd = [name for name in record.files if not _PLAIN_NAME.fullmatch(name)]
    if odd:
        raise WeightsError(f"{place} is damaged: files: {odd[0]!r} is no plain name of a file beside it")
    if WEIGHTS_FILE not in record.files:
        raise WeightsError(f"{place} is damaged: files: there is no {WEIGHTS_FILE}")
    return record


def _content(folder: str, name: str, sha256: str) -> bytes:
    place = join(folder, name)
    data = _read(place)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise changed(place)
    return data


def _read(place: str) -> bytes:
    try:
        return read_buffer(place).to_pybytes()
    except FileNotFoundError as error:
        raise DamagedFileError(f"{place} is missing: the model package is not whole; copy it again") from error
    except (OSError, LocationError) as error:
        raise WeightsError(f"{place} cannot be read: {reason_of(error)}") from error


def _described(sizes: ImageSizes) -> dict[str, Any]:
    return {
        "evaluated": {"short_side": sizes.short_side, "long_side": sizes.long_side},
        "trained": {"short_sides": list(sizes.trained_short_sides), "long_side": sizes.trained_long_side},
    }
