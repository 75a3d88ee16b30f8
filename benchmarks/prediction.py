"""Predicting on 128 images of COCO through Ray Data, against a plain loop that calls `predict` for each image.

    python -m benchmarks prediction
    DETR_RAY_BENCHMARK_IMAGES=16 python -m benchmarks prediction      # a short one, to see that it works

The model is a DETR with a ResNet-50 and random weights, at two sizes: a short side of 224 pixels, where the model
takes most of the time, and of 96, where reading and decoding do. Both read the same files and answer with all
detections, with torch's own number of threads in the loop. Ours is what `detr_ray.predict` does when Ray is there: data
tasks make batches of equal size, actors run the model, parts are written.

The rate is that of the passes after the first one over the same images, all in one job, by the clock at which results
arrive. So the start of Ray and of the actors does not count, which the note says, and neither do batches that were made
while the actors started. The loop has had a first pass as well. A third of COCO's 128 images have a shape of their own
and are batches of one; a larger data set has fuller batches.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, in_fresh_process
from benchmarks.pipeline import images_folder
from detr_ray.config import load_config
from detr_ray.prediction.job import BatchFindings

SIZES = ((224, 373), (96, 160))
TIMEOUT_S = 280
PASSES = 4


def _model(scratch: str) -> str:
    """A file of random weights of the published architecture."""
    from detr_ray.model import build_model

    path = Path(scratch) / "random.pth"
    if not path.exists():
        torch.manual_seed(0)
        torch.save({"model": build_model(load_config().model, 91).state_dict()}, path)
    return str(path)


def _images(folder: str) -> list[str]:
    most = int(os.environ.get("DETR_RAY_BENCHMARK_IMAGES", "128"))
    return sorted(map(str, Path(folder).glob("*.jpg")))[:most]


def _settings(size: int, longest: int) -> list[str]:
    return [f"eval.size={size}", f"eval.max_size={longest}", "eval.batch_size=8", "train.use_gpu=false"]


def plain_loop(scratch: str, folder: str, size: int, longest: int) -> dict[str, Any]:
    """Images a second of a loop over `predict`, in its second pass."""
    import detr_ray

    model = detr_ray.load_model(_model(scratch), load_config(None, _settings(size, longest)))
    images = _images(folder)
    started = 0.0
    for _ in range(2):
        started = time.perf_counter()
        for image in images:
            model.predict(image, device="cpu")
    return {"rate": len(images) / (time.perf_counter() - started), "threads": torch.get_num_threads()}


def through_ray_data(scratch: str, folder: str, size: int, longest: int) -> dict[str, Any]:
    """Images a second of the command's work, and seconds of everything before."""
    from detr_ray.engine.prediction_job import Wanted, prepare_prediction, write_parts
    from detr_ray.model_sources import load_model
    from detr_ray.prediction.results import ResultFolder
    from detr_ray.runtime.prediction import predict_on_cluster
    from detr_ray.runtime.prediction_actors import plan_actors
    from detr_ray.runtime.session import session_of

    config = load_config(None, _settings(size, longest))
    wanted = Wanted(_images(folder), None, None, None, 32)
    job = prepare_prediction(load_model(_model(scratch), config), config, wanted, lambda line: None)
    began = time.perf_counter()
    with session_of(config):
        actors = plan_actors(config, job, len(job.batches))
        arrivals: list[float] = []

        def timed(numbers: Sequence[int]) -> Iterator[BatchFindings]:
            for found in predict_on_cluster(job, numbers, config):
                arrivals.append(time.perf_counter())
                yield found

        with tempfile.TemporaryDirectory(dir=scratch) as out:
            results = ResultFolder(out, job)
            write_parts(job, results, results.open() * PASSES, timed, _silent)
    first_pass = arrivals[len(job.batches) - 1]
    return {
        "rate": len(job.index) * (PASSES - 1) / (arrivals[-1] - first_pass),
        "before": arrivals[0] - began,
        "actors": actors.count,
        "threads": actors.threads,
        "batches": len(job.batches),
    }


def _silent(line: str) -> None:
    pass


def run() -> list[Row]:
    """One row a size."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(images_folder(Path(scratch)) / "train2017")
        _model(scratch)
        for size, longest in SIZES:
            plain = in_fresh_process(plain_loop, scratch, folder, size, longest, timeout_s=TIMEOUT_S)["result"]
            ours = in_fresh_process(through_ray_data, scratch, folder, size, longest, timeout_s=TIMEOUT_S)["result"]
            note = (
                f"{ours['actors']} actors of {ours['threads']} threads, {ours['batches']} batches, the loop with "
                f"{plain['threads']} threads; first result {ours['before']:.0f} s after Ray began to start"
            )
            rows.append(Row(f"predict, short side {size}", ours["rate"], plain["rate"], "images/s", note=note))
    return rows
