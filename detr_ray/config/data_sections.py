"""The ``data`` section: images, annotations and augmentation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from detr_ray.config.fields import (
    Count,
    CountOrZero,
    Counts,
    NonEmpty,
    Number,
    Positive,
    Section,
    Seed,
    Share,
    Text,
    Violation,
)
from detr_ray.config.transform_sections import DetrTransform, TransformEntry, refuse_order


class SplitConfig(Section):
    """One split: a COCO annotation file and a folder of images, or shards that contain both. Other formats are
    read from `data.root`.
    """

    annotations: Text | None = None
    """COCO JSON file: a path, or a URI such as `s3://bucket/instances.json`. Needs `images`."""
    images: Text | None = None
    """Folder or URI of the images; the `file_name` entries of the annotation file are relative to it. Needs
    `annotations`."""
    shards: Text | None = None
    """Folder or URI of shards written by `python -m detr_ray.prepare`; replaces `annotations` and `images`."""

    def rules(self) -> Iterator[Violation]:
        """Either shards, or annotations together with images."""
        keys = ("shards", "annotations", "images")
        if self.shards is not None:
            if self.annotations is not None or self.images is not None:
                yield Violation(keys, "cannot go together with annotations or images: set either to null")
        elif self.annotations is None and self.images is None:
            yield Violation(("annotations", "images", "shards"), "is missing: give annotations and images, or shards")
        elif self.annotations is None:
            yield Violation(("annotations", "images", "shards"), "is missing: images are given, so it must be too")
        elif self.images is None:
            yield Violation(("images", "annotations", "shards"), "is missing: annotations are given, so it must be too")


class SourceConfig(SplitConfig):
    """One of several training sets: the training images of a folder, or those of an annotation file, or shards."""

    root: Text | None = None
    """Folder or URI of a data set in any of the formats; replaces `annotations`, `images` and `shards`."""
    format: Text | None = None
    """Format of the data set in `root`. null: recognised by its files."""
    weight: Positive = 1
    """How often an epoch takes each of its images, on average."""

    def rules(self) -> Iterator[Violation]:
        """Either a root, or what a split needs."""
        given = [name for name in ("annotations", "images", "shards") if getattr(self, name) is not None]
        if self.root is None:
            yield from super().rules()
        elif given:
            yield Violation(("root", *given), f"cannot go together with {', '.join(given)}")


class HoldoutConfig(Section):
    """Validation images taken out of a data set that has none of its own."""

    val: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    """Share of the images that is for validation. A hash of the image's name decides, so adding images later does not
    move the others. If a class would be on one side alone, one of its images, or groups, is moved to the other side."""
    seed: Seed = 0
    """Another seed gives another division of the images."""
    group_by: Text | None = None
    """Regular expression that is searched in file names, without folders such as `images` and `train`. Images with the
    same match, or the same text in its parentheses, are on the same side: `^(video\\d+)_` keeps the frames of a video
    together. null: each image by itself."""

    def rules(self) -> Iterator[Violation]:
        """The expression must be one."""
        if self.group_by is not None:
            try:
                re.compile(self.group_by)
            except re.error as error:
                yield Violation(("group_by",), f"is not a regular expression: {error}")


class AugmentConfig(Section):
    """Augmentation of training images: a list of transforms. The transform `detr` flips, and then either resizes, or
    resizes, crops and resizes again, with the keys from `flip` to `crop_max`.
    """

    transforms: Annotated[tuple[TransformEntry, ...], NonEmpty] = (DetrTransform(),)
    """What is done to an image, in this order: names, or names with parameters, such as `[mosaic: {p: 0.3, until_epoch:
    60}, photometric, zoom_out, iou_crop, detr]`. One of them decides the final size: `detr`, the original's, or
    `scale_jitter`. The transforms and their parameters are listed below."""
    flip: Share = 0.5
    """Probability that an image is mirrored left to right."""
    scales: Counts = tuple(range(480, 801, 32))
    """Lengths of the short side in pixels. One is drawn for every image."""
    max_size: Count = 1333
    """Longest allowed long side in pixels. An image that would be longer is scaled down further."""
    crop: Share = 0.5
    """Probability that an image is cropped before its final resize."""
    crop_scales: Counts = (400, 500, 600)
    """Lengths of the short side before a crop, in pixels. One is drawn for every crop."""
    crop_min: Count = 384
    """Smallest side of a crop in pixels."""
    crop_max: Count = 600
    """Largest side of a crop in pixels."""
    shared_draws: Count = 1
    """Number of images of similar aspect ratio that share the random numbers for their size, so that batches of small
    data sets need less padding. 1: every image has its own, as in the original."""

    def rules(self) -> Iterator[Violation]:
        """Something decides the size; the short side must not exceed the long side, and a crop must fit the image."""
        wrong = refuse_order(self.transforms)
        if wrong is not None:
            yield Violation(("transforms",), wrong)
        if max(self.scales) > self.max_size:
            yield Violation(("scales", "max_size"), f"must not exceed data.augment.max_size ({self.max_size})")
        if self.crop == 0:
            return
        if self.crop_min > self.crop_max:
            yield Violation(
                ("crop_min", "crop_max", "crop"), f"must not exceed data.augment.crop_max ({self.crop_max})"
            )
        elif self.crop_min > min(self.crop_scales):
            yield Violation(
                ("crop_min", "crop_scales", "crop"),
                f"must not exceed the shortest of data.augment.crop_scales ({min(self.crop_scales)})",
            )


class BalanceConfig(Section):
    """How often an epoch takes each training image. The number of an epoch's samples then differs from the number of
    images. Which images are repeated, and their order, depends only on seed and epoch.
    """

    repeat_threshold: Share = 0
    """Images of rare classes are repeated (LVIS's repeat factor sampling): a class that is on a share f of the images
    below this threshold has the factor `sqrt(repeat_threshold / f)`, and an image is taken as often as the largest
    factor of its classes says. 0: each image once. Common: 0.001 for hundreds of classes, up to 0.5 for a few."""
    class_weights: dict[Text, Positive] = Field(default={})
    """How often an epoch takes the images of a class, such as `{rust: 4, screw: 0.5}`, beyond what `repeat_threshold`
    says. An image with several classes is taken as often as the most frequent of them; classes that are not listed
    have 1."""
    background: Annotated[Share, Field(lt=1)] | None = None
    """Share of an epoch's samples that have no box; images without objects are taken less often, or repeated. null:
    each once."""


class GenerateConfig(Section):
    """Generated data: drawn shapes on cluttered backgrounds, in COCO format. For a first run without a download."""

    num_train: Annotated[Count, Field(le=1_000_000)] = 4000
    """Training images."""
    num_val: Annotated[Count, Field(le=1_000_000)] = 200
    """Validation images. None of them is a training image."""
    seed: Seed = 0
    """Seed of the drawn images."""
    image_size: tuple[Count, Count] = (64, 128)
    """Smallest and largest side of the images in pixels. Width and height are drawn independently."""
    max_objects: Count = 5
    """Largest number of objects in an image."""
    min_object_size: Count = 12
    """Longer side in pixels of the smallest objects."""
    empty_fraction: Share = 0.03
    """Share of images without objects."""
    clutter: Share = 0.5
    """How busy backgrounds are, from 0 (smooth) to 1 (lines, patches and noise)."""

    def rules(self) -> Iterator[Violation]:
        """Sizes must be in a range that can be drawn."""
        smallest, largest = self.image_size
        if not 32 <= smallest <= largest <= 4096:
            yield Violation(("image_size",), "must be two sizes from 32 to 4096, the smaller first")
        elif not 4 <= self.min_object_size <= smallest // 2:
            yield Violation(
                ("min_object_size", "image_size"),
                f"must be from 4 to half of the smallest image side ({smallest // 2})",
            )
        if self.empty_fraction == 1:
            yield Violation(("empty_fraction",), "must be less than 1")


class DataConfig(Section):
    """Images and annotations for training and validation, and how they are loaded."""

    root: Text | None = None
    """Folder or URI of a data set: COCO's layout (`annotations/instances_train2017.json`, `train2017/` and the same for
    `val`), YOLO, Pascal VOC, CSV, Open Images or shards; docs/your_data.md says what each needs. Replaces `data.train`
    and `data.val`."""
    format: Text | None = None
    """Format of the data set in `data.root`: `coco`, `yolo`, `voc`, `csv`, `open_images` or `shards`. null: recognised
    by its files."""
    split: HoldoutConfig | None = None
    """Takes validation images out of `data.root`, or `data.train`, where the data set has none of its own:
    `{val: 0.1}`."""
    train: SplitConfig | None = None
    """Training images that are not in `data.root`."""
    val: SplitConfig | None = None
    """Validation images that are not in `data.root`."""
    sources: tuple[SourceConfig, ...] = ()
    """Several training sets that are trained together, in place of `data.root` and `data.train`: a list such as
    `[{root: A, weight: 2}, {annotations: FILE, images: FOLDER}]`. The training images of each are taken, `weight` times
    in an epoch; with `data.split` all of its images, some of which are held out. Classes of the same name are one
    class; the first set keeps its category ids, which those of `data.val` must agree with."""
    label_space: Literal["auto", "contiguous", "coco91"] = "auto"
    """Meaning of a class index. `contiguous`: position among the annotation file's categories, sorted by id. `coco91`:
    COCO's own category id, as in the published weights. `auto`: coco91 if `model.init_from` holds published weights and
    the data has COCO's categories, otherwise contiguous."""
    generate: GenerateConfig | None = None
    """Draws a generated data set in `data.root` first, if it does not exist yet. `{}`: all defaults."""
    max_images: Count | None = None
    """Uses only this number of images of each split, the lowest image ids: to check within minutes whether a model can
    overfit a few images. Of several `data.sources` the same share of each is taken. null: all."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of training images."""
    balance: BalanceConfig = BalanceConfig()
    """How often an epoch takes each training image."""
    window: Count | None = None
    """Number of samples that are sorted by shape together, so that images of similar shape share a batch. More: less
    padding, less shuffling. null: 4096, or 64 global batches if that is more."""
    shard_window: Count | None = None
    """With `data.train.shards`: number of shards that are shuffled together. Their order differs from epoch to epoch.
    Fewer: each part of the training reads fewer files, less shuffling. null: the whole data set."""
    pad_multiple: Count = 1
    """Height and width of training batches are padded to a multiple of this number of pixels. 64 leaves about a tenth
    of the different shapes and adds about 6 % padding. Faster with `train.compile`, and on CPUs with
    `train.precision=bf16`, where each new shape needs new kernels."""
    reduced_decoding: Annotated[Number, Field(ge=1)] | None = None
    """Decodes large JPEGs at 1/2, 1/4 or 1/8 of their size, if the result still has at least this many times the needed
    pixels along each side. Faster, but not bit-identical: pixels of photos differ by 0.2 of 255 on average at 2, by 1
    at 1. Smaller images, such as all of COCO's, are not affected. null: never."""
    tasks_per_worker: Count = 2
    """Number of data tasks for each training worker that read and augment images at the same time. With
    `train.launcher=local`, one thread does that."""
    prefetch_batches: Count = 4
    """Number of batches that are prepared ahead for each training worker."""
    follow_links: bool = False
    """Whether links in an image folder may lead out of the folder. By default such files are refused: a data set from
    others could make this program read any file of this machine and pack it into shards. A folder that is itself a link
    is always followed."""
    on_bad_image: Literal["raise", "skip"] = "raise"
    """What happens with an image that cannot be read. `raise`: the run ends. `skip`: training uses a black image
    without boxes instead, and counts it; validation counts the image as one without detections. Its annotated boxes
    stay, so scores do not get better. Where the annotations do not state sizes, an image whose header cannot be read
    is left out, of validation too: without a size its boxes have no place."""
    max_bad_images: CountOrZero = 100
    """With `data.on_bad_image=skip`: the run ends, or does not start, if more than this number of different training
    images cannot be read, those that are left out because they have no size among them."""

    @property
    def has_train(self) -> bool:
        """Whether there are to be training images."""
        return self.root is not None or self.train is not None or bool(self.sources)

    def is_of_sources(self, split: str) -> bool:
        """Whether the images of a split are those of `sources`."""
        return bool(self.sources) and (split == "train" or self.split is not None)

    def place_of(self, split: str) -> str:
        """The keys that say where the images of a split lie, for advice."""
        return "data.sources" if self.is_of_sources(split) else f"data.{split}.images, or data.root"

    @property
    def has_val(self) -> bool:
        """Whether there are to be validation images."""
        return self.root is not None or self.val is not None or self.split is not None

    def places(self, split: str) -> SplitConfig | None:
        """Where the images of a split lie, those of the other among them with `split`; None: in `root`."""
        return self.train if split == "train" or self.split is not None else self.val

    def rules(self) -> Iterator[Violation]:
        """Each split has one source, and generated data needs a folder."""
        for name in ("train", "val"):
            if self.root is not None and getattr(self, name) is not None:
                yield Violation((name, "root"), "cannot go together with data.root: set one of them to null")
        for name in ("root", "train"):
            if self.sources and getattr(self, name) is not None:
                yield Violation(("sources", name), f"cannot go together with data.{name}: set one of them to null")
        if self.split is not None and self.val is not None:
            yield Violation(("split", "val"), "cannot go together with data.val: set one of them to null")
        if self.generate is not None and self.root is None:
            yield Violation(("root", "generate"), "is missing: it is the folder that data.generate writes into")
        elif self.generate is not None and self.root is not None and "://" in self.root.removeprefix("file://"):
            yield Violation(("root", "generate"), "must be a local folder: data.generate draws into it")
        in_shards = [place.shards is not None for place in (self.train, *self.sources) if place is not None]
        if self.shard_window is not None and not any(in_shards):
            yield Violation(("shard_window", "train"), "needs data.train.shards: there are no shards to take in turn")
