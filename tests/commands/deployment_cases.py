"""Cases of the commands that give models away: export and serve."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from commands.registry import Place, shows
from ports import free_port

from detr_ray import exporting
from detr_ray.data.label_map import LabelMap
from detr_ray.exporting import Agreement, ExportFormat, ExportSource
from detr_ray.prediction.requests import Limits
from detr_ray.runtime import cores
from detr_ray.runtime.serving import loading
from detr_ray.runtime.serving.settings import Batching, ServiceSettings

# export


@shows("export", "--to", "--out")
def export_to(place: Place) -> None:
    """The format's own writer gets the run's model, and what it wrote is the file."""
    sources: list[ExportSource] = []

    def writer(name: str) -> Any:
        def write(source: ExportSource, path: Path) -> Agreement:
            sources.append(source)
            path.write_text(name)
            return Agreement(0.25e-5, 1e-4, "all")

        return write

    fakes = {
        name: ExportFormat(writer(name), kind.suffix, False, kind.usage) for name, kind in exporting.FORMATS.items()
    }
    place.patch.setattr(exporting, "FORMATS", fakes)
    for name in fakes:
        path = place.folder / "deep" / f"{name}{fakes[name].suffix}"
        code, out, err = place.call("export", place.run, "--to", name, "--out", path)
        assert code == 0, err
        assert path.read_text() == name and f"wrote {path}" in out and "differs by 2.5e-06 at most" in out
        assert out.endswith(f"to use it: {fakes[name].usage}\n")
    assert {(one.size, one.max_size) for one in sources} == {(48, 96)} and len(sources) == len(fakes) == 4
    _, _, err = place.call("export", place.run, "--to", "pickle", "--out", place.folder / "a")
    assert err == "error: --to: 'pickle' is no format; one of onnx, onnx-image, torch, published\n"
    full = "/dev/full"  # a disk without room
    if Path(full).exists():
        code, _, err = place.call("export", place.run, "--to", "torch", "--out", full)
        assert (code, err) == (1, "error: --out: /dev/full could not be written: No space left on device\n")
    for argv, message in [
        (("--to", "torch"), "--out: is missing"),
        (("--out", "a"), "--to: is missing"),
        (("--to", "onnx", "--out", "a.pth"), "--out: a.pth ends in .pth; files of --to onnx end in .onnx"),
    ]:
        code, _, err = place.call("export", place.run, *argv)
        assert code == 2 and message in err


# serve


def served(place: Place, *argv: object, source: object = None) -> ServiceSettings:
    """What the command would start, with a model whose reading takes no time."""
    started: list[ServiceSettings] = []
    model = SimpleNamespace(source="a run", config=None, label_map=LabelMap.coco91())

    def run_service(load: Any, settings: ServiceSettings, say: Any) -> None:
        assert load() is model
        started.append(settings)

    def load_model(source: str, *_: Any, **__: Any) -> Any:
        assert source == str(place.run)
        return model

    place.patch.setattr(loading, "load_model", load_model)

    # In place of the real one, whose import is Ray Serve.
    place.patch.setitem(sys.modules, "detr_ray.runtime.serving.service", SimpleNamespace(run_service=run_service))
    port = free_port()
    code, _, err = place.call("serve", source or place.run, *(argv if "--port" in argv else ("--port", port, *argv)))
    assert code == 0, err
    (settings,) = started
    return settings


@shows("serve", "--host", "--port")
def serve_address(place: Place) -> None:
    place.patch.chdir(place.run.parent)
    assert served(place, source=place.run.name).host == "127.0.0.1", "of a path that is made absolute for replicas"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = place.call("serve", place.run, "--port", port)
        assert code == 2 and re.match(rf"error: --host, --port: cannot listen on 127.0.0.1:{port}: ", err)
    settings = served(place, "--host", "localhost", "--port", port)
    assert (settings.host, settings.port, settings.address) == ("localhost", port, f"http://localhost:{port}/")
    assert ServiceSettings(host="::1").address == "http://[::1]:8000/"


@shows("serve", "--replicas", "--max-replicas", "--cpus-per-replica")
def serve_replicas(place: Place) -> None:
    place.patch.setattr(cores, "usable_cores", lambda: 6)
    settings = served(place)
    assert (settings.replicas, settings.max_replicas, settings.cpus) == (1, 1, 1)
    settings = served(place, "--replicas", 2, "--cpus-per-replica", 3)
    assert (settings.replicas, settings.max_replicas, settings.cpus) == (2, 2, 3)
    assert served(place, "--max-replicas", 4).max_replicas == 4
    code, _, err = place.call("serve", place.run, "--replicas", 3, "--max-replicas", 2)
    assert code == 2 and "--max-replicas: 2 is less than --replicas (3)" in err
    for given, needed in ((("--replicas", 7), "7 x 1"), (("--max-replicas", 2, "--cpus-per-replica", 4), "2 x 4")):
        code, _, err = place.call("serve", place.run, *given)
        assert code == 2 and f"{needed} cores are more than the 6 of this machine" in err
    place.patch.setenv("RAY_ADDRESS", "127.0.0.1:6379")  # the cluster is asked when it is joined
    assert served(place, "--replicas", 7).replicas == 7


@shows("serve", "--max-batch", "--batch-wait-ms")
def serve_batches(place: Place) -> None:
    assert served(place).batching == Batching(8, 0.01)
    assert served(place, "--max-batch", 3, "--batch-wait-ms", 50).batching == Batching(3, 0.05)


@shows("serve", "--max-request-mb", "--max-megapixels")
def serve_limits(place: Place) -> None:
    assert served(place).limits == Limits()
    limits = served(place, "--max-request-mb", 5, "--max-megapixels", 2).limits
    assert (limits.request_bytes, limits.image_pixels) == (5 << 20, 2_000_000)
