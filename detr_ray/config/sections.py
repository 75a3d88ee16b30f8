"""All sections of the configuration, their keys, ranges, defaults and meanings.

The docstring under a field is its meaning, in ``--help`` and in the documentation alike. What can be derived from the
data (classes, steps an epoch) is no key. Knows nothing of files and command lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field

from detr_ray.config.addresses import refuse_credentials
from detr_ray.config.data_sections import DataConfig
from detr_ray.config.errors import ConfigError
from detr_ray.config.fields import (
    Count,
    CountOrRange,
    CountOrZero,
    NonNegative,
    Positive,
    Section,
    Seed,
    Share,
    Text,
    Violation,
    Weight,
    Whole,
    curve_of,
)
from detr_ray.config.yaml_format import format_yaml


class RunConfig(Section):
    """Name of the run, where it is kept, and its seed."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] | None = None
    """Name of the run, of letters, digits, `.`, `_` and `-`. A run of this name that exists is resumed if its
    configuration agrees. null: a new, unique name."""
    storage: Text = "runs"
    """Folder or URI for checkpoints and everything else the run leaves behind."""
    seed: Seed = 42
    """Seed of the first weights, the sample order, the augmentation and dropout."""


class ModelConfig(Section):
    """The architecture: DETR, by default the original's with a ResNet-50; and the weights it starts from."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    """Network that turns images into features."""
    backbone_norm: Literal["frozen", "batch"] = "frozen"
    """Batch norm of the backbone. `frozen`: as loaded, for pretrained weights; the stem and the first stage do not
    train either. `batch`: trains, for a backbone from random weights."""
    backbone_stride: Literal[32, 16, 8] = 32
    """Pixels of an image for each cell of the features: the backbone is cut there. 16 and 8 are for small images."""
    backbone_weights: Text = "imagenet"
    """First weights of the backbone: `imagenet` (downloaded once), `none` (random), or path or URL of a torchvision
    ResNet's state dict, as a torch file or safetensors. Not used with `model.init_from`."""
    dilation: bool = False
    """Dilate the last stage instead of halving its resolution (DC5): four times the features, better on small objects,
    slower."""
    position_embedding: Literal["sine", "learned"] = "sine"
    """How a feature's place in the image is told to the transformer."""
    hidden_dim: Count = 256
    """Width of the transformer."""
    num_heads: Count = 8
    """Attention heads."""
    dim_feedforward: Count = 2048
    """Width of the transformer's feed-forward layers."""
    encoder_layers: CountOrZero = 6
    """Layers of the encoder."""
    decoder_layers: Count = 6
    """Layers of the decoder."""
    dropout: Annotated[Share, Field(lt=1)] = 0.1
    """Dropout in the transformer."""
    pre_norm: bool = False
    """Normalise before each part of a transformer layer instead of after it."""
    num_queries: Count = 100
    """Objects the model can find in one image."""
    aux_loss: bool = True
    """Apply the loss to every decoder layer, not only to the last."""
    init_from: Text | None = None
    """Path or URL of DETR weights to start from, as a torch file or safetensors; what trainers put around them is taken
    off. A head for other classes is rebuilt, with the rows of classes of the same name copied. The backbone has to be
    that of the file."""

    def rules(self) -> Iterator[Violation]:
        """Widths that divide, and a dilation that the backbone has."""
        if self.hidden_dim % self.num_heads:
            yield Violation(("hidden_dim", "num_heads"), f"must be divisible by model.num_heads ({self.num_heads})")
        if self.hidden_dim % 4:
            yield Violation(("hidden_dim",), "must be divisible by 4: half of it encodes rows, half columns, in pairs")
        if self.dilation and self.backbone not in ("resnet50", "resnet101"):
            yield Violation(
                ("dilation", "backbone"), f"needs model.backbone=resnet50 or resnet101, not {self.backbone}"
            )
        if self.dilation and self.backbone_stride != 32:
            yield Violation(
                ("dilation", "backbone_stride"),
                f"needs the last stage of the backbone, which model.backbone_stride={self.backbone_stride} cuts off",
            )


