"""A registered model behind MLflow's own server, asked over HTTP."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_folder import encoded
from mlflow_store import empty_store
from observing import observe, small_config
from PIL import Image
from ports import free_port
from tiny import make_dataset

import detr_ray
from detr_ray.runtime.registration import register

Post = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set and a store whose champion is a tiny model."""
    folder = tmp_path_factory.mktemp("served")
    make_dataset(folder / "data", num_train=8, num_val=3, image_size=(40, 90))
    uri = empty_store(folder)
    config = small_config(folder / "data", folder / "runs", "train.max_steps=1", f"tracking.uri={uri}")
    seen = observe(config)
    assert seen.result is not None
    register(config, seen.result.run_path, lambda line: None)
    return folder


def texts(folder: Path, count: int = 3) -> list[str]:
    images = sorted((folder / "data" / "val2017").iterdir())[:count]
    return [base64.b64encode(image.read_bytes()).decode() for image in images]


def expected(folder: Path, count: int = 3, **arguments: Any) -> list[dict[str, Any]]:
    images = sorted((folder / "data" / "val2017").iterdir())[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        found = detr_ray.load_model("models:/detr@champion").predict(images, **arguments)
    return [{**one.to_dict(), "image": f"image[{number}]"} for number, one in enumerate(found)]


@pytest.fixture(scope="module")
def post(folder: Path) -> Iterator[Post]:
    """Asks a server of MLflow that serves the champion."""
    port = free_port()
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # MLflow starts uvicorn by its name
        "PYTHONPATH": str(Path(detr_ray.__file__).parents[1]),
    }
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/detr@champion"]
    command += ["--env-manager", "local", "--port", str(port)]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True)
    try:
        wait_until_up(server, port, folder / "server.log")
        yield lambda content, kind="application/json": answer(port, content, kind)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 9)
        server.wait(timeout=10)


def wait_until_up(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


def answer(port: int, content: Any, kind: str) -> tuple[int, Any]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return error.code, json.loads(text) if text.startswith("{") else text


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_several_images_a_request_give_what_predict_gives(folder: Path, post: Post) -> None:
    images = texts(folder)
    forms = (
        {"dataframe_split": {"columns": ["image"], "data": [[image] for image in images]}},
        {"dataframe_records": [{"image": image} for image in images]},
        {"inputs": {"image": images}},
        {"inputs": [{"image": image} for image in images]},
        {"instances": [{"image": image} for image in images]},
    )
    for form in forms:
        code, content = post({**form, "params": {"threshold": 0.0}})
        assert code == 200, content
        assert content["predictions"] == expected(folder), form.keys()
    code, content = post({**forms[0], "params": {"threshold": 0.0, "top_k": 1}})
    assert [len(one["scores"]) for one in content["predictions"]] == [1, 1, 1]
    scores = [one["scores"][0] for one in content["predictions"]]
    code, content = post({**forms[0], "params": {"threshold": max(scores)}})
    assert sum(len(one["scores"]) for one in content["predictions"]) == 1
    code, content = post(forms[0])
    assert content["predictions"] == expected(folder), "by default all"


def png(size: tuple[int, int]) -> str:
    file = io.BytesIO()
    Image.new("1", size).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_cannot_be_answered_is_4xx_and_names_the_field(folder: Path, post: Post) -> None:
    (good,) = texts(folder, 1)
    whole = encoded("JPEG", size=(64, 64))
    broken = base64.b64encode(whole[: len(whole) // 2]).decode()

    def table(*images: Any, **params: Any) -> dict[str, Any]:
        rows = {"dataframe_split": {"columns": ["image"], "data": [[image] for image in images]}}
        return {**rows, "params": params} if params else rows

    asked: list[tuple[Any, str]] = [
        (table(good, "no base64!"), "image[1]: is no base64"),
        (table(base64.b64encode(b"no image").decode()), "image[0]"),
        (table(broken), "image"),
        (table(png((10_000, 10_001))), "image[0]: has 10,001 x 10,000 (height x width) pixels, and 50,000,000 are the"),
        (table(*[good] * 33), "image: holds 33 images; from 1 to 32 are taken at once"),
        (table(good, threshold=2.0), "threshold: is 2.0; give a number from 0 to 1"),
        (table(good, threshold="high"), "threshold"),
        (table(good, top_k=0), "top_k: is 0; give a whole number of at least 1"),
        ({"dataframe_split": {"columns": ["picture"], "data": [[good]]}}, "image"),
        ({"images": [good]}, "input"),
        (b"not JSON", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[1]", "JSON dictionary"),
    ]
    for content, said in asked:
        code, found = post(content)
        assert 400 <= code < 500 and said in str(found), (said, code, found)
        assert len(str(found)) < 3000, "the request's images are not sent back"
    code, found = post(b"x", "image/png")
    assert code == 415
    code, found = post(table(good, threshold=0.0))
    assert code == 200 and np.isfinite(found["predictions"][0]["scores"]).all()
