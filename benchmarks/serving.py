"""Requests a second of the Ray service with 1 and 8 clients, with batching and without; median and 99th percentile.

    python -m benchmarks serving

A small model (ResNet-18, the quickstart's) with random weights answers images of 240 x 320 as PNG bodies, one replica
on all cores; then a DETR with a ResNet-50 at 320 pixels. Clients send the next request when the last one is answered.
Clients and service share the machine. Needs the extra ``serve``.
"""

from __future__ import annotations

import functools
import http.client
import io
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import Row, SkippedBenchmark
from detr_ray import load_model
from detr_ray.config import load_config
from detr_ray.data.label_map import LabelMap
from detr_ray.detector import build_detector
from detr_ray.detector.artifact import saved_model

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
MODELS = {
    "quickstart's model": (QUICKSTART, ()),
    "DETR R50 at 320 px": (None, ("model.backbone_weights=none", "eval={size: 320, max_size: 533}")),
}
SECONDS = 12.0


def run() -> list[Row]:
    """Each model with one and with eight clients."""
    try:
        from detr_ray.runtime.serving.service import service
    except ImportError as error:
        raise SkippedBenchmark(f"{error}: pip install 'detr_ray[serve]'") from error
    from detr_ray.runtime.cores import usable_cores
    from detr_ray.runtime.serving.settings import Batching, ServiceSettings

    rows = []
    for name, (file, overrides) in MODELS.items():
        found: dict[tuple[int, int], list[float]] = {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.pt")
            _write_model(path, file, overrides)
            for most in (1, 8):
                settings = ServiceSettings(port=_free_port(), cpus=usable_cores(), batching=Batching(most, 0.01))
                with service(functools.partial(load_model, str(path)), settings):
                    _load(settings.port, 2, 3.0)
                    for clients in (1, 8):
                        found[clients, most] = _load(settings.port, clients, SECONDS)
        for clients in (1, 8):
            batched, single = found[clients, 8], found[clients, 1]
            rows.append(
                Row(
                    f"{name}, {clients} clients, batches of up to 8 / none",
                    ours=len(batched) / SECONDS,
                    baseline=len(single) / SECONDS,
                    unit="requests/s",
                    note=f"p50, p99: {_percentiles(batched)} with, {_percentiles(single)} without",
                )
            )
    return rows


def _percentiles(seconds: list[float]) -> str:
    cuts = statistics.quantiles(seconds, n=100)
    return f"{cuts[49] * 1000:.0f}, {cuts[98] * 1000:.0f} ms"


def _write_model(path: Path, file: Path | None, overrides: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    config = load_config(file, list(overrides))
    labels = LabelMap.contiguous([(number, f"kind {number}") for number in range(1, 7)])
    model = build_detector(config.model, config.loss, labels.num_classes).model
    torch.save(saved_model(model, None, labels, config, 0), path)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _load(port: int, clients: int, seconds: float) -> list[float]:
    """How long each request took that was answered within the time."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)).save(file, "PNG")
    taken: list[float] = []
    end = time.perf_counter() + seconds

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while (started := time.perf_counter()) < end:
            connection.request("POST", "/predict", file.getvalue(), {"Content-Type": "image/png"})
            answer = connection.getresponse()
            content = answer.read()
            assert answer.status == 200, content
            if (now := time.perf_counter()) < end:
                taken.append(now - started)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken
