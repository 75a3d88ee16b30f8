"""Every option of every command does something: one case an option, and none without.

The options are read from the commands' own help. Run one: ``pytest tests/commands -k picture-score``.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from coco_folder import CocoFolder, encoded
from mlflow_store import empty_store
from observing import observe, small_config
from PIL import Image
from ports import free_port
from tiny import make_dataset

from detr_ray.__main__ import COMMANDS
from detr_ray.config import Config
from detr_ray.data import inspection
from detr_ray.data.formats import open_split
from detr_ray.engine.job import TrainJob, prepare_job
from detr_ray.runtime.search.results import SearchResult
from detr_ray.search import Trial
from detr_ray.search.confirmation import Confirmation, compare
from detr_ray.tracking import MlflowTracker, Timing
from detr_ray.tracking.run_progress import RunProgress


class Place:
    """What a case works with: a data set, a trained run, and commands that are called in this process."""

    def __init__(self, data: Path, run: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.data, self.run, self.folder, self.patch = data, run, folder, patch

    def config(self, *overrides: str) -> Config:
        return small_config(self.data, self.folder / "runs", f"eval.checkpoint={self.run}", *overrides)

    def file(self, *overrides: str) -> str:
        """The configuration as a file."""
        path = self.folder / "config.yaml"
        path.write_text(self.config(*overrides).to_yaml())
        return str(path)

    def call(self, command: str, *argv: object) -> tuple[int, str, str]:
        """Exit code, output and errors."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = importlib.import_module(f"detr_ray.{command}").main([str(item) for item in argv])
        return code, out.getvalue(), err.getvalue()

    def done(self, command: str, *argv: object) -> str:
        """Output of a command that succeeds with this place's configuration."""
        code, out, err = self.call(command, "--config", self.file(), *argv)
        assert code == 0, err + out
        return out


def options_of(command: str) -> list[str]:
    """The options of a command, as its help lists them."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert importlib.import_module(f"detr_ray.{command}").main(["--help"]) == 0
    return sorted(set(re.findall(r"^  (?:-\w, )?(--[a-z][a-z-]*)", out.getvalue(), re.MULTILINE)))


Case = Callable[[Place], None]
CASES: dict[tuple[str, str], Case] = {}
OF_ALL: dict[str, Callable[[Place, str], None]] = {}


def shows(command: str, *options: str) -> Callable[[Case], Case]:
    """Says which options of a command a case shows."""

    def register(case: Case) -> Case:
        CASES.update({(command, option): case for option in options})
        return case

    return register


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set of 16 and 4 images, and a run of two steps on it."""
    folder = tmp_path_factory.mktemp("commands")
    data = make_dataset(folder / "shapes", num_train=16, num_val=4, image_size=(40, 90))
    seen = observe(small_config(data, folder / "runs", "run.name=trained", "train.max_steps=2", "optim.lr=1e-2"))
    assert seen.result is not None
    return data, Path(seen.result.run_path)


