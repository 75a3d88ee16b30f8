"""How often an epoch takes each image: repeat factors, the share of background, and the plan that follows them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from defaults import size_policy

from detr_ray.data.balance import Balance, repeat_factors, takings
from detr_ray.data.errors import DataError
from detr_ray.data.index import DatasetIndex, Sources
from detr_ray.data.planner import Planner

NAMES = ("common", "seldom", "rare", "never")


def make_index(classes: list[list[int]], crowds: dict[int, int] | None = None) -> DatasetIndex:
    """Images with one box of each of these classes; and crowds, image -> class."""
    boxes = [(image, category, False) for image, found in enumerate(classes) for category in found]
    boxes += [(image, category, True) for image, category in (crowds or {}).items()]
    return DatasetIndex.of_annotations(
        image_ids=np.arange(len(classes)) + 1,
        heights=np.full(len(classes), 40),
        widths=np.full(len(classes), 60),
        file_names=[f"{number}.png" for number in range(len(classes))],
        annotated_ids=np.array([image + 1 for image, _, _ in boxes]),
        boxes_xywh_px=np.tile([4.0, 4.0, 10.0, 10.0], (len(boxes), 1)),
        category_ids=np.array([category for _, category, _ in boxes]),
        areas=np.full(len(boxes), 100.0),
        is_crowd=np.array([crowd for _, _, crowd in boxes]),
        annotation_ids=np.arange(len(boxes)),
        categories=tuple(enumerate(NAMES)),
        source="drawn",
    )


CLASSES = [[0]] * 70 + [[0, 0, 1]] * 10 + [[2]] + [[0, 2]] + [[]] * 18
"""100 images: class 0 is on 81 of them, 1 on 10, 2 on 2."""


def test_factors_are_those_of_the_rarest_class() -> None:
    factors = repeat_factors(make_index(CLASSES, crowds={0: 2, 99: 1}), 0.4)
    expected = [1.0] * 70 + [math.sqrt(0.4 / 0.1)] * 10 + [math.sqrt(0.4 / 0.02)] * 2 + [1.0] * 18
    assert factors == pytest.approx(expected), "two boxes of a class on an image count once, and crowds not at all"
    assert (repeat_factors(make_index(CLASSES), 0.02) == 1).all(), "no class is below the threshold"


def test_background_has_its_share() -> None:
    index = make_index(CLASSES)
    assert Balance().repeats(index) is None
    for share, threshold in ((0.5, 0.0), (0.05, 0.0), (0.2, 0.4), (0.0, 0.0)):
        repeats = Balance(threshold, share).repeats(index)
        assert repeats is not None
        assert repeats[82:].sum() / repeats.sum() == pytest.approx(share)
        assert repeats[:82] == pytest.approx(repeat_factors(index, threshold)[:82])
    sources = Sources(("a", "b"), ("a", "b"), np.array([0, 1] * 50, np.int32))
    weighted = Balance(0.0, 0.25, source_weights=(1.0, 3.0)).repeats(replace(index, images_root=None, sources=sources))
    assert weighted is not None and weighted[82:].sum() / weighted.sum() == pytest.approx(0.25)
    assert weighted[1::2] == pytest.approx(3 * weighted[::2]), "images without a box are of a source, too"
    without = make_index([[0], [1]])
    with pytest.raises(DataError, match=r"drawn: data\.balance\.background=0\.1 is a share of samples without boxes"):
        Balance(0.0, 0.1).repeats(without)


def test_classes_have_weights() -> None:
    """An image is taken as its most frequent class says, with the class's repeat factor."""
    index = make_index(CLASSES, crowds={0: 2})
    found = Balance(class_weights={"common": 0.5, "rare": 6.0}).repeats(index)
    assert found is not None
    assert found == pytest.approx([0.5] * 70 + [1.0] * 10 + [6.0] * 2 + [1.0] * 18)
    found = Balance(0.4, class_weights={"seldom": 3.0}).repeats(index)
    assert found is not None
    assert found == pytest.approx([1.0] * 70 + [6.0] * 10 + [math.sqrt(20)] * 2 + [1.0] * 18)
    with pytest.raises(DataError, match=r"drawn: .*class_weights: there is no class 'rara'; did you mean 'rare'\?"):
        Balance(class_weights={"rara": 2.0}).repeats(index)
    with pytest.raises(DataError, match=r"there is no class 'x'; the classes are common, seldom, rare, never"):
        Balance(class_weights={"x": 2.0}).repeats(index)


