"""Lists of transforms: probabilities, epochs, sizes, and the partners that each of them gets."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pytest
import torch
from defaults import augmentation, sequence_of

from detr_ray.data.planner import Planner
from detr_ray.data.sample import Crop, Flip, Instances, Margin, Picture, Place, Resize, SamplePlan
from detr_ray.data.transforms.colour import Grayscale, MakeGrey
from detr_ray.data.transforms.geometry import IouCrop, Mirror, Rotate90, ScaleJitter, ZoomOut
from detr_ray.data.transforms.sequence import Combine, Entry, TransformSequence, always
from detr_ray.data.transforms.several import Blend, CopyPaste, Mixup, Mosaic, Tile, other_places

SIZES = np.random.default_rng(0).integers(40, 160, (64, 2))
DETR = augmentation(scales=(64, 90), max_size=150, crop_scales=(60, 80), crop_min=40, crop_max=60)
ORIENTED = (Mirror(0), Mirror(1))


def planner(*entries: Entry, seed: int = 3, window: int = 64, sizes: np.ndarray = SIZES) -> Planner:
    ids = np.arange(len(sizes)) + 100
    policy = TransformSequence(entries)
    return Planner(
        sizes[:, 0], sizes[:, 1], ids, seed=seed, global_batch_size=8, size_policy=policy, window=window
    )  # fmt: skip


def epoch_of(planner: Planner, epoch: int) -> list[SamplePlan]:
    steps = range(epoch * planner.steps_per_epoch, (epoch + 1) * planner.steps_per_epoch)
    return list(chain.from_iterable(planner.global_batch(step) for step in steps))


def test_the_original_alone_has_the_stream_that_it_had() -> None:
    """Numbers of the version before there were lists."""
    alone = planner(Entry(DETR))
    assert alone.global_batch(13)[3] == SamplePlan(
        107, 39, 139, (90, 91), (Flip(1), Resize((100, 80)), Crop(top=40, left=12, height=57, width=58))
    )
    batches = [alone.global_batch(step) for step in range(60)]
    said = repr([(s.position, s.index, s.image_id, s.size, s.steps) for batch in batches for s in batch])
    assert zlib.crc32(said.encode()) == STREAM
    assert sequence_of(DETR).draws_per_sample == 8


STREAM = 2129472941


def test_each_is_done_as_often_as_its_probability_says_and_independently() -> None:
    plans = planner(Entry(Mirror(0), 0.3), Entry(Grayscale(), 0.6), Entry(DETR))
    samples = [sample for epoch in range(20) for sample in epoch_of(plans, epoch)]
    flipped = np.array([Flip(0) in sample.steps for sample in samples])
    grey = np.array([MakeGrey() in sample.steps for sample in samples])
    assert abs(flipped.mean() - 0.3) < 0.04 and abs(grey.mean() - 0.6) < 0.04
    assert abs((flipped & grey).mean() - 0.18) < 0.04


def test_they_are_done_in_their_order() -> None:
    (sample, *_) = epoch_of(planner(Entry(Grayscale()), Entry(Mirror(0)), Entry(DETR), Entry(Rotate90((1,)))), 0)
    kinds = [type(step).__name__ for step in sample.steps]
    assert kinds[:2] == ["MakeGrey", "Flip"] and kinds[-2:] == ["Resize", "Turn"]
    assert sample.steps[-2].size == sample.size[::-1]


def test_one_that_ends_leaves_the_rest_as_it_is() -> None:
    ending = planner(Entry(Mosaic((0.3, 0.7), (1, 1.5), 0.2), 0.5, until_epoch=2), Entry(DETR))
    staying = planner(Entry(Mosaic((0.3, 0.7), (1, 1.5), 0.2), 0.5), Entry(DETR))
    assert [epoch_of(ending, epoch) == epoch_of(staying, epoch) for epoch in range(4)] == [True, True, False, False]
    partners = [sum(len(sample.partners) > 0 for sample in epoch_of(ending, epoch)) for epoch in range(4)]
    assert min(partners[:2]) > 15 and partners[2:] == [0, 0]
    without, before = ({s.index: s for s in epoch_of(plan, 3)} for plan in (ending, staying))
    whole = [index for index, sample in before.items() if not sample.partners]
    for index in whole:
        assert without[index].steps == before[index].steps and without[index].size == before[index].size


def test_always_is_without_chance_and_end() -> None:
    entry = always(Entry(Mirror(1), 0.1, until_epoch=1))
    assert all(Flip(1) in sample.steps for sample in epoch_of(planner(entry, Entry(DETR)), 5))


def test_each_gets_its_own_partners() -> None:
    entries = (
        Entry(Mosaic((0.3, 0.7), (1, 1.5), 0.2), 0.5),
        Entry(Mixup((0.5, 0.5)), 0.5),
        Entry(CopyPaste(2, 0.5), 0.5),
    )
    seen = set()
    for sample in epoch_of(planner(*entries, Entry(DETR)), 0):
        combined = [step for step in sample.steps if isinstance(step, Combine)]
        own = {type(step.step): range(step.first, step.first + step.count) for step in combined}
        taken = [place for step in {step.first: step for step in combined}.values()
                 for place in range(step.first, step.first + step.count)]  # fmt: skip
        assert taken == list(range(len(sample.partners)))
        if Tile in own:
            assert len(own[Tile]) == 3 and own[Tile].start == 0
        if Blend in own:
            (place,) = own[Blend]
            assert place == (3 if Tile in own else 0)
        seen.add(frozenset(own))
    assert len(seen) >= 6


def test_a_step_gets_the_partners_of_its_transform_alone() -> None:
    pictures = [Picture(torch.zeros(0), Instances(np.zeros((0, 4)), np.zeros(0), (k, k))) for k in range(5)]
    tile, picture = Tile((9, 9)), pictures[0]
    given = []

    class Noting:
        def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
            given.extend(partners)
            return picture

    assert Combine(tile, 1, 2) != Combine(tile, 0, 2)
    assert Combine(Noting(), 1, 2).apply(picture, pictures[1:]) is picture and given == pictures[2:4]


def test_partners_are_all_others_of_a_window_equally_often() -> None:
    rng = np.random.default_rng(0)
    places = np.stack([other_places(rng.random((5, 3))) for _ in range(1000)])
    for own in range(5):
        for k in range(3):
            values, counts = np.unique(places[:, own, k], return_counts=True)
            assert set(values.tolist()) == set(range(5)) - {own} and counts.min() > 200
        assert all(len(set(row)) == 3 for row in places[:, own].tolist())
        assert len({tuple(row) for row in places[:, own].tolist()}) == 24
    assert other_places(np.array([[0.7]])).tolist() == [[0]]
    assert other_places(np.array([[0.7, 0.1, 0.2], [0.1, 0.5, 0.9]])).shape == (2, 3), "too few to be different"


LISTS = {
    "zoom out": (Entry(ZoomOut((1, 4), 0), 0.5), Entry(DETR)),
    "crop": (Entry(IouCrop((0.3, 1.0), (0.5, 2.0), (0.0,)), 0.8), Entry(DETR)),
    "all": (
        Entry(Mosaic((0.2, 0.8), (1, 2), 0.2), 0.5), Entry(ZoomOut((1, 3), 0), 0.5),
        Entry(IouCrop((0.2, 1.0), (0.3, 3.0), (0.0,)), 0.8), Entry(DETR), Entry(Rotate90((1, 2)), 0.5),
    ),
    "no crop": (Entry(IouCrop((0.3, 1.0), (0.5, 2.0), (0.0,))), Entry(augmentation(scales=(64,), max_size=80, crop=0))),
    "crop of oblong images": (
        Entry(IouCrop((0.3, 1.0), (0.5, 2.0), (0.0,)), 0.5), Entry(augmentation(scales=(64,), max_size=5000, crop=0)),
    ),
    "jitter": (Entry(Mosaic((0.2, 0.8), (1, 2), 0.2), 0.5), Entry(ScaleJitter(96, (0.1, 2.0), 0))),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_no_draw_exceeds_the_largest_side(name: str) -> None:
    policy = TransformSequence(LISTS[name])
    rng = np.random.default_rng(1)
    sizes = np.tile(rng.integers(20, 300, (20, 2)), (500, 1))
    drawn = policy.draw(sizes, rng.random((len(sizes), policy.draws_per_sample)), 0)
    assert drawn.size.max() <= policy.largest_side(sizes) <= 1.5 * drawn.size.max()


@pytest.mark.parametrize("name", LISTS)
def test_plans_of_lists_are_of_whole_numbers_inside_of_the_picture(name: str) -> None:
    thin = np.array([[1, 300], [300, 1], [2, 2], [1, 1], [500, 3], [7, 7], [40, 60], [90, 33]])
    for sample in epoch_of(planner(*LISTS[name], sizes=thin), 0) + epoch_of(planner(*LISTS[name]), 1):
        assert all(type(side) is int and side >= 1 for side in sample.size)
        for step in sample.steps:
            match step:
                case Resize(size):
                    assert all(type(side) is int and side >= 1 for side in size)
                case Crop(top, left, height, width):
                    assert min(top, left) >= 0 and min(height, width) >= 1
                case Place(inner, Margin(canvas, top, left)):
                    assert top + inner[0] <= canvas[0] and left + inner[1] <= canvas[1]
                    assert min(*inner, top + 1, left + 1) >= 1


def test_scale_jitter_gives_one_size_and_all_scales() -> None:
    plans = epoch_of(planner(Entry(ScaleJitter(100, (0.2, 2.0), 0))), 0)
    assert {plan.size for plan in plans} == {(100, 100)}
    scales = []
    for plan in plans:
        cut = [step for step in plan.steps if isinstance(step, Crop)]
        (placed,) = [step for step in plan.steps if isinstance(step, Place)]
        before = (cut[0].height, cut[0].width) if cut else SIZES[plan.index]
        ratios = [new / old for new, old in zip(placed.size, before, strict=True)]
        assert max(ratios) / min(ratios) < 1.1
        scales.append(max(ratios) * max(SIZES[plan.index]) / 100)
    assert min(scales) < 0.35 and max(scales) > 1.7
