"""The real service: a process, Ray Serve, HTTP, and a browser."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import browser
import numpy as np
import psutil
import pytest
from PIL import Image
from ports import free_port
from tiny import fit_here, make_dataset, tiny_config

pytest.importorskip("grpc_reflection", reason="the extra serve is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

LIMIT_MB = 2


class Service:
    """A service in a process of its own.

    Attributes:
        address: where it is.
        run: the run whose model it serves.
        images: images of the run's validation set.
    """

    def __init__(self, run: Path, images: list[Path]) -> None:
        self.run, self.images = run, images
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        command = [
            sys.executable, "-m", "detr_ray.serve", str(run), "--port", str(self.port), "--max-batch", "4",
            "--max-request-mb", str(LIMIT_MB), "--max-megapixels", "50",
        ]  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self.lines: list[str] = []
        self._arrived: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            self._arrived.put(line)
        self._arrived.put(None)

    def wait_for(self, text: str, seconds: float = 240) -> None:
        while text not in (line := self._arrived.get(timeout=seconds) or "the process ended"):
            assert line != "the process ended", "".join(self.lines)

    def ask(self, path: str, data: bytes | None = None, kind: str = "", method: str | None = None) -> tuple[int, Any]:
        """Status and answer of a request."""
        headers = {"Content-Type": kind} if kind else {}
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("serving")
    data = make_dataset(folder / "shapes", num_train=16, num_val=12)
    run = fit_here(tiny_config(data, folder / "runs", "run.name=a", "train.max_steps=3", "optim.lr=1e-3"))
    started = Service(Path(run.run_path), sorted((data / "val2017").glob("*")))
    try:
        started.wait_for("serving at")
        yield started
    finally:
        started.process.terminate()
        started.process.wait(60)


def huge_png() -> bytes:
    """A file that says that it has 100 megapixels."""
    header = b"IHDR" + (10_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    start = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    return start + file.getvalue()[33:]


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def assert_same(answer: dict[str, Any], expected: Any) -> None:
    assert (answer["height"], answer["width"]) == expected.size
    assert answer["names"] == expected.names and answer["category_ids"] == expected.category_ids.tolist()
    np.testing.assert_allclose(answer["scores"], expected.scores, atol=1e-5)
    np.testing.assert_allclose(np.reshape(answer["boxes_xyxy_px"], (-1, 4)), expected.boxes_xyxy_px, atol=1e-3)


def test_answers_are_those_of_predict_for_many_clients_at_once(service: Service) -> None:
    from detr_ray import load_model

    assert service.ask("/health") == (200, {"status": "ok", "model": service.ask("/health")[1]["model"]})
    model = load_model(str(service.run))
    files = [path.read_bytes() for path in service.images]
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda data: service.ask("/predict", data, "image/png"), files))
    for (status, content), path in zip(answers, service.images, strict=True):
        assert status == 200
        assert_same(content["predictions"][0], model.predict(path))
    asked = {"image": [encoded(data) for data in files[:3]], "threshold": 0.2, "top_k": 2}
    status, content = service.ask("/predict", json.dumps(asked).encode(), "application/json")
    assert status == 200 and [one["image"] for one in content["predictions"]] == ["image[0]", "image[1]", "image[2]"]
    for answer, path in zip(content["predictions"], service.images, strict=False):
        assert_same(answer, model.predict(path, threshold=0.2, top_k=2))


def test_faults_are_refused_with_the_field_and_hurt_nobody(service: Service) -> None:
    good = service.images[0].read_bytes()
    faults: list[tuple[bytes | None, str, int, str]] = [
        (b"not an image", "image/png", 400, "image: not an image"),
        (good[: len(good) // 2], "image/png", 400, "image: damaged image"),
        (huge_png(), "image/png", 413, "image: has 10,000 x 10,000"),
        (b"image=abc", "application/json", 400, "the body is no JSON"),
        (b'{"image": "%%%"}', "application/json", 400, "image: is no base64"),
        (json.dumps({"image": encoded(good), "threshold": 2}).encode(), "application/json", 400, "threshold: is 2"),
        (json.dumps({"image": encoded(good), "threshold": "best_f1"}).encode(), "application/json", 400, "threshold: "),
        (bytes((LIMIT_MB << 20) + 1), "application/octet-stream", 413, "the body is longer"),
        (good, "text/plain", 415, "Content-Type: is text/plain"),
    ]
    for data, kind, status, message in faults:
        found, answer = service.ask("/predict", data, kind)
        assert found == status and answer["error"].startswith(message), (message, found, answer)
    assert service.ask("/predict?top_k=0", good, "image/png")[1]["error"].startswith("top_k: is")
    assert service.ask("/predict")[0] == 405 and service.ask("/else")[0] == 404
    mixed = {"image": [encoded(good), encoded(good[: len(good) // 2])]}
    found, answer = service.ask("/predict", json.dumps(mixed).encode(), "application/json")
    assert found == 400 and answer["error"].startswith("image[1]: damaged image")
    assert service.ask("/predict", good, "image/png")[0] == 200


def test_nobody_else_is_listened_to(service: Service) -> None:
    listening = {
        connection.laddr.ip
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == service.port
    }
    assert listening == {"127.0.0.1"}


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium here")
def test_a_person_drops_an_image_on_the_page(service: Service, tmp_path: Path) -> None:
    async def use() -> None:
        async with browser.opened(service.address) as page:
            assert await page.value("document.title") == "detr_ray"
            await page.value("get('threshold').value = 0; get('threshold').dispatchEvent(new Event('input'))")
            await page.drop("#drop", service.images[0])
            await page.until("document.querySelectorAll('#objects tr').length > 1")
            _, content = service.ask("/predict", service.images[0].read_bytes(), "image/png")
            scores = content["predictions"][0]["scores"]
            shown = await page.value(
                "[...document.querySelectorAll('#objects tr')].slice(1).map(r => r.cells[1].innerText)"
            )
            assert [float(text) for text in shown] == pytest.approx(scores, abs=6e-4)
            with Image.open(service.images[0]) as image:
                assert await page.value("[get('picture').width, get('picture').height]") == list(image.size)
            pixels = (
                f"Array.from(get('picture').getContext('2d').getImageData(0, 0, {image.width}, {image.height}).data)"
            )
            plain = np.asarray(Image.open(service.images[0]).convert("RGBA"))
            drawn = np.array(await page.value(pixels)).reshape(plain.shape)
            changed = (np.abs(drawn - plain) > 40).any(axis=2).mean()
            assert 0.01 < changed < 0.9, "boxes and names are drawn over the image"
            Path(tmp_path, "page.png").write_bytes(await page.picture())

            await page.value("get('threshold').value = 1; get('threshold').dispatchEvent(new Event('input'))")
            assert await page.value("document.querySelectorAll('#objects tr').length") == 1

            broken = tmp_path / "broken.png"
            broken.write_bytes(b"not an image")
            await page.drop("#drop", broken)
            message = await page.until("get('status').className === 'error' && get('status').innerText")
            assert message.startswith("image: not an image")

    asyncio.run(use())


def test_it_ends_when_it_is_told_to(service: Service) -> None:
    """The last test: what Ctrl-C does."""
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(90) == 0, "".join(service.lines)
    with socket.socket() as tried:
        assert tried.connect_ex(("127.0.0.1", service.port)) != 0
