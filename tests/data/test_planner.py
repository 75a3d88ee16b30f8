"""The stream of samples: pure in the step, whole in the epoch, the same for any number of workers, little padded."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import pytest
from defaults import size_policy
from samples import COMMON_SIZES, walk

from detr_ray.data.errors import DataError
from detr_ray.data.evaluation_plan import plan_evaluation, split_evaluation
from detr_ray.data.formats.coco import read_coco_index
from detr_ray.data.index import DatasetIndex
from detr_ray.data.planner import Planner, share_bounds, split_global_batch
from detr_ray.data.sample import Crop, Flip, Resize, SamplePlan


def make_planner(images=200, seed=42, global_batch_size=8, window=64, sizes_seed=0, **augment) -> Planner:
    sizes = COMMON_SIZES[np.random.default_rng(sizes_seed).integers(0, len(COMMON_SIZES), images)]
    return Planner(
        sizes[:, 0],
        sizes[:, 1],
        np.arange(images) * 7 + 1000,
        seed=seed,
        global_batch_size=global_batch_size,
        size_policy=size_policy(**augment),
        window=window,
    )


def padding_fraction(batches: Iterable[Sequence[SamplePlan]]) -> float:
    """Share of the pixels of (micro-)batches that is padding, each padded to its largest height and width; 0..1."""
    padded = filled = 0
    for batch in batches:
        padded += len(batch) * max(plan.size[0] for plan in batch) * max(plan.size[1] for plan in batch)
        filled += sum(plan.size[0] * plan.size[1] for plan in batch)
    return 1 - filled / padded if padded else 0.0


def micro_batches(planner: Planner, steps: int, workers: int, micro_batch_size=None) -> list[tuple[SamplePlan, ...]]:
    return [
        micro_batch
        for batch in walk(planner, steps)
        for rank in range(workers)
        for micro_batch in split_global_batch(batch, workers, rank, micro_batch_size)
    ]


@pytest.fixture(scope="module")
def coco128_index(coco128) -> DatasetIndex:
    return read_coco_index(str(coco128 / "annotations/instances_train2017.json"), str(coco128 / "train2017"))


def planner_of(index: DatasetIndex, global_batch_size: int, **augment) -> Planner:
    return Planner(
        index.heights,
        index.widths,
        index.image_ids,
        seed=42,
        global_batch_size=global_batch_size,
        size_policy=size_policy(**augment),
    )


def test_stream_is_the_same_for_1_2_and_4_workers(coco128_index):
    def stream(workers: int) -> list[SamplePlan]:
        planner = planner_of(coco128_index, 16)
        samples = chain.from_iterable(micro_batches(planner, 2 * planner.steps_per_epoch, workers))
        return list(samples)

    alone = stream(1)
    assert [sample.position for sample in alone] == list(range(256))
    assert stream(2) == alone
    assert stream(4) == alone


@pytest.mark.parametrize("case", range(8))
def test_a_step_does_not_depend_on_what_was_asked_before(case):
    rng = np.random.default_rng(case)
    options = {
        "images": int(rng.integers(20, 300)),
        "seed": int(rng.integers(0, 2**40)),
        "global_batch_size": int(rng.integers(1, 12)),
        "window": int(rng.integers(1, 120)),
        "shared_draws": int(rng.integers(1, 9)),
    }
    walked = make_planner(**options)
    steps = 3 * walked.steps_per_epoch + 2
    batches = walk(walked, steps)
    for step in [7 % steps, *rng.integers(0, steps, 5).tolist()]:
        assert make_planner(**options).global_batch(step) == batches[step]
    for step in rng.permutation(steps).tolist():
        assert walked.global_batch(step) == batches[step]


@pytest.mark.parametrize(
    ("images", "size", "window"), [(200, 8, 64), (37, 5, 12), (9, 9, 1), (65, 4, 4096), (13, 1, 6)]
)
def test_epochs_are_permutations_without_the_remainder(images, size, window):
    planner = make_planner(images=images, global_batch_size=size, window=window)
    assert planner.steps_per_epoch == images // size
    left_out, orders = [], []
    for epoch in range(3):
        first = epoch * planner.steps_per_epoch
        steps = range(first, first + planner.steps_per_epoch)
        assert [planner.place_of(step) for step in steps] == [(epoch, i) for i in range(planner.steps_per_epoch)]
        samples = list(chain.from_iterable(planner.global_batch(step) for step in steps))
        assert [s.position for s in samples] == list(range(first * size, (first + planner.steps_per_epoch) * size))
        assert len({s.index for s in samples}) == len(samples) == images // size * size
        assert all(s.image_id == s.index * 7 + 1000 for s in samples)
        left_out.append(set(range(images)) - {s.index for s in samples})
        orders.append([(s.index, s.steps, s.size) for s in samples])
    assert {len(rest) for rest in left_out} == {images % size}
    assert orders[0] != orders[1] != orders[2]
    if images % size > 1:
        assert left_out[0] != left_out[1] or left_out[1] != left_out[2]


def test_the_seed_decides():
    assert walk(make_planner(seed=1), 5) == walk(make_planner(seed=1), 5)
    assert walk(make_planner(seed=1), 5) != walk(make_planner(seed=2), 5)


def test_stream_stays_what_it_was():
    """A change here breaks the resuming of runs that are under way: say so in the change log."""
    sizes = np.tile(COMMON_SIZES, (7, 1))
    options = {"seed": 42, "global_batch_size": 3, "size_policy": size_policy(), "window": 24}
    planner = Planner(sizes[:, 0], sizes[:, 1], np.arange(49), **options)
    samples = planner.global_batch(20)
    assert [(s.position, s.index, s.image_id, s.steps, s.size) for s in samples] == [
        (60, 17, 17, (Flip(1), Resize((899, 600)), Crop(166, 54, 432, 500)), (768, 888)),
        (61, 42, 42, (Resize((600, 800)), Crop(6, 109, 419, 585)), (736, 1027)),
        (62, 2, 2, (), (768, 1151)),
    ]


class Squares:
    """A size policy that has nothing to do with the augmentation: squares, and a step only where they are large."""

    draws_per_sample = 1

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, epoch: int) -> Squares:
        self.stored, self.size = sizes, np.repeat((uniform * 100).astype(np.int32) + 1, 2, axis=1)
        return self

    def steps_before_resize(self, places: np.ndarray) -> list[tuple]:
        return [(Crop(0, 0, *stored),) if side > 50 else () for stored, side in
                zip(self.stored[places].tolist(), self.size[places, 0], strict=True)]  # fmt: skip

    def partners(self, places: np.ndarray) -> list[tuple]:
        return [()] * len(places)


def test_the_planner_takes_any_size_policy():
    sizes = np.tile(COMMON_SIZES, (6, 1))
    columns = (sizes[:, 0], sizes[:, 1], np.arange(42))
    planner = Planner(*columns, seed=1, global_batch_size=6, window=42, size_policy=Squares())
    samples = list(chain.from_iterable(walk(planner, planner.steps_per_epoch)))
    assert sorted(s.index for s in samples) == list(range(42))
    assert len({s.size for s in samples}) > 20 and all(s.size[0] == s.size[1] for s in samples)
    for sample in samples:
        assert sample.steps == ((Crop(0, 0, *sizes[sample.index].tolist()),) if sample.size[0] > 50 else ())


def test_plans_hold_together():
    planner = make_planner(images=150)
    samples = list(chain.from_iterable(walk(planner, 2 * planner.steps_per_epoch)))
    assert {Flip(1) in s.steps for s in samples} == {False, True}
    kinds = [[step for step in s.steps if step != Flip(1)] for s in samples]
    assert 0.3 < np.mean([len(steps) > 0 for steps in kinds]) < 0.7
    for sample, steps in zip(samples, kinds, strict=True):
        assert all(type(value) is int for value in (sample.position, sample.index, sample.image_id, *sample.size))
        if steps:
            resize, crop = steps
            assert isinstance(resize, Resize) and isinstance(crop, Crop)
            assert 0 <= crop.top <= resize.size[0] - crop.height
            assert 0 <= crop.left <= resize.size[1] - crop.width
            assert all(type(value) is int for value in (*resize.size, crop.top, crop.left, crop.height, crop.width))


def test_window_of_an_epoch_is_taken_whole():
    """Every batch order of a window is of that window's samples; windows are about equally long."""
    planner = make_planner(images=8 * 17, global_batch_size=8, window=8 * 16)
    assert planner.window_bounds(3) == (0, 9, 17)  # 9 + 8 instead of 16 + 1
    shorter = make_planner(images=8 * 17, global_batch_size=8, window=3)
    assert shorter.window_bounds(3) == tuple(range(18))


