"""A service under load: batches form, replicas share the work, and what is too much is refused."""

from __future__ import annotations

import functools
import http.client
import io
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ports import free_port
from tiny import fit_here, make_dataset, tiny_config

pytest.importorskip("grpc_reflection", reason="the extra serve is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("load")
    data = make_dataset(folder / "shapes", num_train=8, num_val=2)
    return fit_here(tiny_config(data, folder / "runs", "run.name=a", "train.max_steps=1")).run_path


def noting(source: str, notes: str, seconds: float) -> Any:
    """A model that takes long, and notes its process and the number of images of each forward pass."""
    from detr_ray import load_model

    model = load_model(source)
    detect = model.detect

    def noted(batch: Any, *arguments: Any) -> Any:
        with Path(notes).open("a") as file:
            file.write(f"{os.getpid()} {len(batch.images)}\n")
        time.sleep(seconds)
        return detect(batch, *arguments)

    model.detect = noted  # type: ignore[method-assign]
    return model


def served(run: str, notes: Path, seconds: float, clients: int, requests: int, **settings: Any) -> Counter[int]:
    """How often each status was answered, of requests of several clients at once."""
    from ray import cloudpickle

    from detr_ray.runtime.serving.service import service
    from detr_ray.runtime.serving.settings import ServiceSettings

    port = free_port()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    file = io.BytesIO()
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(file, "PNG")

    def ask(_: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("POST", "/predict", file.getvalue(), {"Content-Type": "image/png"})
        return connection.getresponse().status

    load = functools.partial(noting, run, str(notes), seconds)
    with service(load, ServiceSettings(port=port, **settings)), ThreadPoolExecutor(clients) as pool:
        return Counter(pool.map(ask, range(requests)))


def test_images_of_many_clients_share_batches_and_replicas(run: str, tmp_path: Path) -> None:
    from detr_ray.runtime.serving.settings import Batching

    notes = tmp_path / "notes"
    found = served(run, notes, 0.05, 8, 64, replicas=2, max_replicas=2, batching=Batching(4, 0.5))
    assert found == {200: 64}
    passes = [tuple(map(int, line.split())) for line in notes.read_text().splitlines()]
    assert sum(images for _, images in passes) == 64 and max(images for _, images in passes) <= 4
    assert len(passes) < 48, "most of them share a forward pass"
    assert len({process for process, _ in passes}) == 2


def test_what_is_too_much_is_refused_and_the_rest_is_answered(run: str, tmp_path: Path) -> None:
    from detr_ray.runtime.serving.settings import Batching

    found = served(run, tmp_path / "notes", 0.2, 80, 80, batching=Batching(1, 0.0))
    assert found.keys() == {200, 503}
    assert len((tmp_path / "notes").read_text().splitlines()) == found[200] < 80
