"""Scoring 5,000 images with 100 detections each: time and memory beside pycocotools, and what training loses by it.

    python -m benchmarks evaluation

Boxes and detections of 80 categories are drawn from a seed: 36,000 boxes, 1 % of them crowds. Ours and pycocotools get
the same columns from a file, each in a process of its own, and must give the same numbers to the last bit; what
pycocotools is handed (its dictionaries) is made within its time, as a script that has detections has to. Then
the quickstart's model takes steps on all cores but one, which data tasks have otherwise: with nothing beside them, with
the scores computed in line, and with the scores computed by another process as the training loop does it.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Row, alternate, in_fresh_process, memory_mb
from detr_ray.config import load_config
from detr_ray.engine.context import LocalContext
from detr_ray.engine.job import prepare_job
from detr_ray.engine.loop import TrainingLoop
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.evaluation import DetectionTable, GroundTruth, ScorerProcess, evaluate_detections
from detr_ray.evaluation.scorer_process import read_columns, write_columns
from detr_ray.tracking import MemoryTracker

IMAGES, DETECTIONS, CATEGORIES, BOXES = 5000, 100, 80, 36_000
STEPS = 40
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def draw_ground_truth(num_images: int, seed: int = 0) -> GroundTruth:
    """Images of 640 x 480 with a long-tailed number of boxes of up to four categories."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(BOXES * num_images // IMAGES, rng.dirichlet(np.full(num_images, 0.9)))
    total = int(counts.sum())
    kinds = rng.choice(CATEGORIES, (num_images, 4), p=rng.dirichlet(np.full(CATEGORIES, 0.5)))
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (total, 2)))
    corners = rng.random((total, 2)) * np.maximum(np.array([640, 480]) - sides, 1)
    boxes = np.concatenate([corners, sides], axis=1).round(2)
    return GroundTruth(
        image_ids=np.arange(num_images) * 7 + 3,
        first_box=np.concatenate([[0], np.cumsum(counts)]),
        boxes_xywh_px=boxes,
        category_ids=kinds[np.repeat(np.arange(num_images), counts), rng.integers(0, 4, total)] + 1,
        areas=boxes[:, 2] * boxes[:, 3] * 0.7,
        is_crowd=rng.random(total) < 0.01,
        annotation_ids=np.arange(total) + 1,
        categories=tuple((number + 1, f"category {number + 1}") for number in range(CATEGORIES)),
    )


def draw_detections(truth: GroundTruth, seed: int = 1) -> DetectionTable:
    """As a half-trained model's: two fifths near a box, most of these of its category and with a higher score."""
    rng = np.random.default_rng(seed)
    images = np.repeat(np.arange(len(truth.image_ids)), DETECTIONS)
    counts = np.diff(truth.first_box)[images]
    boxes_of = np.minimum(truth.first_box[images] + rng.integers(0, 1 << 30, len(images)) % np.maximum(counts, 1),
                          len(truth.areas) - 1)  # fmt: skip
    near = (counts > 0) & (rng.random(len(images)) < 0.4)
    strays = np.concatenate([rng.random((len(images), 2)) * 400, np.exp(rng.uniform(2, 6, (len(images), 2)))], axis=1)
    shifted = truth.boxes_xywh_px[boxes_of] * rng.normal(1, 0.1, strays.shape) + rng.normal(0, 2, strays.shape)
    shifted[:, 2:] = np.abs(shifted[:, 2:]) + 1
    right = near & (rng.random(len(images)) < 0.8)
    return DetectionTable(
        image_ids=truth.image_ids[images],
        category_ids=np.where(right, truth.category_ids[boxes_of], rng.integers(1, CATEGORIES + 1, len(images))),
        boxes_xywh_px=np.where(near[:, None], shifted, strays).astype(np.float32),
        scores=np.where(near, rng.beta(2, 2, len(images)), rng.beta(1, 8, len(images))).astype(np.float32),
    )


def score_ours(folder: str, rounds: int) -> dict[str, Any]:
    """Numbers, seconds and memory of this project's scorer."""
    truth, found = _load(folder)
    before, seconds = memory_mb()["VmRSS"], []
    for _ in range(rounds):
        started = time.perf_counter()
        metrics = evaluate_detections(truth, found)
        seconds.append(time.perf_counter() - started)
    return {
        "numbers": list(metrics.summary.values()),
        "of_categories": list(metrics.category_ap.values()),
        "seconds": seconds,
        "extra_mb": memory_mb()["VmHWM"] - before,
    }


