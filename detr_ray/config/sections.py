"""All sections of the configuration: keys, types, defaults and meanings.

The docstring under a field is its meaning in ``--help`` and in the documentation. Values that follow from the data
(number of classes, steps an epoch) are no keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field

from detr_ray.architectures import PUBLISHED
from detr_ray.config.addresses import refuse_credentials
from detr_ray.config.data_sections import DataConfig
from detr_ray.config.errors import ConfigError
from detr_ray.config.fields import (
    Count,
    CountOrAuto,
    CountOrRange,
    CountOrZero,
    Name,
    NonNegative,
    Positive,
    Rate,
    RateOrZero,
    Schedule,
    Section,
    Seed,
    Share,
    Text,
    Violation,
    Whole,
)
from detr_ray.config.model_sections import LossConfig, ModelConfig
from detr_ray.config.tune_sections import TuneConfig
from detr_ray.config.yaml_format import format_yaml


class RunConfig(Section):
    """Name of the run, where it is kept, and its seed."""

    name: Name | None = None
    """Name of the run, of letters, digits, `.`, `_` and `-`. An existing run of this name is resumed if its
    configuration agrees. null: a new, unique name."""
    storage: Text = "runs"
    """Folder or URI for checkpoints and all other files of the run."""
    seed: Seed = 42
    """Seed of the first weights, the sample order, the augmentation and dropout."""
    fork_from: Text | None = None
    """Folder or URI of another run (its latest checkpoint) or of a checkpoint in one: this run begins there, with that
    run's weights, moments, step and place in the stream, and with learning rates and loss weights of its own. `optim`,
    `loss` and `train.epochs` may differ, beside what may change when a run goes on. Once this run has a checkpoint, the
    other one is not needed any more."""


class OptimConfig(Section):
    """AdamW and its learning rates. Schedules are stated in epochs."""

    lr: Rate = 1e-4
    """Learning rate of everything but the backbone: a number, or a schedule over epochs such as
    `{points: [[0, 1e-4], [50, 1e-5]], interpolation: cosine}`, which `optim.schedule` is applied to as to a number."""
    lr_backbone: RateOrZero = 1e-5
    """Learning rate of the backbone (and of learned position embeddings, as in the original), in the same forms. 0 is
    the same as `optim.freeze=["backbone.*"]`."""
    freeze: tuple[Text, ...] = ()
    """What does not train: names of parameters or modules, or patterns of them as for file names, such as
    `["backbone.*"]` or `["backbone.0.body.layer[12]", "*.norm"]`. These weights do not change, nothing is computed for
    them in the backward pass, and the optimizer keeps no state for them; modules that are frozen as a whole keep their
    batch norm statistics and have no dropout."""
    lr_factors: dict[Text, Positive] = Field(default={})
    """Factors of the learning rates of parameters whose names contain a text, such as `{sampling_offsets: 0.1,
    reference_points: 0.1}`; the first matching text counts."""
    layer_decay: Annotated[Positive, Field(le=1)] = 1
    """Factor of the learning rate from each layer of the backbone (for a ResNet: its stages, and the stem) to the one
    before: the last layer has `lr_backbone`, the one before it `layer_decay` times that, and so on. 1: all have the
    same rate."""
    weight_decay: NonNegative = 1e-4
    """Weight decay."""
    decay_norms_and_biases: bool = True
    """Whether weight decay also holds for norms and biases, as in the original; false: for matrices and kernels alone.
    """
    clip_max_norm: NonNegative = 0.1
    """Gradients with a larger norm are scaled down to it; 0 turns this off."""
    schedule: Literal["constant", "step", "multistep", "cosine"] = "step"
    """How both learning rates change. `step`: times gamma every `step_epochs`. `multistep`: times gamma at each of
    `milestones`. `cosine`: down to `min_lr_factor` at the end, from the warm-up or from `flat_epochs` on."""
    step_epochs: Positive = 200
    """Epochs between two drops of the schedule `step`."""
    milestones: tuple[Positive, ...] = ()
    """Epochs at which the schedule `multistep` drops."""
    gamma: Annotated[Positive, Field(le=1)] = 0.1
    """Factor of a drop."""
    warmup_epochs: NonNegative = 0
    """Epochs over which the learning rates climb from near 0 at the start."""
    min_lr_factor: Share = 0
    """Factor of the learning rates at the end of the schedule `cosine`."""
    flat_epochs: NonNegative = 0
    """Epochs at the start, those of the warm-up among them, before the schedule `cosine` begins to fall (flat-cosine).
    """
    ema_decay: Annotated[Share, Field(lt=1)] = 0
    """Decay of a moving average of the weights, which is evaluated in place of the weights. 0: no average. Common:
    0.9997."""

    @property
    def names_parameters(self) -> bool:
        """Whether it names parameters, which can only be checked with the model."""
        return bool(self.lr_factors or self.freeze) or self.layer_decay != 1

    def rules(self) -> Iterator[Violation]:
        """Rates must not be 0, except for a backbone that never trains; milestones must ascend."""
        if isinstance(self.lr, Schedule) and self.lr.is_zero:
            yield Violation(("lr",), "must not be 0 at all epochs")
        if isinstance(self.lr_backbone, Schedule) and any(value == 0 for _, value in self.lr_backbone.points):
            yield Violation(("lr_backbone",), "must be 0 at all points, which freezes the backbone, or at none")
        if any(later <= earlier for earlier, later in pairwise(self.milestones)):
            yield Violation(("milestones",), "must ascend")
        if self.schedule == "multistep" and not self.milestones:
            yield Violation(("milestones", "schedule"), "must name at least one epoch for optim.schedule=multistep")
        if self.flat_epochs and self.schedule != "cosine":
            yield Violation(("flat_epochs", "schedule"), f"means nothing for optim.schedule={self.schedule}")


class EarlyStoppingConfig(Section):
    """Ends a training whose score no longer improves. Its run counts as finished."""

    patience: Count = 10
    """Number of validations in a row without a better score, after which the run ends. Schedules follow `train.epochs`
    all the same."""
    min_delta: NonNegative = 0
    """Least rise of the score above the best earlier one, to count as better."""
    metric: Text = "val/AP"
    """Score that is looked at: `val/AP`, `val/AP50`, ... or `val/AP/NAME` for a class."""


class TrainConfig(Section):
    """How long to train, in which batches, on how many workers."""

    epochs: Count = 300
    """Passes over the training images."""
    global_batch_size: Count = 16
    """Images of one optimizer step, over all workers. Each worker gets a share of them; shares need not be equal."""
    micro_batch_size: CountOrAuto | None = None
    """Largest number of images in one forward pass. A worker with a larger share accumulates gradients over several
    passes. Changes memory; results only by padding, and with `model.backbone_norm=batch`. null: the whole share in one
    pass. `auto`: the largest number for which the largest batch of the plan fits into memory, tried out before the
    first step: on a GPU in nine tenths of its free memory, on CPUs in half of the machine's (or the container's), which
    its workers share. A search over CPUs needs a number, or `tune.max_concurrent=1`."""
    num_workers: CountOrRange | None = None
    """Number of training workers. `[least, most]`: as many as the cluster has room for; workers are added and removed
    as nodes come and go, and samples and their order stay the same. null: one for each GPU of the cluster, or one if
    there is no GPU."""
    use_gpu: bool | None = None
    """Train on GPUs. null: if there are any."""
    worker_resource: Text | None = None
    """Custom Ray resource: each worker takes one unit of it, in addition to its GPU or CPU. Keeps workers on the nodes
    that have this resource."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the forward pass; matching and losses stay in fp32. fp16 needs a GPU."""
    launcher: Literal["ray", "local"] = "ray"
    """`ray`: workers on a Ray cluster, which is started on this machine if there is none. `local`: one worker in this
    process, for debugging. Where neither this nor `train.num_workers` is set and no cluster is named, `evaluate`,
    `show` and `predict` do up to 200 images in their own process."""
    checkpoint_every_steps: Count | None = None
    """Optimizer steps between two checkpoints, also in the middle of an epoch. null: only at ends of epochs: with each
    validation, and otherwise after at least 100 steps."""
    keep_last: Count = 2
    """Number of newest checkpoints that are kept, in addition to the best."""
    max_failures: Annotated[Whole, Field(ge=-1)] = 3
    """Number of times that the run continues by itself after it lost workers or the controller; -1: without limit."""
    log_every_steps: Count = 10
    """Optimizer steps between two records of metrics."""
    compile: bool = False
    """Compile the model with torch.compile. Each new batch shape takes up to minutes: set `data.pad_multiple` to have
    few shapes. Hardly useful on CPUs. For `model.architecture=detr` only."""
    recompute_encoder: bool = False
    """Keep only the input of each layer of the encoder for the backward pass, which computes the rest again (activation
    checkpointing). A step takes less memory and about a fifth more time; results stay the same. For large images with
    `deformable_detr` and `dino`."""
    channels_last: bool = True
    """Keep image features in channels-last memory order: faster convolutions."""
    on_nonfinite: Literal["raise", "skip"] = "raise"
    """What happens with a step whose predictions, loss or gradients are not finite. `raise`: the run ends. `skip`: all
    workers leave the step out."""
    max_nonfinite_steps: CountOrZero = 10
    """With `train.on_nonfinite=skip`: the run ends if more than this number of consecutive steps are left out. Steps
    that fp16 itself leaves out while it adjusts its gradient scale do not count."""
    stall_timeout_s: Count = 600
    """Longest time in seconds that a worker may spend in one phase of a step (waiting for data, the forward pass, a
    checkpoint, ...). A worker that takes longer is reported and replaced, which counts as a failure. The same limit
    holds for the time since the last sign of life of Ray Train's controller."""
    start_timeout_s: Count = 1800
    """Seconds to wait for the resources of the workers, at the start and after a node was lost. Then the run fails and
    says what is missing."""
    resize_check_s: Count = 60
    """With a range of `train.num_workers`: seconds between two checks whether there is room for more workers."""
    max_steps: Count | None = None
    """Optimizer steps after which the run ends early. Schedules still follow `train.epochs`."""
    early_stopping: EarlyStoppingConfig | None = None
    """Ends the run early if the validation score no longer improves: `{patience: 10}`. null: never."""
    record_stream: bool = False
    """Write which images each worker saw at each step into the run's folder, as `stream/rank-*.jsonl`."""

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """Smallest and largest number of workers; None: the cluster decides."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers

    def rules(self) -> Iterator[Violation]:
        """Batches must be divisible among the workers; launcher and precision must suit the workers."""
        batch = self.global_batch_size
        if isinstance(self.micro_batch_size, int) and self.micro_batch_size > batch:
            yield Violation(
                ("micro_batch_size", "global_batch_size"), f"must not exceed train.global_batch_size ({batch})"
            )
        least, most = self.worker_range or (1, 1)
        if least > most:
            yield Violation(("num_workers",), "must name the least workers first, then the most")
        if most > batch:
            yield Violation(
                ("num_workers", "global_batch_size"),
                f"must not exceed train.global_batch_size ({batch}): every worker needs an image in every step",
            )
        if self.launcher == "local" and most > 1:
            yield Violation(("num_workers", "launcher"), "must be 1 or null with train.launcher=local")
        if self.micro_batch_size == "auto" and self.compile:
            yield Violation(("micro_batch_size", "compile"), "must be a number or null with train.compile")
        if self.recompute_encoder and self.compile:
            yield Violation(("recompute_encoder", "compile"), "must be false with train.compile")
        if self.precision == "fp16" and self.use_gpu is False:
            yield Violation(("precision", "use_gpu"), "needs a GPU, but train.use_gpu is false: take bf16 or fp32")


class EvalConfig(Section):
    """Validation during training, and the evaluate command."""

    every_epochs: CountOrZero = 1
    """Epochs between two validations; 0 validates only at the end."""
    size: Count = 800
    """Length of the short side of validation images in pixels."""
    max_size: Count = 1333
    """Longest allowed long side in pixels. An image that would be longer is scaled down further."""
    batch_size: Count = 4
    """Largest number of images in one forward pass. Only images of equal size share a pass, so it does not change the
    result."""
    checkpoint: Text | None = None
    """What the evaluate command evaluates: a run's folder (its best checkpoint), a checkpoint, a model package, a
    registered model (`models:/NAME@ALIAS`), or a path or URL of DETR weights."""
    max_detections: Count = 100
    """Number of detections kept for each image, highest scores first, of all classes together (COCO's metrics look at
    the best 100 of each class). `dino` has 300 by default, as published."""

    def rules(self) -> Iterator[Violation]:
        """The short side must not exceed the long side."""
        if self.size > self.max_size:
            yield Violation(("size", "max_size"), f"must not exceed eval.max_size ({self.max_size})")


with warnings.catch_warnings():
    # Pydantic warns of a field called register: Python's abstract classes have a method of that name, unused here.
    warnings.filterwarnings("ignore", 'Field name "register"')

    class TrackingConfig(Section):
        """Recording of metrics, configuration and results in MLflow, and its registry of models."""

        enabled: bool = True
        """Record the run."""
        uri: Text | None = None
        """MLflow tracking URI. null: the environment variable `MLFLOW_TRACKING_URI`, or else a SQLite file in
        `run.storage`. Must not contain a password: set `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD` in the
        environment instead."""
        experiment: Text = "detr_ray"
        """MLflow experiment the run belongs to."""
        report: bool = True
        """Write `report.html` and its `pictures/` into the run's folder at the end of the training and record them, and
        keep what the best weights found in `evaluation/best.npz`, from which `python -m detr_ray.report` makes the
        report again. Trials of a search get no report by themselves."""
        register: bool = False
        """Make the best checkpoint a version of the registered model when the training ends; after a search, that of
        the best trial."""
        model_name: Name = "detr"
        """Name of the registered model."""
        champion_margin: Annotated[NonNegative, Field(lt=1)] = 0
        """A new version becomes `champion` only if its AP is higher than the champion's by more than this, measured on
        the same validation data at the same sizes."""

        def rules(self) -> Iterator[Violation]:
            """What is registered is linked to the run's records."""
            if self.register and not self.enabled:
                yield Violation(("register", "enabled"), "needs tracking.enabled=true")


class Config(Section):
    """A whole configuration: validated and frozen; can be compared and pickled."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    tracking: TrackingConfig = TrackingConfig()
    tune: TuneConfig = TuneConfig()

    def fill(self) -> None:
        """The defaults of loss and evaluation are those of the architecture."""
        architecture = self.model.architecture
        self.__dict__["loss"] = self.loss.for_architecture(architecture)
        self.__dict__["eval"] = self.eval.with_defaults(PUBLISHED[architecture].get("eval", {}))

    def rules(self) -> Iterator[Violation]:
        """The warm-up must end before the run; early stopping needs validations; the class loss and compiling must
        suit the architecture.
        """
        yield from self._loss_rules()
        if self.train.compile and self.model.architecture != "detr":
            yield Violation(
                ("train.compile", "model.architecture"),
                f"cannot be used with {self.model.architecture}: compiling its backward pass does not end in good time",
            )
        if self.train.early_stopping is not None:
            if not self.eval.every_epochs:
                yield Violation(("train.early_stopping", "eval.every_epochs"), "needs eval.every_epochs of at least 1")
            if self.data.has_train and not self.data.has_val:
                yield Violation(("train.early_stopping", "data.val"), "needs validation images: set data.val")
        for name in ("warmup_epochs", "flat_epochs"):
            if getattr(self.optim, name) >= self.train.epochs:
                yield Violation(
                    (f"optim.{name}", "train.epochs"), f"must be less than train.epochs ({self.train.epochs})"
                )

    def _loss_rules(self) -> Iterator[Violation]:
        loss, architecture = self.loss, self.model.architecture
        has_no_object = PUBLISHED[architecture]["loss"]["class_loss"] == "softmax"
        if has_no_object != (loss.class_loss == "softmax"):
            what = "softmax" if has_no_object else "focal, vfl or mal"
            yield Violation(("loss.class_loss", "model.architecture"), f"must be {what} for {architecture}")
            return
        for name, needed in loss.own_defaults().items():
            if needed is None and getattr(loss, name) is not None:
                yield Violation((f"loss.{name}", "loss.class_loss"), f"means nothing for {loss.class_loss}")
        if not has_no_object and loss.eos_coef != LossConfig.model_fields["eos_coef"].default:
            yield Violation(("loss.eos_coef", "loss.class_loss"), f"means nothing for {loss.class_loss}")

    def to_dict(self) -> dict[str, Any]:
        """All keys as plain values (mappings, lists, numbers, text)."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """YAML of all keys; loading it gives an equal configuration."""
        return format_yaml(self.to_dict())

    def checkpoint_to_evaluate(self) -> str:
        """The value of ``eval.checkpoint``.

        Raises:
            ConfigError: it is null.
        """
        if self.eval.checkpoint is None:
            raise ConfigError(
                "eval.checkpoint: is missing: name the model as an argument or by this key: a run's folder, a "
                "checkpoint, models:/NAME@ALIAS, or weights of a published model (path or URL)"
            )
        return self.eval.checkpoint

    def check_training(self) -> None:
        """Checks requirements of training only; evaluating a model does not need them.

        Raises:
            ConfigError: an address contains credentials; there are no training images; or the backbone has random
                weights and frozen batch norm.
        """
        refuse_credentials(self.to_dict())
        errors = []
        if not self.data.has_train:
            errors.append(
                "data.root: no training data is given; set data.root=FOLDER, or "
                "data.train.annotations=FILE and data.train.images=FOLDER"
            )
        model = self.model
        if model.backbone_norm == "frozen" and model.backbone_weights == "none" and model.init_from is None:
            errors.append(
                "model.backbone_norm: frozen batch norm cannot train a backbone from random weights "
                "(model.backbone_weights=none); set model.backbone_norm=batch, or model.backbone_weights=imagenet, or "
                "model.init_from=FILE"
            )
        if errors:
            raise ConfigError(errors)