def test_epoch_sizes_are_those_of_the_batches():
    planner = make_planner(images=100, global_batch_size=6, window=40)
    expected = [[s.size for s in planner.global_batch(planner.steps_per_epoch + i)] for i in range(16)]
    sizes = planner.epoch_sizes(1)
    assert sizes.shape == (16, 6, 2)
    assert [[tuple(size) for size in batch] for batch in sizes.tolist()] == expected


def test_batches_of_a_window_come_in_random_order():
    planner = make_planner(images=800, global_batch_size=8, window=800)
    areas = planner.epoch_sizes(0).astype(float).prod(axis=2).mean(axis=1)
    assert abs(np.corrcoef(areas, np.arange(len(areas)))[0, 1]) < 0.3
    assert abs(np.corrcoef(areas[1:], areas[:-1])[0, 1]) < 0.3


def test_pickles_without_its_cache():
    planner = make_planner(images=5000)
    bare = len(pickle.dumps(planner, protocol=5))
    expected = walk(planner, 30)
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(planner, protocol=5, buffer_callback=buffers.append)
    assert len(stream) < 2000
    assert len(pickle.dumps(planner, protocol=5)) == bare
    assert walk(pickle.loads(stream, buffers=buffers), 30) == expected


def test_too_few_images_for_a_step():
    with pytest.raises(DataError, match=r"5 training images are too few .*train\.global_batch_size=8.*to 5 or less"):
        make_planner(images=5, global_batch_size=8)


