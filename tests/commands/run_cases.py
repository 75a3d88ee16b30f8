"""Cases of the commands that show, report, send and register runs."""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from commands.registry import Place, shows
from mlflow_store import empty_store
from PIL import Image

from detr_ray.data.formats import open_split
from detr_ray.engine.job import TrainJob, prepare_job
from detr_ray.tracking import MlflowTracker, Timing
from detr_ray.tracking.run_progress import RunProgress

# watch


@shows("watch", "--once")
def watch_once(place: Place) -> None:
    """Says how far a run is that goes on for ever, and returns."""
    run = place.folder / "going-on"
    shutil.copytree(place.run, run)
    begun = RunProgress("going-on", total_steps=8, steps_per_epoch=4, step=3, written=time.time())
    (run / "progress.json").write_bytes(begun.to_json())
    code, out, err = place.call("watch", run, "--once")
    assert (code, err) == (0, "") and out.startswith("run going-on: running, step 3/8 (38%), epoch 0.75 of 2")


# send


def unsent_run(place: Place) -> Path:
    """A run's folder with a record that its store, which is away, did not take."""
    folder = place.folder / "unsent"
    tracker = MlflowTracker(
        folder / "tracking", uri="http://127.0.0.1:9", experiment="mine", run_name="unsent", run_uid="0" * 32,
        timing=Timing(finish=0.1),
    )  # fmt: skip
    tracker.log_metrics({"train/loss": 4.5}, 3)
    tracker.finish("FINISHED")
    return folder


@shows("send", "--run")
def send_run(place: Place) -> None:
    import mlflow

    store = f"sqlite:///{place.folder}/late.db"
    place.done("send", "--run", unsent_run(place), f"tracking.uri={store}")
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("mine")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    (point,) = client.get_metric_history(run.info.run_id, "train/loss")
    assert (point.step, point.value) == (3, 4.5)


@shows("send", "--timeout")
def send_timeout(place: Place) -> None:
    """The store stays away: it gives up after that time, which is minutes by default."""
    started = time.monotonic()
    code, _, _ = place.call("send", "--run", unsent_run(place), "--timeout", 1, "tracking.uri=http://127.0.0.1:9")
    assert code == 1 and 1 <= time.monotonic() - started < 100


# show


OUT = ("--out", "refused.png")
"""For what is refused: without a file, a machine without a display is."""


def shown(place: Place, what: str, *argv: object) -> tuple[str, bytes]:
    """Output, and the picture."""
    path = place.folder / "shown.png"
    path.unlink(missing_ok=True)
    return place.done("show", what, "--out", path, *argv), path.read_bytes()


@shows("show", "--out")
def show_out(place: Place) -> None:
    """Writes the format that the file is named after; without it, a program shows the picture."""
    from PIL import ImageShow

    for name, begins in (("a.png", b"\x89PNG"), ("b.svg", b"<?xml"), ("c.jpg", b"\xff\xd8")):
        place.done("show", "batch", "--images", 1, "--out", place.folder / name)
        assert (place.folder / name).read_bytes().startswith(begins)
    code, _, err = place.call("show", "--config", place.file(), "batch", "--out", place.folder / "a.txt")
    assert code == 2 and ".png" in err
    assert "MODEL: batch shows the data" in place.call("show", "batch", place.run)[2]
    assert "eval.checkpoint: is missing" in place.call("show", "training", "--out", place.folder / "a.png")[2]
    assert "epochs=3: neither a model nor a key" in place.call("show", "training", "epochs=3")[2]
    assert "WHAT: 'btach' is not known (did you mean batch?)" in place.call("show", "btach")[2]
    opened: list[Image.Image] = []
    place.patch.setattr(ImageShow, "show", lambda image, title: bool(opened.append(image)) or len(opened) > 1)
    place.patch.setattr(sys, "platform", "linux")
    place.patch.delenv("DISPLAY", raising=False)
    place.patch.delenv("WAYLAND_DISPLAY", raising=False)
    batch = ("show", "--config", place.file(), "batch", "--images", 1)
    code, out, err = place.call(*batch)
    assert code == 2 and "no display" in err and out == "", "said before anything is read"
    place.patch.setenv("WAYLAND_DISPLAY", "wayland-0")
    place.patch.setattr(shutil, "which", lambda program: None)
    code, out, err = place.call(*batch)
    assert code == 2 and "no program that shows pictures (xdg-open" in err and opened == [] and out == ""
    place.patch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")
    assert place.call(*batch)[0] == 2, "no program showed it"
    place.done("show", "batch", "--images", 1)
    assert len(opened) == 2 and opened[1].size[0] > 300


@shows("show", "--images")
def show_images(place: Place) -> None:
    one, two = (Image.open(io.BytesIO(shown(place, "batch", "--images", count)[1])) for count in (1, 2))
    assert two.size[0] > 1.7 * one.size[0]


@shows("show", "--step")
def show_step(place: Place) -> None:
    first, other, again = (shown(place, "batch", "--step", step) for step in (0, 2, 0))
    assert first == again and first[0] != other[0] and first[1] != other[1]
    samples = [sample.image_id for sample in prepared(place).data.plan(1, 0).step(2)[0]]
    assert [int(line.split()[1]) for line in other[0].splitlines() if line.startswith("image ")] == samples


def prepared(place: Place) -> TrainJob:
    return prepare_job(place.config(), lambda line: None)


