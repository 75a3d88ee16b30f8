"""Predicting on 128 images of COCO through Ray Data, against a plain loop that calls `predict` for each image.

    python -m benchmarks prediction

The model is a DETR with a ResNet-50 and random weights, at two sizes: a short side of 320 pixels, where the model
takes most of the time, and of 96, where reading and decoding do. Both read the same files and answer with all
detections. Ours is what `detr_ray.predict` does when Ray is there: data tasks make batches of equal size, an actor runs
the model, parts are written. The rate is that of the whole job, with the start of the actor, which the note says too:
batches that were made meanwhile wait for it, so that a rate after the first batch would flatter.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, in_fresh_process
from benchmarks.pipeline import images_folder
from detr_ray.config import load_config

SIZES = ((320, 533), (96, 160))


def _model(scratch: str) -> str:
    """A file of random weights of the published architecture."""
    from detr_ray.model import build_model

    path = Path(scratch) / "random.pth"
    if not path.exists():
        torch.manual_seed(0)
        torch.save({"model": build_model(load_config().model, 91).state_dict()}, path)
    return str(path)


def _settings(size: int, longest: int) -> list[str]:
    return [f"eval.size={size}", f"eval.max_size={longest}", "eval.batch_size=8", "train.use_gpu=false"]


def plain_loop(scratch: str, folder: str, size: int, longest: int) -> dict[str, Any]:
    """Images a second of a loop over `predict`."""
    import detr_ray

    model = detr_ray.load_model(_model(scratch), load_config(None, _settings(size, longest)))
    images = sorted(Path(folder).glob("*.jpg"))
    model.predict(images[0], device="cpu")
    started = time.perf_counter()
    for image in images:
        model.predict(image, device="cpu")
    return {"rate": len(images) / (time.perf_counter() - started)}


def through_ray_data(scratch: str, folder: str, size: int, longest: int) -> dict[str, Any]:
    """Images a second of the command's work, and seconds until the first batch was there."""
    from detr_ray.engine.prediction_job import Wanted, prepare_prediction, write_parts
    from detr_ray.model_sources import load_model
    from detr_ray.prediction.results import ResultFolder
    from detr_ray.runtime.prediction import predict_on_cluster
    from detr_ray.runtime.session import session_of

    config = load_config(None, _settings(size, longest))
    wanted = Wanted([folder], None, None, None, 32)
    job = prepare_prediction(load_model(_model(scratch), config), config, wanted, lambda line: None)
    with tempfile.TemporaryDirectory(dir=scratch) as out, session_of(config):
        results = ResultFolder(out, job)
        parts = results.open()
        begun: list[float] = []

        def predict(numbers: Any) -> Any:
            for found in predict_on_cluster(job, numbers, config):
                begun.append(time.perf_counter())
                yield found

        started = time.perf_counter()
        write_parts(job, results, parts, predict, lambda line: None)
        ended = time.perf_counter()
    return {"rate": len(job.index) / (ended - started), "start": begun[0] - started}


def run() -> list[Row]:
    """One row a size."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(images_folder(Path(scratch)) / "train2017")
        _model(scratch)
        for size, longest in SIZES:
            plain = in_fresh_process(plain_loop, scratch, folder, size, longest, timeout_s=600)["result"]
            ours = in_fresh_process(through_ray_data, scratch, folder, size, longest, timeout_s=600)["result"]
            note = f"the first batch came after {ours['start']:.1f} s"
            rows.append(Row(f"predict, short side {size}", ours["rate"], plain["rate"], "images/s", note=note))
    return rows