# ---- padding


def random_padding(planner: Planner, epochs: int, batch_size: int) -> float:
    """Padding of the same samples in random batches."""
    samples = list(chain.from_iterable(walk(planner, epochs * planner.steps_per_epoch)))
    order = np.random.default_rng(0).permutation(len(samples)).tolist()
    batches = [[samples[i] for i in order[k : k + batch_size]] for k in range(0, len(order), batch_size)]
    return padding_fraction(batches)


@pytest.mark.parametrize(
    ("per_worker", "workers", "shared_draws", "most"),
    [(2, 1, 1, 0.05), (2, 2, 1, 0.05), (8, 1, 1, 0.18), (8, 2, 1, 0.18), (8, 1, 8, 0.08), (8, 2, 8, 0.08)],
)
def test_padding_on_real_sizes(coco128_index, per_worker, workers, shared_draws, most):
    planner = planner_of(coco128_index, per_worker * workers, shared_draws=shared_draws)
    planned = padding_fraction(micro_batches(planner, 6 * planner.steps_per_epoch, workers))
    assert planned < most
    assert planned < 0.5 * random_padding(planner, 6, per_worker)


def test_padding_is_small_where_the_window_has_many_batches():
    planner = make_planner(images=2048, global_batch_size=16, window=2048)
    for workers, micro_batch_size in [(1, None), (2, None), (3, None), (5, 2), (8, None)]:
        batches = micro_batches(planner, planner.steps_per_epoch, workers, micro_batch_size)
        assert padding_fraction(batches) < 0.05
    assert random_padding(planner, 1, 16) > 0.4


def test_workers_of_a_step_get_like_work():
    planner = make_planner(images=2048, global_batch_size=16, window=2048)
    waits = []
    for batch in walk(planner, planner.steps_per_epoch):
        parts = [split_global_batch(batch, 4, rank)[0] for rank in range(4)]
        work = [max(s.size[0] for s in part) * max(s.size[1] for s in part) for part in parts]
        waits.append(max(work) / np.mean(work) - 1)
    assert np.mean(waits) < 0.05


# ---- sharing a step


@pytest.mark.parametrize("shared_draws", [1, 4])
def test_a_worker_of_many_plans_its_samples_alone(shared_draws):
    options = {"images": 4000, "global_batch_size": 650, "window": 4000, "shared_draws": shared_draws}
    whole, planner = make_planner(**options), make_planner(**options)
    for step in (0, 7, 3):
        batch = whole.global_batch(step)
        for rank in (0, 64, 129):
            bounds = share_bounds(650, 130, rank, 2)
            mine = [planner.samples(step, first, last) for first, last in bounds]
            assert mine == split_global_batch(batch, 130, rank, 2)
    flat = [[sample.size for sample in batch] for batch in walk(whole, whole.steps_per_epoch)]
    assert [[tuple(size) for size in batch] for batch in whole.epoch_sizes(0).tolist()] == flat
    padding = padding_fraction(micro_batches(planner, planner.steps_per_epoch, 130))
    assert padding < 0.05