@shows("show", "--image")
def show_image(place: Place) -> None:
    """By id and by name: the same image; in validation, other than the first."""
    val = open_split(str(place.data), None, "val")
    by_id, by_name = (shown(place, "predictions", "--image", key) for key in (val.image_ids[2], val.file_name(2)))
    first = shown(place, "predictions", "--images", 1)
    assert by_id == by_name and by_id[1] != first[1]
    registered = (registry_of(place), "eval.checkpoint=models:/detr@champion")
    again = shown(place, "predictions", "--images", 1, *registered)[0]
    assert outcomes_in(again) == outcomes_in(first[0]) != []
    assert shown(place, "queries", "--images", 1, *registered)[0].splitlines()[-1].startswith("picture")
    code, _, err = place.call("show", "--config", place.file(), "predictions", "--image", "absent.jpg", *OUT)
    assert code == 2 and "absent.jpg" in err and val.file_name(0) in err


def outcomes_in(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.endswith(("matched", "confused", "false", "missed"))]


@shows("show", "--score")
def show_score(place: Place) -> None:
    """The fewer predictions count, the more annotations are missed."""

    def missed(score: float) -> int:
        said = shown(place, "predictions", "--images", 1, "--score", score)[0].splitlines()
        return int(next(line for line in said if "missed" in line).split()[0])

    boxes = len(open_split(str(place.data), None, "val").category_ids)
    assert missed(1) == boxes and missed(0) <= boxes
    assert place.call("show", "--config", place.file(), "predictions", "--score", "2", *OUT)[0] == 2


@shows("show", "--layer")
def show_layer(place: Place) -> None:
    """The last one by default; there are two."""
    best = ("decoder", "--images", 1, "--score", 1)
    assert shown(place, *best, "--layer", 1)[1] != shown(place, *best, "--layer", 2)[1] == shown(place, *best)[1]
    code, _, err = place.call("show", "--config", place.file(), "decoder", "--layer", 3, *OUT)
    assert code == 2 and "1 to 2" in err


@shows("show", "--point")
def show_point(place: Place) -> None:
    """That the picture has the attention of this point: ``tests/engine/test_pictures.py``."""
    near, far = (shown(place, "encoder", "--point", point)[1] for point in ("2,2", "38,38"))
    assert near != far
    code, _, err = place.call("show", "--config", place.file(), "encoder", "--point", "999,2", *OUT)
    assert code == 2 and "outside" in err
    assert place.call("show", "--config", place.file(), "encoder", "--point", "2", *OUT)[0] == 2


# report


@shows("report", "--out")
def report_out(place: Place) -> None:
    """Into that file, or into the run's folder; two runs into a file here."""
    place.done("report", place.run, "--out", place.folder / "one.html")
    assert "<h1>Run trained</h1>" in (place.folder / "one.html").read_text()
    place.patch.chdir(place.folder)
    place.done("report", place.run, place.run)
    assert "<h1>Runs trained and trained</h1>" in (place.folder / "comparison.html").read_text()
    code, _, err = place.call("report", place.folder / "absent")
    assert code == 2 and "absent" in err
    assert place.call("report")[0] == 2


# registry

_REGISTRIES: dict[Path, str] = {}


def registry_of(place: Place) -> str:
    """The configuration of a registry whose version 1 is the trained run; made once, since that takes seconds."""
    if place.run not in _REGISTRIES:
        _REGISTRIES[place.run] = f"tracking.uri={empty_store(place.run.parent / 'registry')}"
        place.done("registry", "register", place.run, _REGISTRIES[place.run])
    return _REGISTRIES[place.run]


@shows("registry", "--json")
def registry_json(place: Place) -> None:
    store = registry_of(place)
    (listed,) = json.loads(place.done("registry", "list", "--json", store))
    assert (listed["name"], listed["version"], listed["aliases"]) == ("detr", 1, ["champion"])
    assert json.loads(place.done("registry", "show", "champion", "--json", store)) == listed
    out = place.done("registry", "register", place.run, "--json", store)
    assert json.loads(out)["version"] == 1, "it is a version already, and what is said goes elsewhere"
    compared = json.loads(place.done("registry", "compare", "1", "champion", "--json", store))
    assert compared["versions"] == [1, 1] and compared["same_data"] and compared["config"] == {}
    assert compared["metrics"]["val/AP"] == [listed["metrics"]["val/AP"]] * 2
    table = place.done("registry", "list", store)
    assert table.splitlines()[1].split()[:2] == ["1", "champion"]


@shows("registry", "--reason")
def registry_reason(place: Place) -> None:
    """Kept where the champion moves; an action that gives no reason does not take one."""
    store = registry_of(place)
    client = mlflow_client(store)
    client.delete_registered_model_alias("detr", "champion")
    place.done("registry", "promote", 1, "--reason", "seen by eye", store)
    assert client.get_model_version("detr", "1").tags["champion.reason"] == "seen by eye"
    assert client.get_model_version_by_alias("detr", "champion").version == 1
    code, _, err = place.call("registry", "list", "--reason", "none", store)
    assert code == 2 and "--reason: means nothing for list" in err
    code, _, err = place.call("registry", "rollback", "--reason", "worse", store)
    assert code == 2 and "is the first champion" in err


def mlflow_client(store: str) -> Any:
    import mlflow

    return mlflow.MlflowClient(store.removeprefix("tracking.uri="))