class LossConfig(Section):
    """Weights of the matching costs and of the losses. Each is a number, or a schedule over epochs such as
    `{points: [[0, 1], [50, 2]], interpolation: linear}`.
    """

    cost_class: Weight = 1.0
    """Weight of the class probability when queries are matched with boxes."""
    cost_bbox: Weight = 5.0
    """Weight of the L1 distance of boxes in the matching."""
    cost_giou: Weight = 2.0
    """Weight of the generalised IoU in the matching."""
    ce: Weight = 1.0
    """Weight of the classification loss."""
    bbox: Weight = 5.0
    """Weight of the L1 loss of matched boxes."""
    giou: Weight = 2.0
    """Weight of the generalised IoU loss of matched boxes."""
    eos_coef: Weight = 0.1
    """Weight of no-object among the classes of the classification loss."""

    def rules(self) -> Iterator[Violation]:
        """Something must tell a good match from a bad one."""
        costs = ("cost_class", "cost_bbox", "cost_giou")
        if all(value == 0 for name in costs for _, value in curve_of(getattr(self, name)).points):
            yield Violation(costs, "must not be 0 together with loss.cost_bbox and loss.cost_giou")


class OptimConfig(Section):
    """AdamW and its learning rate. Schedules are stated in epochs."""

    lr: Positive = 1e-4
    """Learning rate of everything but the backbone."""
    lr_backbone: NonNegative = 1e-5
    """Learning rate of the backbone. 0 freezes it, as the original does: its weights (learned positions among them) and
    its batch norm's statistics stay as they are, it has no moments and no part in the gradient's norm."""
    weight_decay: NonNegative = 1e-4
    """Weight decay."""
    clip_max_norm: NonNegative = 0.1
    """Gradients with a larger norm are scaled down to it; 0 turns this off."""
    schedule: Literal["constant", "step", "multistep", "cosine"] = "step"
    """How both learning rates change. `step`: times gamma every `step_epochs`. `multistep`: times gamma at each of
    `milestones`. `cosine`: down to `min_lr_factor` at the end."""
    step_epochs: Positive = 200
    """Epochs between two drops of the schedule `step`."""
    milestones: tuple[Positive, ...] = ()
    """Epochs at which the schedule `multistep` drops."""
    gamma: Annotated[Positive, Field(le=1)] = 0.1
    """Factor of a drop."""
    warmup_epochs: NonNegative = 0
    """Epochs over which the learning rates climb from near 0 at the start."""
    min_lr_factor: Share = 0
    """Share of the learning rates that the schedule `cosine` ends at."""
    ema_decay: Annotated[Share, Field(lt=1)] = 0
    """Decay of a moving average of the weights, which is then what is evaluated; 0 turns it off. Common: 0.9997."""

    def rules(self) -> Iterator[Violation]:
        """Milestones that exist and ascend."""
        if any(later <= earlier for earlier, later in pairwise(self.milestones)):
            yield Violation(("milestones",), "must ascend")
        if self.schedule == "multistep" and not self.milestones:
            yield Violation(("milestones", "schedule"), "must name at least one epoch for optim.schedule=multistep")


