"""The ``data`` section: which images and boxes, and how they are augmented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from detr_ray.config.fields import Count, CountOrZero, Counts, Number, Section, Seed, Share, Text, Violation


class SplitConfig(Section):
    """One split: a COCO annotation file with a folder of images, or shards that hold both."""

    annotations: Text | None = None
    """COCO JSON file: a path, or a URI such as `s3://bucket/instances.json`. Needs `images`."""
    images: Text | None = None
    """Folder or URI that the annotation file's `file_name` entries are relative to. Needs `annotations`."""
    shards: Text | None = None
    """Folder or URI of shards written by `python -m detr_ray.prepare`. Instead of the two others."""

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


class AugmentConfig(Section):
    """Augmentation of training images: flip, then resize, or resize, crop and resize."""

    flip: Share = 0.5
    """Probability that an image is mirrored left to right."""
    scales: Counts = tuple(range(480, 801, 32))
    """Lengths in pixels of the short side, one of which is drawn for every image."""
    max_size: Count = 1333
    """Longest long side in pixels. An image that would exceed it gets a shorter short side."""
    crop: Share = 0.5
    """Probability that an image is cropped before its final resize."""
    crop_scales: Counts = (400, 500, 600)
    """Lengths in pixels of the short side before a crop, one of which is drawn."""
    crop_min: Count = 384
    """Smallest side of a crop in pixels."""
    crop_max: Count = 600
    """Largest side of a crop in pixels."""
    shared_draws: Count = 1
    """So many images of like aspect share the draws that decide their size, so that batches of small data sets pad
    less. 1: every image draws on its own, as the original does."""

    def rules(self) -> Iterator[Violation]:
        """The short side must fit below the long side, and a crop into the image it is cut from."""
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


class GenerateConfig(Section):
    """Drawn shapes on cluttered backgrounds, in COCO format: data for a first run that needs no download."""

    num_train: Count = 4000
    """Training images."""
    num_val: Count = 200
    """Validation images, none of which is a training image."""
    seed: Seed = 0
    """Other seeds give other images."""
    image_size: tuple[Count, Count] = (64, 128)
    """Shortest and longest side of the images in pixels. Both sides are drawn on their own."""
    max_objects: Count = 5
    """Most objects in an image."""
    min_object_size: Count = 12
    """Longer side in pixels of the smallest objects."""
    empty_fraction: Share = 0.03
    """Share of images without objects."""
    clutter: Share = 0.5
    """How busy backgrounds are, from 0 (smooth) to 1 (lines, patches and noise)."""

    def rules(self) -> Iterator[Violation]:
        """Sizes that can be drawn."""
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
    """Which images and boxes to train and validate on, and how they get to the training workers."""

    root: Text | None = None
    """Folder or URI in COCO's layout: `annotations/instances_train2017.json`, `annotations/instances_val2017.json`,
    `train2017/`, `val2017/`. Instead of `data.train` and `data.val`."""
    train: SplitConfig | None = None
    """Training images elsewhere than in `data.root`."""
    val: SplitConfig | None = None
    """Validation images elsewhere than in `data.root`."""
    label_space: Literal["auto", "contiguous", "coco91"] = "auto"
    """What a class index means. `contiguous`: the place in the annotation file's categories by rising id. `coco91`:
    COCO's own category id, as in the published weights. `auto`: coco91 when `model.init_from` holds published weights
    and the data has COCO's categories, contiguous otherwise."""
    generate: GenerateConfig | None = None
    """Writes generated data into `data.root` first, if it is not there yet. `{}` takes all defaults."""
    max_images: Count | None = None
    """Only the first so many images of each split, by image id: to see in minutes whether a model can learn a few
    images by heart. null: all."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of training images."""
    window: Count | None = None
    """Samples that are sorted by shape at a time, so that images of like shape share a batch. More means less padding
    and less shuffling. null: 4096, or 64 global batches if that is more."""
    shard_window: Count | None = None
    """With `data.train.shards`: so many shards are shuffled together at a time, in an order that differs from epoch to
    epoch, so that the reads of a stretch of training stay in few files. Fewer means less shuffling. null: the whole
    data set."""
    pad_multiple: Count = 1
    """Training batches are padded to a height and width that are multiples of so many pixels. At 64 about a tenth as
    many shapes are left, each padded by some 6 % more: faster on CPUs with `train.precision=bf16`, whose kernels are
    made anew for shapes that are not remembered, and with `train.compile`."""
    reduced_decoding: Annotated[Number, Field(ge=1)] | None = None
    """Decodes large JPEGs at 1/2, 1/4 or 1/8 of their size where at least this many times the pixels that are wanted
    along each side are left: faster, and not to the last bit what decoding all of them gives. Pixels of photos
    differ by 0.2 of 255 on average at 2, by 1 at 1. Smaller images, such as all of COCO's, are not touched.
    null: never."""
    tasks_per_worker: Count = 2
    """Data tasks that read and augment images at the same time for each training worker."""
    prefetch_batches: Count = 4
    """Batches that are kept ready ahead of each training worker."""
    follow_links: bool = False
    """Whether links in a folder of images may lead out of it. Otherwise files that such links lead to are refused: a
    data set made by others could have any file of this machine read, and packed into shards. A folder that is a link
    itself is followed in any case."""
    on_bad_image: Literal["raise", "skip"] = "raise"
    """What to do about an image that cannot be read: end the run, or train on a black image without boxes in its place,
    and count it. `skip` counts a validation image as one in which nothing was found: its annotated boxes stay, so that
    scores are not the better for it."""
    max_bad_images: CountOrZero = 100
    """With `data.on_bad_image=skip`: the run ends when more different training images than this could not be read."""

    def rules(self) -> Iterator[Violation]:
        """The data lies in one place, and generated data has a place."""
        for name in ("train", "val"):
            if self.root is not None and getattr(self, name) is not None:
                yield Violation((name, "root"), "cannot go together with data.root: set one of them to null")
        if self.generate is not None and self.root is None:
            yield Violation(("root", "generate"), "is missing: it is the folder that data.generate writes into")
        elif self.generate is not None and self.root is not None and "://" in self.root.removeprefix("file://"):
            yield Violation(("root", "generate"), "must be a local folder: data.generate draws into it")
        if self.shard_window is not None and (self.train is None or self.train.shards is None):
            yield Violation(("shard_window", "train"), "needs data.train.shards: there are no shards to take in turn")
