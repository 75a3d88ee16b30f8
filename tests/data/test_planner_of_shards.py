"""The stream of samples of a data set in shards: a window has the images of few of them."""

from __future__ import annotations

import pickle
from itertools import chain

import numpy as np
import pytest
from defaults import size_policy
from samples import COMMON_SIZES, walk

from detr_ray.data.planner import Planner


def make_sharded_planner(shard_sizes=(30, 17, 44, 25, 9, 31, 28), shards_at_a_time=2, seed=42, **options) -> Planner:
    shard_of = np.repeat(np.arange(len(shard_sizes)), shard_sizes)
    images = len(shard_of)
    sizes = COMMON_SIZES[np.random.default_rng(0).integers(0, len(COMMON_SIZES), images)]
    return Planner(
        sizes[:, 0], sizes[:, 1], np.arange(images) + 5000, seed=seed, size_policy=size_policy(),
        shard_of=shard_of, shards_at_a_time=shards_at_a_time,
        **{"global_batch_size": 6, "window": 4096, **options},
    )  # fmt: skip


def shards_of_windows(planner: Planner, epoch: int, shard_sizes) -> list[list[int]]:
    """The shards that the images of each window lie in, one for each image."""
    shard_of = np.repeat(np.arange(len(shard_sizes)), shard_sizes)
    first = epoch * planner.steps_per_epoch
    return [
        [int(shard_of[s.index]) for step in range(start, end) for s in planner.global_batch(first + step)]
        for start, end in zip(planner.window_bounds(epoch), planner.window_bounds(epoch)[1:], strict=False)
    ]


@pytest.mark.parametrize("shards_at_a_time", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("window", [4096, 24])
def test_an_epoch_of_shards_has_each_image_once(shards_at_a_time, window):
    planner = make_sharded_planner(shards_at_a_time=shards_at_a_time, window=window)
    epochs = []
    for epoch in range(3):
        first = epoch * planner.steps_per_epoch
        samples = list(chain.from_iterable(planner.global_batch(first + i) for i in range(planner.steps_per_epoch)))
        assert [s.position for s in samples] == list(range(first * 6, (first + planner.steps_per_epoch) * 6))
        assert len({s.index for s in samples}) == len(samples) == 184 // 6 * 6
        epochs.append([s.index for s in samples])
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_window_stays_in_its_shards():
    sizes = (120, 97, 144, 85, 109, 131, 128, 90)
    planner = make_sharded_planner(sizes, shards_at_a_time=2)
    orders = []
    for epoch in range(4):
        windows = shards_of_windows(planner, epoch, sizes)
        assert len(windows) == 4
        seen: list[set[int]] = []
        for shards in windows:
            counts = np.bincount(shards, minlength=len(sizes))
            own = set(np.argsort(counts)[-2:].tolist())
            # Images of the window before, that were too few for a batch, are all that comes from elsewhere.
            assert counts.sum() - sum(counts[shard] for shard in own) < planner.global_batch_size
            assert all(shard in own or shard in seen[-1] for shard in set(shards))
            seen.append(own)
        assert sorted(shard for own in seen for shard in own) == list(range(len(sizes)))
        orders.append([sorted(own) for own in seen])
    assert orders[0] != orders[1]


def test_images_of_a_window_are_shuffled_together():
    sizes = (150, 150, 150, 150)
    first_window = shards_of_windows(make_sharded_planner(sizes), 0, sizes)[0]
    halves = [np.mean(np.array(half) == first_window[0]) for half in np.array_split(first_window, 2)]
    assert all(0.3 < share < 0.7 for share in halves)


def test_shards_are_part_of_what_the_stream_is_a_function_of():
    walked = make_sharded_planner()
    batches = walk(walked, 3 * walked.steps_per_epoch)
    for step in np.random.default_rng(0).permutation(len(batches))[:20].tolist():
        assert make_sharded_planner().global_batch(step) == batches[step]
    assert walk(pickle.loads(pickle.dumps(walked)), 40) == batches[:40]
    assert walk(make_sharded_planner(shards_at_a_time=3), 5) != batches[:5]
    assert walk(make_sharded_planner(seed=1), 5) != batches[:5]
    assert walk(make_sharded_planner(shards_at_a_time=None), 5) != batches[:5]
    whole = make_sharded_planner(shards_at_a_time=None)
    plain = Planner(
        whole.sizes[:, 0], whole.sizes[:, 1], whole.image_ids, seed=42, global_batch_size=6, size_policy=size_policy()
    )
    assert walk(whole, 40) == walk(plain, 40)


def test_epoch_sizes_of_shards_are_those_of_the_batches():
    planner = make_sharded_planner(window=24)
    for epoch in (0, 2):
        first = epoch * planner.steps_per_epoch
        expected = [[s.size for s in planner.global_batch(first + i)] for i in range(planner.steps_per_epoch)]
        assert [[tuple(size) for size in batch] for batch in planner.epoch_sizes(epoch).tolist()] == expected