def test_what_an_epoch_takes_of_each_class() -> None:
    index = make_index(CLASSES)
    found = takings(index, repeat_factors(index, 0.4))
    assert [(taken.name, taken.images) for taken in found] == [("rare", 2), ("seldom", 10), ("common", 81)]
    assert found[0].samples == pytest.approx(2 * math.sqrt(20)) and found[1].factor == pytest.approx(2)
    assert found[2].samples == pytest.approx(70 + 10 * 2 + math.sqrt(20))


REPEATS = np.random.default_rng(0).choice([1.0, 0.3, 2.5, 7.05], 90)


def make_planner(**options: object) -> Planner:
    sizes = np.random.default_rng(1).integers(40, 80, (len(REPEATS), 2))
    values = {"seed": 5, "global_batch_size": 4, "window": 64, "repeats": REPEATS, **options}
    return Planner(sizes[:, 0], sizes[:, 1], np.arange(len(REPEATS)) + 1, size_policy=size_policy(), **values)  # type: ignore[arg-type]


SHARDS = {"shard_of": np.repeat([0, 1, 2, 3], [20, 30, 25, 15]), "shards_at_a_time": 2}


def rows_of(planner: Planner, epoch: int) -> list[int]:
    steps = range(epoch * planner.steps_per_epoch, (epoch + 1) * planner.steps_per_epoch)
    return [sample.index for sample in chain.from_iterable(planner.global_batch(step) for step in steps)]


@pytest.mark.parametrize("shards", [False, True])
def test_an_epoch_takes_each_image_as_often_as_it_is_to(shards: bool) -> None:
    planner, epochs = make_planner(**(SHARDS if shards else {})), 60
    total = math.floor(REPEATS.sum())
    assert (planner.epoch_samples, planner.steps_per_epoch) == (total, total // 4)
    times, orders = np.zeros(len(REPEATS)), []
    for epoch in range(epochs):
        rows = rows_of(planner, epoch)
        counts = np.bincount(rows, minlength=len(REPEATS))
        assert len(rows) == total // 4 * 4 and (counts <= np.ceil(REPEATS)).all()
        missing = np.maximum(np.floor(REPEATS) - counts, 0).sum()
        assert missing <= 4, "but for those that fill no batch"
        times += counts
        orders.append(rows)
    assert orders[0] != orders[1]
    assert np.abs(times / epochs - REPEATS).max() < 0.25
    assert (times / epochs).sum() == pytest.approx(total // 4 * 4)
    assert Counter(orders[0]) != Counter(orders[1]), "what is taken once more is another one each time"


@pytest.mark.parametrize("shards", [False, True])
def test_any_step_can_be_planned_alone_and_sizes_are_those_of_the_epoch(shards: bool) -> None:
    options = SHARDS if shards else {}
    planner = make_planner(**options)
    walked = [planner.global_batch(step) for step in range(3 * planner.steps_per_epoch)]
    for step in (0, 7, len(walked) // 2, len(walked) - 1):
        assert make_planner(**options).global_batch(step) == walked[step]
    first = planner.steps_per_epoch
    expected = [[sample.size for sample in batch] for batch in walked[first : 2 * first]]
    assert [[tuple(size) for size in batch] for batch in planner.epoch_sizes(1).tolist()] == expected
    assert make_planner(seed=6, **options).global_batch(0) != walked[0]


def test_once_each_is_the_plan_without_repeats() -> None:
    planner = make_planner(repeats=np.ones(len(REPEATS)))
    assert sorted(rows_of(make_planner(repeats=None), 0)) != [] and planner.steps_per_epoch == len(REPEATS) // 4
    assert len(set(rows_of(planner, 0))) == len(REPEATS) // 4 * 4


def test_too_few_samples_for_a_step_are_refused() -> None:
    with pytest.raises(DataError, match=r"9 training images are too few for one step of train\.global_batch_size=16"):
        make_planner(repeats=np.full(len(REPEATS), 0.1), global_batch_size=16)
