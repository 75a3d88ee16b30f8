"""From a configuration to a job: everything that is decided before the workers start.

Its results are plain values, the opened data, and builders of the parts. It runs on the driver, so that bad input is
refused in seconds; the results are sent to the workers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from detr_ray.callbacks import Say
from detr_ray.config import Config, ConfigError, flatten
from detr_ray.data.errors import DataError
from detr_ray.data.index import DatasetIndex
from detr_ray.data.label_map import LabelMap
from detr_ray.engine.checkpoints.fork import Fork, find_fork
from detr_ray.engine.checkpoints.info import CheckpointInfo
from detr_ray.engine.checkpoints.run_directory import RunDirectory, open_run, read_record
from detr_ray.engine.early_stopping import refuse_unknown_score
from detr_ray.engine.opened_data import OpenedData, open_data
from detr_ray.engine.reporting.tracking_store import check_tracking, run_tracking_uri
from detr_ray.engine.stream.planned_data import PlannedData, refuse_positions_out_of_reach
from detr_ray.printable import counted
from detr_ray.retries import reason_of

if TYPE_CHECKING:  # a driver builds neither, and torchvision's models alone take a second to import
    from detr_ray.detector import Detector


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """A training run, ready to be computed anywhere.

    Attributes:
        data: the data sets, their labels and their plan.
        run: where the run keeps what it makes.
        initial_weights: model state to start from; None for the random one that the seed gives.
        code_version: git commit of the working folder, for the records; empty where there is none.
        tracking_uri: MLflow store of its records. Decided here: on other machines the environment may name another.
        fork: checkpoint of another run that the run begins at; None where it begins anew, or has one of its own.
        parent_run: id of the MLflow run whose child the run's own is; None for no parent.
        gets_report: whether it writes a report; see `JobHooks`.
        hold_evaluated: whether checkpoints that are evaluated are held; see `JobHooks`.
    """

    data: PlannedData
    run: RunDirectory
    initial_weights: dict[str, torch.Tensor] | None
    code_version: str
    tracking_uri: str
    fork: CheckpointInfo | None = None
    parent_run: str | None = None
    gets_report: bool = True
    hold_evaluated: bool = False

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        return self.data.config

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the training set."""
        return self.data.planner.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return total_steps(self.config, self.steps_per_epoch)

    def build_detector(self) -> Detector:
        """The model with its first weights, the same on every worker, and its loss."""
        from detr_ray.engine.training_step.parameters import freeze, group_rates

        detector = _first_detector(self.config, self.data.label_map.num_classes)
        if self.initial_weights is not None:
            detector.model.load_state_dict(self.initial_weights)
        optim = self.config.optim
        freeze(detector.model, group_rates(detector.model, optim), optim.freeze)
        return detector


def label_map_for(space: str, train: DatasetIndex, val: DatasetIndex | None) -> LabelMap:
    """The labels of a training set in one of the two spaces.

    Raises:
        DataError: its categories do not fit the space, or those of the validation set do not fit it.
    """
    label_map = LabelMap.for_space(space, train.categories, train.source)
    if val is not None:
        label_map.check_covers(val.categories, val.source)
    return label_map


def has_coco_categories(index: DatasetIndex) -> bool:
    """Whether all categories of a data set are COCO's, by id and name."""
    try:
        LabelMap.for_space("coco91", index.categories, index.source)
    except DataError:
        return False
    return True


def prepare_job(config: Config, say: Say, opened: OpenedData | None = None) -> TrainJob:
    """Opens the data, the initial weights and the run's directory.

    Args:
        config: what to train.
        say: shows the user a line.
        opened: the data of this configuration where it was opened before (`open_data`).

    Raises:
        ConfigError: the configuration does not fit the data, the storage or an earlier run of that name.
        DataError: the data is not usable.
        WeightsError: the weights to start from cannot be had, or do not fit.
    """
    config.check_training()
    if config.optim.names_parameters:
        from detr_ray.engine.training_step.parameters import refuse_misnamed

        refuse_misnamed(config)
    if config.train.compile and config.data.pad_multiple == 1:
        say(
            "WARNING: train.compile compiles the model anew for each shape that batches have, and data sets of photos "
            "have hundreds of them; set data.pad_multiple, to 64 for example"
        )
    train, val = opened or open_data(config.data, say)
    record = read_record(config.run.name, config.run.storage)
    fork = find_fork(config, record)
    space = choose_label_space(config, train, lambda: _is_official(config.model.init_from), record, fork)
    label_map = label_map_for(space, train, val)
    refuse_unknown_score(config, label_map.names)
    data = PlannedData(config, train, val, label_map)
    steps = total_steps(config, data.planner.steps_per_epoch)  # refuses data that is too little before there is a run
    refuse_positions_out_of_reach(config, config.model, train, val)
    if fork is not None:
        fork.refuse_misfit(config, data.fingerprints, steps)
    check_tracking(config, say)
    opening = functools.partial(
        open_run, config.run.name, config.run.storage, flatten(config), data.fingerprints, config.to_yaml(), space,
        None if fork is None else fork.checkpoint.path, say, record,
    )  # fmt: skip
    # A new run is begun after its weights are read: one begun with weights of a wrong name would refuse the right ones.
    run = None if record is None else opening()
    weights = None
    if fork is None and (run is None or not _has_checkpoint(run)):
        weights = _initial_weights(config, label_map, say)
    run = run or opening()
    return TrainJob(
        data,
        run,
        weights,
        code_version(Path.cwd()),
        run_tracking_uri(config),
        None if fork is None else fork.checkpoint,
    )


