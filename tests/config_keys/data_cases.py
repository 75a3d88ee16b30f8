"""Keys of the section `data`: where images come from, which of them are taken, how they become batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from coco_folder import encoded
from config_keys.registry import Place, shows
from observing import observe
from PIL import Image
from storage.small_shards import write_small_shards
from tiny import make_dataset

from detr_ray.config import ConfigError
from detr_ray.data.errors import DataError
from detr_ray.data.formats import open_split
from detr_ray.data.packing import write_shards
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.structures import PaddedBatch


def split_of(root: Path, split: str) -> str:
    return f"data.{split}={{annotations: {root}/annotations/instances_{split}2017.json, images: {root}/{split}2017}}"


def batches(place: Place, *overrides: str, steps: int = 4) -> list[PaddedBatch]:
    """Training batches of the first steps as workers get them."""
    job = place.job(*overrides)
    source = LocalBatches(job.data.plan(1, 0), *job.data.loaders())
    return [batch for step in source.train_batches(0, steps) for batch in step]


@shows("data.root")
def root(place: Place) -> None:
    other = make_dataset(place.folder / "other", num_train=5, num_val=3)
    job = place.job(f"data.root={other}")
    assert job.data.train is not None and job.data.val is not None
    assert (len(job.data.train), len(job.data.val)) == (5, 3)


@shows("data.format")
def data_format(place: Place) -> None:
    """Which of two data sets is read that lie in one folder: the same images, once with fewer."""
    root = place.folder / "both"
    shutil.copytree(place.data / "train2017", root / "images")
    shutil.copytree(place.data, root, dirs_exist_ok=True)
    names = sorted(path.name for path in (root / "images").iterdir())
    for split, count in (("train", 5), ("val", 2)):
        (root / f"{split}.csv").write_text("\n".join(f"{name},1,1,20,20,thing" for name in names[:count]))
    for name, count in ((None, 16), ("coco", 16), ("csv", 5)):
        job = place.job(f"data.root={root}", *([] if name is None else [f"data.format={name}"]))
        assert job.data.train is not None and len(job.data.train) == count
    with pytest.raises(DataError, match=r"data\.format=voc"):
        place.job(f"data.root={root}", "data.format=voc")


@shows("data.split.val", "data.split.seed", "data.split.group_by")
def data_split(place: Place) -> None:
    """How many images are held out, which, and which of them together; of the training set that is named."""
    keys = ("data.root=null", split_of(place.data, "train"), "eval.every_epochs=0")

    def names(*more: str) -> dict[str, list[str]]:
        job = place.job(*keys, *more)
        assert job.data.train is not None and job.data.val is not None
        return {"train": job.data.train.file_names.to_pylist(), "val": job.data.val.file_names.to_pylist()}

    few, many = names("data.split={val: 0.2}"), names("data.split={val: 0.6}")
    assert 0 < len(few["val"]) < len(many["val"]) < 16
    assert set(few["val"]) < set(many["val"]) and len({*few["train"], *few["val"]}) == 16
    assert names("data.split={val: 0.2, seed: 5}")["val"] != few["val"]
    paired = names(r"data.split={val: 0.5, group_by: '(\d)\.'}")
    ends = {split: {name.partition(".")[0][-1] for name in found} for split, found in paired.items()}
    assert not ends["train"] & ends["val"] and len(ends["train"] | ends["val"]) == 10


@shows("data.train.annotations", "data.train.images", "data.val.annotations", "data.val.images")
def annotations_and_images(place: Place) -> None:
    """Each of the four is read from where it says: the annotations of one set, copies of its images elsewhere."""
    elsewhere = place.folder / "images"
    for split in ("train", "val"):
        shutil.copytree(place.data / f"{split}2017", elsewhere / split)
        content = json.loads((place.data / "annotations" / f"instances_{split}2017.json").read_text())
        content["images"] = content["images"][:7] if split == "train" else content["images"][:2]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in kept]
        (place.folder / f"{split}.json").write_text(json.dumps(content))
    keys = ["data.root=null"]
    for split in ("train", "val"):
        keys += [f"data.{split}.annotations={place.folder}/{split}.json", f"data.{split}.images={elsewhere}/{split}"]
    job = place.job(*keys)
    assert job.data.train is not None and job.data.val is not None
    assert (len(job.data.train), len(job.data.val)) == (7, 2)
    for key in keys[1:]:
        with pytest.raises(DataError, match=key.partition("=")[2].rpartition("/")[2].partition(".")[0]):
            place.job(*keys, key + "-not-there")


@shows("data.train.shards", "data.val.shards")
def shards(place: Place) -> None:
    for split in ("train", "val"):
        write_shards(open_split(str(place.data), None, split), str(place.folder / split), shard_megabytes=1)
    keys = ["data.root=null", *(f"data.{split}.shards={place.folder}/{split}" for split in ("train", "val"))]
    packed, plain = place.job(*keys), place.job()
    for mine, theirs in ((packed.data.train, plain.data.train), (packed.data.val, plain.data.val)):
        assert mine is not None and mine.shards is not None and theirs is not None and theirs.shards is None
    for mine_batch, their_batch in zip(batches(place, *keys), batches(place), strict=True):
        assert np.array_equal(mine_batch.images, their_batch.images)
    for split in ("train", "val"):
        with pytest.raises((DataError, ConfigError)):
            place.job(*keys, f"data.{split}.shards={place.folder}/nowhere")


@shows("data.label_space")
def label_space(place: Place) -> None:
    """The label of a category: its place among the categories, or its own id."""
    root = make_dataset(place.folder / "coco", num_train=8, num_val=2)
    names = {1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus"}
    for split in ("train", "val"):
        path = root / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        content["categories"] = [{"id": number, "name": name} for number, name in names.items()]
        path.write_text(json.dumps(content))
    labels = {}
    for space in ("auto", "contiguous", "coco91"):
        found = batches(place, f"data.root={root}", f"data.label_space={space}", steps=2)
        labels[space] = np.concatenate([batch.labels for batch in found])
    assert np.array_equal(labels["coco91"], labels["contiguous"] + 1) and labels["contiguous"].size
    assert np.array_equal(labels["auto"], labels["contiguous"])
    model = place.model(f"data.root={root}", "data.label_space=coco91")
    assert len(model.class_embed.bias) == 92


@shows(
    "data.generate.num_train", "data.generate.num_val", "data.generate.seed", "data.generate.image_size",
    "data.generate.max_objects", "data.generate.min_object_size", "data.generate.empty_fraction",
    "data.generate.clutter",
)  # fmt: skip
def generate(place: Place) -> None:
    """Drawn through the job, with all keys; then each key of those that do not show in the annotations alone."""

    def drawn(name: str, more: str = "") -> tuple[Path, dict, dict]:
        keys = f"{{num_train: 12, num_val: 5, image_size: [40, 60], max_objects: 9, min_object_size: 5{more}}}"
        place.job(f"data.root={place.folder / name}", f"data.generate={keys}")
        folder = place.folder / name
        train, val = (
            json.loads((folder / "annotations" / f"instances_{split}2017.json").read_text())
            for split in ("train", "val")
        )
        return folder, train, val

    _, train, val = drawn("a")
    assert (len(train["images"]), len(val["images"])) == (12, 5)
    sides = [side for image in train["images"] for side in (image["height"], image["width"])]
    assert min(sides) >= 40 and max(sides) <= 60
    counts = np.bincount([entry["image_id"] for entry in train["annotations"]])
    assert 5 < counts.max() <= 9, "more than the default's most"
    longest = [max(entry["bbox"][2:]) for entry in train["annotations"]]
    assert 4 < min(longest) < 11, "smaller than the default's least"
    assert drawn("b", ", seed: 5")[1]["annotations"] != train["annotations"]
    assert drawn("again", ", seed: 0")[1]["annotations"] == train["annotations"]
    empty = drawn("c", ", empty_fraction: 0.9")[1]
    assert len({entry["image_id"] for entry in empty["annotations"]}) < 6

    def detail(root: Path) -> float:
        """How much neighbouring pixels of backgrounds differ."""
        pictures = [np.asarray(Image.open(path).convert("L"), float) for path in (root / "train2017").iterdir()]
        return float(np.mean([np.abs(np.diff(picture, axis=1)).mean() for picture in pictures]))

    calm, busy = (drawn(f"clutter-{value}", f", clutter: {value}, empty_fraction: 0.7")[0] for value in (0, 1))
    assert detail(busy) > 2 * detail(calm)


@shows("data.max_images")
def max_images(place: Place) -> None:
    job = place.job("data.max_images=4")
    assert job.data.train is not None and job.data.val is not None
    assert (len(job.data.train), len(job.data.val)) == (4, 4)
    few = place.job("data.max_images=6", "eval.every_epochs=0")
    assert few.steps_per_epoch == 1 and {s.image_id for b in few.data.plan(1, 0).step(0) for s in b} <= set(
        sorted(place.job().data.train.image_ids.tolist())[:6]  # type: ignore[union-attr]
    )


@shows("data.window")
def window(place: Place) -> None:
    """A window of one batch is not sorted by shape at all: other batches, more padding."""
    settings = ("data.augment={scales: [48], max_size: 200, crop: 0, flip: 0}",)

    def ids(*more: str) -> list[int]:
        return [sample.image_id for sample in place.samples(*settings, *more)]

    def padding(*more: str) -> int:
        found = batches(place, *settings, *more)
        return sum(b.images[:, 0].size - int(b.sizes.prod(axis=1).sum()) for b in found)

    assert ids("data.window=4") != ids() == ids("data.window=16")
    assert padding("data.window=4") > padding()


@shows("data.shard_window")
def shard_window(place: Place) -> None:
    """With one shard at a time, a stretch of the stream reads one file; without, all of them."""
    index = open_split(str(place.data), None, "train")
    write_small_shards(index, str(place.folder / "train"), 4, pytest.MonkeyPatch())
    keys = ("data.root=null", f"data.train.shards={place.folder}/train")
    job = place.job(*keys)
    assert job.data.train is not None and job.data.train.shards is not None
    files = job.data.train.shards.file_of
    assert len(set(files.tolist())) > 2

    def runs(*more: str) -> int:
        """How often the stream changes from one file to another."""
        return int(np.count_nonzero(np.diff([files[sample.index] for sample in place.samples(*keys, *more)])))

    assert runs("data.shard_window=1") < runs()


@shows("data.pad_multiple")
def pad_multiple(place: Place) -> None:
    sides = {side for batch in batches(place, "data.pad_multiple=32") for side in batch.images.shape[2:]}
    assert all(side % 32 == 0 for side in sides)
    assert any(side % 32 for batch in batches(place) for side in batch.images.shape[2:])
    seen = place.train("data.pad_multiple=32", stop_after=2)
    assert all(side % 32 == 0 for forward in seen.training for side in forward.images.shape[2:])


@shows("data.reduced_decoding")
def reduced_decoding(place: Place) -> None:
    """Large JPEGs come out a little different, in training and in validation; by default not at all."""
    root = make_dataset(place.folder / "large", num_train=8, num_val=2, image_size=(400, 400))
    keys = (f"data.root={root}", "data.augment.flip=0")

    def pixels(*more: str) -> list[np.ndarray]:
        job = place.job(*keys, *more)
        source = LocalBatches(job.data.plan(1, 0), *job.data.loaders())
        train = [batch.images for step in source.train_batches(0, 2) for batch in step]
        return [np.concatenate(train), np.concatenate([batch.images for batch in source.evaluation_batches()])]

    for reduced, whole in zip(pixels("data.reduced_decoding=1"), pixels(), strict=True):
        difference = np.abs(reduced.astype(int) - whole.astype(int))
        assert 0 < difference.mean() < 5
    assert all((a == b).all() for a, b in zip(pixels("data.reduced_decoding=50"), pixels(), strict=True))


@shows("data.sources")
def sources(place: Place) -> None:
    """The images of both, one of them twice; it trains."""
    other = make_dataset(place.folder / "other", num_train=4, num_val=1)
    keys = ("data.root=null", f"data.sources=[{{root: {place.data}}}, {{root: {other}, weight: 2}}]")
    job = place.job(*keys)
    assert job.data.train is not None and len(job.data.train) == 20 and job.steps_per_epoch == (16 + 2 * 4) // 4
    indices = [sample.index for sample in place.samples(*keys, steps=job.steps_per_epoch)]
    assert sorted(indices) == sorted([*range(20), *range(16, 20)])
    assert len(observe(place.config(*keys)).updates) == 6


@shows("data.balance.repeat_threshold", "data.balance.background", "data.balance.class_weights")
def balance(place: Place) -> None:
    """More samples of images with rare classes, and the share without boxes, in a longer epoch that trains."""
    root = make_dataset(place.folder / "some_empty", num_train=16, num_val=2, max_objects=1, empty_fraction=0.4)
    train = open_split(str(root), None, "train")
    is_empty = np.diff(train.first_box) == 0
    classes, counts = np.unique(train.category_ids, return_counts=True)
    is_rare = np.zeros(16, bool)
    is_rare[~is_empty] = train.category_ids == classes[counts.argmin()]

    def taken(*keys: str) -> np.ndarray:
        steps = place.job(f"data.root={root}", *keys).steps_per_epoch
        return np.bincount([s.index for s in place.samples(f"data.root={root}", *keys, steps=steps)], minlength=16)

    plain, repeated, fewer = taken(), taken("data.balance.repeat_threshold=1"), taken("data.balance.background=0.1")
    assert (plain == 1).all() and is_empty.mean() > 0.2
    assert repeated.sum() > 16 and (repeated[is_rare] >= 2).all() and (repeated[is_empty] <= 1).all()
    rarest = dict(train.categories)[int(classes[counts.argmin()])]
    weighted = taken(f"data.balance.class_weights={{{rarest}: 5}}")
    assert (weighted[is_rare] == 5).all() and (weighted[~is_rare] == 1).all()
    assert fewer[is_empty].sum() <= 2 and (fewer[~is_empty] <= 1).all()
    seen = place.train(f"data.root={root}", "data.balance={repeat_threshold: 1}")
    assert len(seen.updates) == repeated.sum() // 4


def broken(place: Place, split: str = "train", count: int = 2) -> Path:
    root = place.folder / f"broken-{split}"
    shutil.copytree(place.data, root)
    for path in sorted((root / f"{split}2017").iterdir())[3 : 3 + count]:
        path.write_bytes(encoded()[:100])
    return root


@shows("data.on_bad_image")
def on_bad_image(place: Place) -> None:
    root = broken(place)
    with pytest.raises(RunFailed, match=r"image\(s\) cannot be used"):
        place.train(f"data.root={root}")
    seen = place.train(f"data.root={root}", "data.on_bad_image=skip")
    assert sum(seen.metric("train/bad_images")) == 2 and len(seen.updates) == 4


@shows("data.max_bad_images")
def max_bad_images(place: Place) -> None:
    keys = (f"data.root={broken(place)}", "data.on_bad_image=skip")
    assert len(place.train(*keys, "data.max_bad_images=2").updates) == 4
    with pytest.raises(RunFailed, match=r"data\.max_bad_images"):
        place.train(*keys, "data.max_bad_images=1")


@shows("data.follow_links")
def follow_links(place: Place) -> None:
    root = shutil.copytree(place.data, place.folder / "linked")
    image = sorted((root / "train2017").iterdir())[0]
    image.rename(place.folder / "elsewhere")
    image.symlink_to(place.folder / "elsewhere")
    steps = 4
    followed = batches(place, f"data.root={root}", "data.follow_links=true", steps=steps)
    assert all(not batch.bad_images for batch in followed)
    (fault,) = [line for batch in batches(place, f"data.root={root}", steps=steps) for line in batch.bad_images]
    assert fault.startswith(f"{image}: a link that leads out of the images' folder")