def score_plain(folder: str) -> dict[str, Any]:
    """Numbers, seconds and memory of pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = _load(folder)
    found = found.sorted()  # equal scores in the order that ours has
    images = np.repeat(truth.image_ids, np.diff(truth.first_box)).tolist()
    before = memory_mb()["VmRSS"]
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        annotated = COCO()
        columns = zip(images, truth.category_ids.tolist(), truth.boxes_xywh_px.tolist(), truth.areas.tolist(),
                      truth.is_crowd.astype(int).tolist(), strict=True)  # fmt: skip
        annotated.dataset = {
            "images": [{"id": image_id} for image_id in truth.image_ids.tolist()],
            "categories": [{"id": number, "name": name} for number, name in truth.categories],
            "annotations": [
                {"id": row, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
                for row, (image, category, box, area, crowd) in enumerate(columns, start=1)
            ],
        }
        annotated.createIndex()
        evaluation = COCOeval(annotated, annotated.loadRes(found.to_coco_results()), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    seconds = time.perf_counter() - started
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    of_categories = [values[values > -1] for values in np.moveaxis(precision, 2, 0)]
    return {
        "numbers": evaluation.stats.tolist(),
        "of_categories": [float(known.mean()) if known.size else None for known in of_categories],
        "seconds": seconds,
        "extra_mb": memory_mb()["VmHWM"] - before,
    }


def compare_with_pycocotools() -> list[Row]:
    """Time and memory; fails where a number differs."""
    with tempfile.TemporaryDirectory() as folder:
        truth = draw_ground_truth(IMAGES)
        _save(Path(folder), truth, draw_detections(truth))
        ours = in_fresh_process(score_ours, folder, 5)["result"]
        plain = in_fresh_process(score_plain, folder)["result"]
    if (ours["numbers"], ours["of_categories"]) != (plain["numbers"], plain["of_categories"]):
        raise AssertionError(f"the numbers differ: {ours} and {plain}")
    median = statistics.median(ours["seconds"])
    spread = max(abs(seconds - median) for seconds in ours["seconds"]) / median
    name = f"scores of {IMAGES:,} images x {DETECTIONS}"
    note = (
        f"pycocotools once; 12 numbers and {CATEGORIES} categories equal to the last bit (AP {ours['numbers'][0]:.4f})"
    )
    return [
        Row(f"{name}: time", median, plain["seconds"], "s", "lower", note, spread),
        Row(f"{name}: memory", ours["extra_mb"], plain["extra_mb"], "MB", "lower", "over what the columns take"),
    ]


def compare_with_scoring_in_line() -> list[Row]:
    """How many steps the quickstart's model takes meanwhile, and how much later they are done."""
    truth = draw_ground_truth(IMAGES)
    found = draw_detections(truth)
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["tracking.enabled=false", f"data.root={folder}/data", f"run.storage={folder}/runs"]
        overrides += ["data.generate.num_train=64", "data.generate.num_val=2"]
        job = prepare_job(load_config(QUICKSTART, overrides), lambda line: None)
        batches = LocalBatches(job.data.plan(1, 0), *job.data.loaders())
        loop = TrainingLoop(job, LocalContext(), batches, MemoryTracker())
        stream = batches.train_batches(0, 4)
        shares = [next(stream) for _ in range(4)]
        meanwhile: list[int] = []

        threads = max(1, torch.get_num_threads() - 1)
        torch.set_num_threads(threads)

        def steps(scoring: threading.Thread | None = None) -> None:
            done = 0
            for number in range(STEPS):
                loop._train_step(number, shares[number % len(shares)])
                done += scoring is not None and scoring.is_alive()
            if scoring is not None:
                scoring.join()
                meanwhile.append(done)

        def in_line() -> None:
            evaluate_detections(truth, found)
            steps()

        def beside() -> None:
            scoring = threading.Thread(target=lambda: ScorerProcess(truth, found).result(60.0))
            scoring.start()
            steps(scoring)

        times = alternate({"alone": steps, "in line": in_line, "beside": beside}, rounds=3)
    alone = times["alone"].median
    lost, lost_in_line = times["beside"].median - alone, times["in line"].median - alone
    note = f"over {STEPS} steps of {alone / STEPS:.2f} s on {threads} thread(s)"
    taken = statistics.median(meanwhile)
    return [
        Row("training delayed by scoring", lost, lost_in_line, "s", "lower", f"{note}; baseline: ours in line"),
        Row("steps taken while scoring runs", taken, 0, "steps", "higher", "in line none"),
    ]


def run() -> list[Row]:
    """All of it."""
    return [*compare_with_pycocotools(), *compare_with_scoring_in_line()]


def _save(folder: Path, truth: GroundTruth, found: DetectionTable) -> None:
    with (folder / "columns.npz").open("wb") as file:
        write_columns(file, truth, found)


def _load(folder: str) -> tuple[GroundTruth, DetectionTable]:
    with Path(folder, "columns.npz").open("rb") as file:
        return read_columns(file)