def _has_checkpoint(run: RunDirectory) -> bool:
    try:
        return run.checkpoints.latest() is not None
    except OSError as error:
        raise ConfigError(f"run.storage: the checkpoints of {run.path} cannot be listed: {reason_of(error)}") from error


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimizer steps of a whole run."""
    steps = config.train.epochs * steps_per_epoch
    return steps if config.train.max_steps is None else min(steps, config.train.max_steps)


def choose_label_space(
    config: Config,
    train: DatasetIndex,
    is_official: Callable[[], bool],
    record: Mapping[str, Any] | None,
    fork: Fork | None = None,
) -> str:
    """The label space of a run: the recorded one, even if the file of its first weights has changed since then.

    ``auto`` is COCO's 91 ids where published weights meet data with COCO's categories, contiguous otherwise.

    Args:
        config: the configuration.
        train: the training set.
        is_official: whether the first weights are published ones; asked where it matters.
        record: the run's (`read_record`); None if it is new.
        fork: where the run begins, if that is in another run.
    """
    if config.data.label_space != "auto":
        return config.data.label_space
    record = record or (None if fork is None else fork.record)
    if record is not None and record.get("label_space") is not None:
        return record["label_space"]
    if not has_coco_categories(train):
        return "contiguous"
    if record is not None and config.run.name is not None:  # begun by a version that did not record it
        known = _labels_of_last_checkpoint(RunDirectory.at(config.run.name, config.run.storage, record))
        if known is not None:
            return "coco91" if known == LabelMap.coco91() else "contiguous"
    return "coco91" if is_official() else "contiguous"


def _labels_of_last_checkpoint(run: RunDirectory) -> LabelMap | None:
    from detr_ray.detector.artifact import MODEL_FILE, labels_in

    latest = run.checkpoints.latest()
    return None if latest is None else labels_in(run.checkpoints.load(latest, MODEL_FILE))


def _is_official(init_from: str | None) -> bool:
    """Whether weights are published ones, which name no classes."""
    if init_from is None:
        return False
    from detr_ray.engine.checkpoints.found_model import weights_file
    from detr_ray.model.checkpoint_file import read_checkpoint

    return read_checkpoint(weights_file(init_from, "model.init_from"))["class_names"] is None


def _initial_weights(config: Config, label_map: LabelMap, say: Say) -> dict[str, torch.Tensor] | None:
    """The first weights, loaded from a file; None if all of them are random."""
    if config.model.init_from is None and config.model.backbone_weights == "none":
        return None
    from detr_ray.engine.checkpoints.found_model import weights_file
    from detr_ray.model.state_dicts import shorten_names
    from detr_ray.model.weights import load_backbone_weights, load_initial_weights

    model = _first_detector(config, label_map.num_classes).model
    if config.model.init_from is not None:
        source = weights_file(config.model.init_from, "model.init_from")
        report = load_initial_weights(model, source, label_map.names, LabelMap.coco91().names)
        say(report.table())
        if report.missing:
            say(
                f"WARNING: {len(report.missing)} tensors start from random weights, since {report.source} lacks them: "
                f"{shorten_names(report.missing)}. Where that is not meant, set the model section as in the file"
            )
    else:
        load_backbone_weights(model, config.model.backbone_weights, config.model.backbone)
    return model.state_dict()


def _first_detector(config: Config, num_classes: int) -> Detector:
    """The detector with the random weights that the seed gives; torch's own random numbers stay as they were."""
    from detr_ray.detector import build_detector

    with torch.random.fork_rng(devices=[]):  # models are made on the CPU
        torch.default_generator.manual_seed(config.run.seed)
        return build_detector(config.model, config.loss, num_classes)


def code_version(folder: Path) -> str:
    """Git commit of a folder, read from its files (git may not be installed); empty where there is none."""
    for parent in (folder, *folder.parents):
        git = parent / ".git"
        if git.is_file():  # of a further working tree, or a submodule
            git = parent / git.read_text().strip().removeprefix("gitdir: ")
        if (git / "HEAD").is_file():
            return _commit(git)
    return ""


def _commit(git: Path) -> str:
    """The commit that HEAD names; empty before the first one."""
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref: "):
        return head
    branch = head.removeprefix("ref: ")
    common = git / "commondir"
    shared = git / common.read_text().strip() if common.is_file() else git
    if (shared / branch).is_file():
        return (shared / branch).read_text().strip()
    packed = shared / "packed-refs"
    lines = packed.read_text().splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {branch}")), "")


def run_summary(job: TrainJob) -> str:
    """One line about the run, shown before the first step."""
    train = job.config.train
    assert job.data.train is not None
    return (
        f"run {job.run.name}: {job.data.label_map.num_classes} classes, {len(job.data.train)} images"
        + ("" if job.data.repeats is None else f", {job.data.planner.epoch_samples} samples an epoch (data.balance)")
        + f", {counted(job.steps_per_epoch, 'step')} an epoch of {counted(train.global_batch_size, 'image')}, "
        + f"{counted(job.total_steps, 'step')} in all"
    )
