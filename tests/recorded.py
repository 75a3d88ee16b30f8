"""What a run leaves behind, for tests that disturb runs: its weights, and the stream that its workers recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from detr_ray.engine.checkpoints.store import CheckpointStore


def final_weights(run: Path, steps: int) -> dict[str, torch.Tensor]:
    """The model of a run's last checkpoint, which is that of its last step."""
    store = CheckpointStore(str(run / "checkpoints"))
    latest = store.latest()
    assert latest is not None and latest.step == steps
    return store.load(latest, "model.pt")["model"]


def records(run: Path, rank: int) -> list[dict[str, Any]]:
    """What a worker recorded, in the order in which it did."""
    path = run / "stream" / f"rank-{rank:05d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps_taken(run: Path) -> list[int]:
    """Steps in the order in which rank 0 took them, repeated ones among them."""
    return [record["step"] for record in records(run, 0)]


def jumps(run: Path) -> list[tuple[int, int]]:
    """Where the order of steps was broken: the last step before, and the first one after."""
    return [(a, b) for a, b in pairwise(steps_taken(run)) if b != a + 1]


def effective_stream(run: Path, most_workers: int) -> dict[int, list[tuple[int, int]]]:
    """Step -> (position, image id) of the samples that made the weights, over all workers.

    A step that was taken again after a fault counts as it was taken last.
    """
    by_rank: list[Mapping[int, dict[str, Any]]] = []
    for rank in range(most_workers):
        by_rank.append({(record["step"], record["world_size"]): record for record in records(run, rank)})  # type: ignore[misc]
    stream = {}
    for record in records(run, 0):  # later ones replace earlier ones
        key = (record["step"], record["world_size"])
        parts = [by_rank[rank][key] for rank in range(record["world_size"])]  # type: ignore[index]
        pairs = [pair for part in parts for pair in zip(part["positions"], part["image_ids"], strict=True)]
        stream[record["step"]] = sorted(pairs)
    return stream


def assert_same_stream(run: Path, undisturbed: Path, steps: int, batch: int, most_workers: int = 2) -> None:
    """Every step of a run used exactly the samples of an undisturbed one: none lost, none seen twice."""
    found, expected = effective_stream(run, most_workers), effective_stream(undisturbed, most_workers)
    assert sorted(found) == list(range(steps))
    assert found == expected
    positions = [position for step in range(steps) for position, _ in found[step]]
    assert positions == list(range(steps * batch))


def assert_same_weights(run: Path, undisturbed: Path, steps: int) -> None:
    """The weights at the end are the same bit for bit, running statistics of batch norm among them."""
    expected, found = final_weights(undisturbed, steps), final_weights(run, steps)
    assert sorted(expected) == sorted(found)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