class TrainConfig(Section):
    """How long to train, in which batches, on how many workers."""

    epochs: Count = 300
    """Passes over the training images."""
    global_batch_size: Count = 16
    """Images of one optimizer step, over all workers. Workers' shares follow from it and need not be equal."""
    micro_batch_size: Count | None = None
    """Most images of one forward pass; a worker's larger share is accumulated. Changes memory, not results. null: the
    whole share at once."""
    num_workers: CountOrRange | None = None
    """Training workers. `[least, most]`: as many as the cluster has room for, more when nodes come and fewer when they
    go; batches and results stay those of the stream. null: one for each GPU of the cluster, or one without any."""
    use_gpu: bool | None = None
    """Train on GPUs. null: if there are any."""
    worker_resource: Text | None = None
    """Custom Ray resource that each worker takes one of, beside its GPU or CPU: keeps workers on the nodes that have
    it."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the forward pass; matching and losses stay in fp32. fp16 needs a GPU."""
    launcher: Literal["ray", "local"] = "ray"
    """`ray`: workers on a Ray cluster, which is started on this machine if there is none. `local`: one worker in this
    process, for debugging."""
    checkpoint_every_steps: Count | None = None
    """Optimizer steps between two checkpoints, also in the middle of an epoch. null: only after epochs, with each
    validation, and else after at least 100 steps."""
    keep_last: Count = 2
    """Newest checkpoints that are kept, beside the best."""
    max_failures: Annotated[Whole, Field(ge=-1)] = 3
    """Times that lost workers, or a lost controller, are replaced and the run goes on by itself; -1: without limit."""
    log_every_steps: Count = 10
    """Optimizer steps between two records of metrics."""
    compile: bool = False
    """Compile the model with torch.compile, once for each shape that batches have, which takes up to minutes each: set
    `data.pad_multiple` to have few. On CPUs it hardly pays."""
    channels_last: bool = True
    """Keep image features in channels-last memory order, which convolutions are faster in."""
    on_nonfinite: Literal["raise", "skip"] = "raise"
    """What to do about a step whose predictions, loss or gradients are not finite: end the run, or leave the step out
    on all workers."""
    max_nonfinite_steps: CountOrZero = 10
    """With `train.on_nonfinite=skip`: the run ends when more steps than this in a row were left out. Those that fp16
    leaves out by itself while it looks for the scale of its gradients do not count."""
    stall_timeout_s: Count = 600
    """Seconds that a worker may spend in one phase of a step (waiting for data, the forward pass, a checkpoint, ...).
    One that takes longer hangs: it is named and replaced, which counts as a failure. The same holds for Ray Train's
    controller when nothing has been heard of it for so long."""
    start_timeout_s: Count = 1800
    """Seconds to wait for the resources of the workers, at the start and after a node was lost; then the run fails,
    saying what is missing."""
    resize_check_s: Count = 60
    """With a range of `train.num_workers`: seconds between two looks at whether more workers have room."""
    max_steps: Count | None = None
    """Optimizer steps after which the run ends early. Schedules still follow `train.epochs`."""
    record_stream: bool = False
    """Write which images each worker saw at each step into the run's folder, as `stream/rank-*.jsonl`."""

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """The least and the most workers; None where the cluster decides."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers

    def rules(self) -> Iterator[Violation]:
        """Batches that can be shared out, and a launcher and a precision that fit the workers."""
        batch = self.global_batch_size
        if self.micro_batch_size is not None and self.micro_batch_size > batch:
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
        if self.precision == "fp16" and self.use_gpu is False:
            yield Violation(("precision", "use_gpu"), "needs a GPU, but train.use_gpu is false: take bf16 or fp32")


class EvalConfig(Section):
    """Validation during training, and the evaluate command."""

    every_epochs: CountOrZero = 1
    """Epochs between two validations; 0 validates only at the end."""
    size: Count = 800
    """Length of the short side of validation images in pixels."""
    max_size: Count = 1333
    """Longest long side in pixels. An image that would exceed it gets a shorter short side."""
    batch_size: Count = 4
    """Most images of one forward pass. Only images of equal size share one, so it does not change the result."""
    checkpoint: Text | None = None
    """What the evaluate command evaluates: a run's folder (its best checkpoint), a checkpoint, or path or URL of DETR
    weights."""
    max_detections: Count = 100
    """Detections kept an image, the best first. COCO's numbers are defined for 100."""

    def rules(self) -> Iterator[Violation]:
        """The short side must fit below the long side."""
        if self.size > self.max_size:
            yield Violation(("size", "max_size"), f"must not exceed eval.max_size ({self.max_size})")


class TrackingConfig(Section):
    """Where metrics, the configuration and results are recorded: MLflow."""

    enabled: bool = True
    """Record the run."""
    uri: Text | None = None
    """MLflow tracking URI. null: the environment variable `MLFLOW_TRACKING_URI`, else a SQLite file in
    `run.storage`. Without a password, which is kept nowhere: give `MLFLOW_TRACKING_USERNAME` and
    `MLFLOW_TRACKING_PASSWORD` in the environment."""
    experiment: Text = "detr_ray"
    """MLflow experiment the run belongs to."""


class Config(Section):
    """A whole configuration: validated, frozen, comparable and picklable."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    tracking: TrackingConfig = TrackingConfig()

    def rules(self) -> Iterator[Violation]:
        """A warm-up that ends before the run does."""
        if self.optim.warmup_epochs >= self.train.epochs:
            yield Violation(
                ("optim.warmup_epochs", "train.epochs"), f"must be less than train.epochs ({self.train.epochs})"
            )

    def to_dict(self) -> dict[str, Any]:
        """All keys as plain values (mappings, lists, numbers, text), for JSON, YAML and checkpoints."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """YAML of all keys, which loads again to an equal configuration."""
        return format_yaml(self.to_dict())

    def checkpoint_to_evaluate(self) -> str:
        """What ``eval.checkpoint`` names.

        Raises:
            ConfigError: it names nothing.
        """
        if self.eval.checkpoint is None:
            raise ConfigError(
                "eval.checkpoint: is missing: give a run's folder, a checkpoint, or DETR weights (path or URL)"
            )
        return self.eval.checkpoint

    def check_training(self) -> None:
        """Checks what training needs beyond a valid configuration.

        Building or evaluating a model needs none of this, hence no rule of the sections.

        Raises:
            ConfigError: no training images; or a backbone that neither is pretrained nor can train.
        """
        refuse_credentials(self.to_dict())
        errors = []
        if self.data.root is None and self.data.train is None:
            errors.append(
                "data.root: no training data is given; set data.root=FOLDER (COCO's layout), or "
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