def test_shares_differ_by_one_and_keep_the_order():
    batch = make_planner(global_batch_size=5).global_batch(0)
    parts = [split_global_batch(batch, 2, rank) for rank in range(2)]
    assert [[len(micro_batch) for micro_batch in part] for part in parts] == [[3], [2]]
    assert tuple(chain(*parts[0], *parts[1])) == batch


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 3, 5, 100])
def test_every_sample_goes_to_one_worker(workers, micro_batch_size):
    batch = make_planner(global_batch_size=16).global_batch(3)
    parts = [split_global_batch(batch, workers, rank, micro_batch_size) for rank in range(workers)]
    assert tuple(chain.from_iterable(chain.from_iterable(parts))) == batch
    shares = [sum(map(len, part)) for part in parts]
    assert max(shares) - min(shares) <= 1
    for part in parts:
        lengths = [len(micro_batch) for micro_batch in part]
        assert max(lengths) <= (micro_batch_size or 16)
        assert max(lengths) - min(lengths) <= 1
        assert len(part) == -(-sum(lengths) // (micro_batch_size or 16))


def test_more_workers_than_images_of_a_step():
    batch = make_planner(global_batch_size=2).global_batch(0)
    with pytest.raises(DataError, match=r"train\.global_batch_size=2 is less than the number of workers, 4"):
        split_global_batch(batch, 4, 3)


# ---- evaluation


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_evaluation_sees_every_image_once_without_padding(coco128_index, batch_size):
    batches = plan_evaluation(
        coco128_index.heights,
        coco128_index.widths,
        coco128_index.image_ids,
        size=800,
        max_size=1333,
        batch_size=batch_size,
    )
    samples = list(chain.from_iterable(batches))
    assert sorted(s.image_id for s in samples) == coco128_index.image_ids.tolist()
    assert [s.position for s in samples] == list(range(128))
    assert padding_fraction(batches) == 0
    assert max(map(len, batches)) <= batch_size
    areas = [batch[0].size[0] * batch[0].size[1] for batch in batches]
    assert areas == sorted(areas, reverse=True)
    first = next(s for s in samples if s.image_id == 9)
    assert (first.size, first.steps, first.partners) == ((800, 1066), (), ())


def test_evaluation_sizes_do_not_depend_on_the_batch_size(coco128_index):
    def sizes(batch_size: int) -> dict:
        columns = (coco128_index.heights, coco128_index.widths, coco128_index.image_ids)
        batches = plan_evaluation(*columns, size=256, max_size=300, batch_size=batch_size)
        return {s.image_id: (s.position, s.size) for s in chain.from_iterable(batches)}

    assert sizes(1) == sizes(4) == sizes(128)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_evaluation_is_shared_evenly(coco128_index, workers):
    batches = plan_evaluation(
        coco128_index.heights, coco128_index.widths, coco128_index.image_ids, size=800, max_size=1333, batch_size=2
    )
    parts = [split_evaluation(batches, workers, rank) for rank in range(workers)]
    assert sorted(chain.from_iterable(parts), key=lambda batch: batch[0].position) == batches
    pixels = [sum(s.size[0] * s.size[1] for batch in part for s in batch) for part in parts]
    assert max(pixels) / np.mean(pixels) < 1.1


def test_more_workers_than_evaluation_batches():
    batches = plan_evaluation(
        np.array([10, 10]), np.array([10, 20]), np.array([1, 2]), size=8, max_size=9, batch_size=1
    )
    assert [len(split_evaluation(batches, 3, rank)) for rank in range(3)] == [1, 1, 0]


def test_padding_fraction_of_a_known_batch():
    def sample(height: int, width: int) -> SamplePlan:
        return SamplePlan(0, 0, 0, (height, width))

    assert padding_fraction([]) == 0
    assert padding_fraction([[sample(10, 20)], [sample(3, 4), sample(3, 4)]]) == 0
    assert padding_fraction([[sample(10, 20), sample(20, 10)]]) == pytest.approx(0.5)
