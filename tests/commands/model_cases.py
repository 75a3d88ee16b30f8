"""Cases of the commands that evaluate models, use them, and search for better ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from commands.registry import Place, shows
from PIL import Image

from detr_ray.config import Config
from detr_ray.data.formats import open_split
from detr_ray.runtime.search.results import SearchResult
from detr_ray.search import Trial
from detr_ray.search.confirmation import Confirmation, compare

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