@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command in COMMANDS for option in options_of(command)]
)
def test_option_does_what_it_says(
    command: str, option: str, trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = Place(*trained, tmp_path, monkeypatch)
    if option in OF_ALL:
        OF_ALL[option](place, command)
    else:
        assert (command, option) in CASES, f"{command} {option} has no case: write one that sees what it does"
        CASES[command, option](place)


def test_there_is_no_case_of_an_option_that_is_gone() -> None:
    assert [case for case in CASES if case[1] not in options_of(case[0])] == []


# Options of all commands


def config(place: Place, command: str) -> None:
    """Files are read in their order, and what is on the command line wins."""
    first, second = place.folder / "first.yaml", place.folder / "second.yaml"
    first.write_text("{train: {epochs: 5, keep_last: 6}, optim: {lr: 0.5}}")
    second.write_text("{train: {epochs: 7}, optim: {lr: 0.25}}")
    code, out, _ = place.call(command, "--config", first, "--config", second, "optim.lr=0.125", "--print-config")
    values = yaml.safe_load(out)
    assert code == 0 and (values["train"]["epochs"], values["train"]["keep_last"]) == (7, 6)
    assert values["optim"]["lr"] == 0.125


def print_config(place: Place, command: str) -> None:
    """Prints, and does nothing else."""
    code, out, _ = place.call(command, "--config", place.file(), "--print-config", "run.name=a")
    assert code == 0 and yaml.safe_load(out) == place.config("run.name=a").to_dict()
    assert not (place.folder / "runs").exists()


def help_text(place: Place, command: str) -> None:
    for spelled in ("-h", "--help"):
        code, out, _ = place.call(command, spelled, "--config", "not-there.yaml")
        assert code == 0 and f"python -m detr_ray.{command}" in out and "data.window  (" in out


OF_ALL |= {"--config": config, "--print-config": print_config, "--help": help_text}


# evaluate


@shows("evaluate", "--json")
def evaluate_json(place: Place) -> None:
    path = place.folder / "numbers.json"
    out = place.done("evaluate", "--json", path)
    content = json.loads(path.read_text())
    assert content["checkpoint"].startswith(str(place.run)) and content["checkpoint"].endswith("model.pt")
    line = next(line for line in out.splitlines() if line.startswith("AP50 "))
    assert line.split()[1] == f"{content['metrics']['AP50']:.3f}"
    assert "numbers.json" not in place.done("evaluate")


@shows("evaluate", "--detections")
def evaluate_detections(place: Place) -> None:
    path = place.folder / "found.json"
    place.done("evaluate", "--detections", path)
    rows = json.loads(path.read_text())
    val = open_split(str(place.data), None, "val")
    assert len(rows) == 4 * 6 and {row["image_id"] for row in rows} == set(val.image_ids.tolist())
    assert {row["category_id"] for row in rows} <= {category for category, _ in val.categories}
    assert all(len(row["bbox"]) == 4 and 0 < row["score"] < 1 for row in rows)


@shows("evaluate", "--scores")
def evaluate_scores(place: Place) -> None:
    path = place.folder / "scores.json"
    out = place.done("evaluate", "--scores", path)
    content = json.loads(path.read_text())
    val = open_split(str(place.data), None, "val")
    assert {int(i) for i in content["categories"]} == {i for i, _ in val.categories}
    assert content["all"]["boxes"] == len(val.category_ids) and len(content["all"]["curves"]["recall"]) == 21
    assert content["measured_on"]["eval.size"] == place.config().eval.size
    assert f"scores       {path}" in out


def picture(place: Place, *argv: object) -> np.ndarray:
    path = place.folder / "picture.png"
    path.unlink(missing_ok=True)
    place.done("evaluate", "--picture", path, *argv)
    return np.asarray(Image.open(path).convert("RGB"), int)


@shows("evaluate", "--picture")
def evaluate_picture(place: Place) -> None:
    drawn = picture(place, "--picture-score", 1)
    assert drawn.shape[1] > 4 * 256, "all four images, in a row"
    white = (drawn == 255).all(axis=2).sum()
    assert white > 100, "the annotated boxes"


@shows("evaluate", "--picture-images")
def evaluate_picture_images(place: Place) -> None:
    one, two = (picture(place, "--picture-images", count, "--picture-score", 1) for count in (1, 2))
    assert 256 < one.shape[1] < 2 * 256 < two.shape[1] < 3 * 256
    assert np.array_equal(one[:, :260], two[:, :260]), "the first image is the same one"


@shows("evaluate", "--picture-score")
def evaluate_picture_score(place: Place) -> None:
    """Boxes of at least this score: fewer the higher it is; by default from one half on."""
    path = place.folder / "found.json"
    place.done("evaluate", "--detections", path)
    scores = sorted(row["score"] for row in json.loads(path.read_text()))
    bare = picture(place, "--picture-score", 1)
    assert np.array_equal(picture(place, "--picture-score", scores[-1] + 1e-6), bare)
    best, most, each = (
        int((picture(place, "--picture-score", score) != bare).any(axis=2).sum())
        for score in (scores[-1] - 1e-6, scores[len(scores) // 2], 0)
    )
    assert 0 < best < most < each
    assert scores[-1] < 0.5 and np.array_equal(picture(place), bare)


# predict


def predicted(place: Place, *argv: object) -> Path:
    """The folder of the results of a command that succeeds; of the validation images, if no others are given."""
    out = place.folder / f"predicted-{len(list(place.folder.iterdir()))}"
    images = () if "--images" in argv else ("--images", place.data / "val2017")
    place.done("predict", *images, "--out", out, *argv)
    return out


def results(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())


@shows("predict", "--images", "--out")
def predict_images(place: Place) -> None:
    out = predicted(place, "--images", *sorted((place.data / "val2017").iterdir())[:2])
    found = results(out)
    assert {row["image_id"] for row in found} == {1, 2} and len(found) == 2 * 6


@shows("predict", "--root")
def predict_root(place: Place) -> None:
    path = max((place.data / "val2017").iterdir())
    with Image.open(path) as image:
        named = {"id": 5, "file_name": path.name, "height": image.height, "width": image.width}
    (place.folder / "one.json").write_text(json.dumps({"images": [named]}))
    out = predicted(place, "--images", place.folder / "one.json", "--root", place.data / "val2017")
    assert {row["image_id"] for row in results(out)} == {5} and not (out / "bad_images.txt").read_text()


@shows("predict", "--to")
def predict_to(place: Place) -> None:
    beside = {"prediction.json", "parts", "bad_images.txt"}
    for formats, written in (("coco", {"results.json"}), ("csv,pictures", {"predictions.csv", "pictures"})):
        assert {path.name for path in predicted(place, "--to", formats).iterdir()} == beside | written


@shows("predict", "--threshold")
def predict_threshold(place: Place) -> None:
    everything = results(predicted(place))
    middle = sorted(row["score"] for row in everything)[12]
    assert results(predicted(place, "--threshold", middle)) == [row for row in everything if row["score"] >= middle]


@shows("predict", "--top-k")
def predict_top_k(place: Place) -> None:
    assert len(results(predicted(place, "--top-k", 2))) == 4 * 2


@shows("predict", "--scores")
def predict_scores(place: Place) -> None:
    """None of this model's scores reaches the best threshold of this file."""
    (place.folder / "scores.json").write_text(json.dumps({"all": {"threshold": 0.99}, "categories": {}}))
    best = predicted(place, "--threshold", "best_f1", "--scores", place.folder / "scores.json")
    assert results(best) == []


@shows("predict", "--picture-score")
def predict_picture_score(place: Place) -> None:
    """By default nothing is drawn: all scores of this model are below one half."""
    plain, drawn = (predicted(place, "--to", "pictures", *argv) / "pictures" for argv in ((), ("--picture-score", 0)))
    for path in plain.iterdir():
        assert path.read_bytes() != (drawn / path.name).read_bytes()


@shows("predict", "--part-images")
def predict_part_images(place: Place) -> None:
    counts = [len(list((predicted(place, *argv) / "parts").iterdir())) for argv in ((), ("--part-images", 1))]
    assert counts[0] == 1 < counts[1] <= 4


# tune


def tuned(place: Place, *argv: object) -> tuple[list[bool], list[int], str]:
    """Calls the command with a search that is over at once: its wishes to resume, numbers of seeds, and output."""
    from detr_ray.runtime.search import confirm, search

    resumed, seeds = [], []
    trial = Trial("t000", {"optim.lr": 1e-4}, "finished").measured(1, 4, 0.5, "max")
    result = SearchResult("a", "/runs/a", "finished", "val/AP", "max", (trial,), {}, 1.0, trial, {"optim.lr": 1e-4})

    def run_search(config: Config, say: Callable[[str], None], *, resume: bool, **hooks: object) -> SearchResult:
        resumed.append(resume)
        return result

    def confirmed(config: Config, found: SearchResult, number: int, *hooks: object) -> Confirmation:
        assert found is result
        seeds.append(number)
        return compare([0.5] * number, [0.25] * number, "max")

    place.patch.setattr(search, "run_search", run_search)
    place.patch.setattr(confirm, "confirm", confirmed)
    return resumed, seeds, place.done("tune", "tune.space={optim.lr: {uniform: [0, 1]}}", *argv)


@shows("tune", "--resume")
def tune_resume(place: Place) -> None:
    assert tuned(place)[0] == [False] and tuned(place, "--resume")[0] == [True]


@shows("tune", "--confirm")
def tune_confirm(place: Place) -> None:
    _, seeds, without = tuned(place)
    assert seeds == []
    _, seeds, out = tuned(place, "--confirm", 4)
    assert seeds == [4] and "0.2500" in out.removeprefix(without)
    _, seeds, out = tuned(place, "--confirm", 3)
    assert seeds == [3] and out.startswith("WARNING: --confirm 3 cannot tell a difference from noise")


# check


def report_of(place: Place, *argv: object) -> dict:
    path = place.folder / "report.json"
    place.call("check", "--config", place.file(), "--json", path, *argv)
    return json.loads(path.read_text())


@shows("check", "--json")
def check_json(place: Place) -> None:
    report = report_of(place)
    assert report["splits"]["train"]["images"] == 16 and report["splits"]["val"]["images"] == 4
    code, out, _ = place.call("check", "--config", place.file(), "--json", "-")
    assert json.loads(out)["splits"] == report["splits"] and code in (0, 1)
    assert "report.json" not in place.call("check", "--config", place.file())[1]


@shows("check", "--decode")
def check_decode(place: Place) -> None:
    """An image whose header and end are sound and whose pixels are not is found by decoding alone.

    The first of a kind is always decoded: sound ones come before it, and are not looked at together with it.
    """
    folder = CocoFolder(place.folder / "damaged")
    place.patch.setattr(inspection, "_GROUP_IMAGES", 1)
    for number in range(2):
        folder.add("train", f"{number}.png", encoded("PNG", seed=number))
    folder.fill("val", 2)
    content = bytearray(encoded("PNG", seed=999))
    content[len(content) // 2] ^= 255
    folder.add("train", "damaged.png", bytes(content))
    root = f"data.root={folder.write()}"
    assert report_of(place, root)["splits"]["train"]["bad_images"] == []
    found = report_of(place, root, "--decode")["splits"]["train"]
    assert found["decoded"] is True and len(found["bad_images"]) == 1


@shows("check", "--cluster")
def check_cluster(place: Place) -> None:
    """Looks for the cluster, which is not there."""
    import ray

    if ray.is_initialized():
        pytest.skip("this process uses a Ray already")
    port = free_port()
    place.patch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    keys = ("train.launcher=ray",)
    found = [f for f in report_of(place, "--cluster", *keys)["findings"] if f["area"] == "cluster"]
    assert len(found) == 1 and found[0]["level"] == "error" and str(port) in found[0]["message"]
    assert not [f for f in report_of(place, *keys)["findings"] if f["area"] == "cluster"]


# prepare


@shows("prepare", "--shards")
def prepare_shards(place: Place) -> None:
    place.done("prepare", "--shards", place.folder / "packed")
    for split, count in (("train", 16), ("val", 4)):
        packed = open_split(None, _Shards(str(place.folder / "packed" / split)), split)
        plain = open_split(str(place.data), None, split)
        assert len(packed) == count and np.array_equal(packed.boxes_xywh_px, plain.boxes_xywh_px)


@shows("prepare", "--to", "--out")
def prepare_to(place: Place) -> None:
    place.done("prepare", "--to", "yolo", "--out", place.folder / "yolo")
    assert (place.folder / "yolo" / "data.yaml").is_file()
    for split in ("train", "val"):
        found, plain = open_split(str(place.folder / "yolo"), None, split), open_split(str(place.data), None, split)
        assert found.fingerprint == plain.fingerprint


class _Shards:
    annotations = images = None

    def __init__(self, shards: str) -> None:
        self.shards: str | None = shards


@shows("prepare", "--shard-megabytes")
def prepare_shard_megabytes(place: Place) -> None:
    """Some megabytes of images: several files, or one."""
    folder = CocoFolder(place.folder / "large")
    for number in range(140):
        folder.add("train", f"{number}.png", encoded("PNG", size=(100, 100), seed=number), size=(100, 100))
    folder.fill("val", 1)
    root = f"data.root={folder.write()}"
    counts = []
    for megabytes in (1, 100):
        place.done("prepare", root, "--shards", place.folder / f"at-{megabytes}", "--shard-megabytes", megabytes)
        counts.append(len(list((place.folder / f"at-{megabytes}" / "train").glob("shard-*.parquet"))))
    assert counts[0] > counts[1] == 1
    code, _, err = place.call("prepare", root, "--shards", place.folder / "none", "--shard-megabytes", 0)
    assert code == 2 and "--shard-megabytes" in err


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
    opened: list[Image.Image] = []
    place.patch.setattr(ImageShow, "show", lambda image, title: bool(opened.append(image)) or len(opened) > 1)
    place.patch.setattr(sys, "platform", "linux")
    place.patch.delenv("DISPLAY", raising=False)
    place.patch.delenv("WAYLAND_DISPLAY", raising=False)
    batch = ("show", "--config", place.file(), "batch", "--images", 1)
    code, _, err = place.call(*batch)
    assert code == 2 and "no display" in err
    place.patch.setenv("WAYLAND_DISPLAY", "wayland-0")
    place.patch.setattr(shutil, "which", lambda program: None)
    code, _, err = place.call(*batch)
    assert code == 2 and "no program that shows pictures (xdg-open" in err and opened == []
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
    code, _, err = place.call("show", "--config", place.file(), "predictions", "--image", "absent.jpg")
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
    assert place.call("show", "--config", place.file(), "predictions", "--score", "2")[0] == 2


@shows("show", "--layer")
def show_layer(place: Place) -> None:
    """The last one by default; there are two."""
    best = ("decoder", "--images", 1, "--score", 1)
    assert shown(place, *best, "--layer", 1)[1] != shown(place, *best, "--layer", 2)[1] == shown(place, *best)[1]
    code, _, err = place.call("show", "--config", place.file(), "decoder", "--layer", 3)
    assert code == 2 and "1 to 2" in err


@shows("show", "--point")
def show_point(place: Place) -> None:
    """That the picture has the attention of this point: ``tests/engine/test_pictures.py``."""
    near, far = (shown(place, "encoder", "--point", point)[1] for point in ("2,2", "38,38"))
    assert near != far
    code, _, err = place.call("show", "--config", place.file(), "encoder", "--point", "999,2")
    assert code == 2 and "outside" in err
    assert place.call("show", "--config", place.file(), "encoder", "--point", "2")[0] == 2


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


import deployment_cases  # noqa: E402, F401 - further cases, which need what is above
