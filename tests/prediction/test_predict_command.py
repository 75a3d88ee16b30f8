"""The predict command: what it takes, what it writes, how it goes on, and what it refuses. Without Ray."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import tiny_config

from detr_ray import predict as command
from detr_ray.data.formats import open_split
from detr_ray.data.formats.bare_images import open_bare_images
from detr_ray.data.packing import write_shards
from detr_ray.engine.reporting.progress import FitResult
from detr_ray.evaluation import DetectionTable, GroundTruth, evaluate_detections
from detr_ray.prediction.results import ResultFolder
from detr_ray.runtime import cluster_address
from detr_ray.runtime.launch import evaluate


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = command.main([*map(str, arguments), "train.launcher=local", "train.use_gpu=false"])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def predicted(capsys: pytest.CaptureFixture[str], out: Path, *arguments: object) -> list[dict]:
    """COCO's results of a command that succeeds."""
    code, _, err = run(capsys, *arguments, "--out", out)
    assert code == 0, err
    assert json.loads((out / "prediction.json").read_text())["complete"] is True
    return json.loads((out / "results.json").read_text())


def as_table(rows: list[dict]) -> DetectionTable:
    return DetectionTable(
        np.array([row["image_id"] for row in rows], np.int64),
        np.array([row["category_id"] for row in rows], np.int64),
        np.array([row["bbox"] for row in rows], np.float32).reshape(-1, 4),
        np.array([row["score"] for row in rows], np.float32),
    )


def by_name(out: Path) -> dict[str, list[tuple]]:
    """What was found, by the images' names alone."""
    found: dict[str, list[tuple]] = {}
    for row in pq.read_table(out / "predictions.parquet").to_pylist():
        found.setdefault(Path(row["file_name"]).name, []).append(tuple(row.values())[2:])
    return found


@pytest.fixture(scope="module")
def coco(shapes: Path) -> list[str]:
    return ["--images", f"{shapes}/annotations/instances_val2017.json", "--root", f"{shapes}/val2017"]


def test_cocos_results_score_the_ap_of_evaluate_to_the_last_digit(
    trained: FitResult, shapes: Path, coco: list[str], tmp_path: Path, capsys
) -> None:
    config = tiny_config(
        shapes, tmp_path, f"eval.checkpoint={trained.run_path}", "eval.max_detections=7", "eval.max_size=60"
    )
    expected = evaluate(config)
    rows = predicted(capsys, tmp_path / "out", trained.run_path, *coco, "--part-images", 2)
    assert rows[0].keys() == {"image_id", "category_id", "bbox", "score"} and len(rows) == 6 * 7
    found = as_table(rows)
    truth = GroundTruth.from_columns(open_split(str(shapes), None, "val"))
    assert evaluate_detections(truth, found).summary == expected.metrics.summary
    there, here = expected.detections.sorted(), found.sorted()
    for name in ("image_ids", "category_ids", "boxes_xywh_px", "scores"):
        assert np.array_equal(getattr(there, name), getattr(here, name)), name


def test_images_are_the_same_ones_however_they_are_named(
    trained: FitResult, shapes: Path, tmp_path: Path, capsys
) -> None:
    """Sizes and names without the model; then boxes, of a folder and of shards."""
    write_shards(open_split(str(shapes), None, "val"), str(tmp_path / "shards"))
    folder = shapes / "val2017"
    (copied := tmp_path / "other" / "deeper").mkdir(parents=True)
    for path in folder.iterdir():
        shutil.copy(path, copied)
    (copied / "notes.txt").write_text("no image")
    annotations = f"{shapes}/annotations/instances_val2017.json"
    given = [
        [folder], [f"{folder}/*.jpg"], sorted(folder.iterdir()), [tmp_path / "shards"], [f"{tmp_path}/other/**/*"],
        [f"file://{copied}"], [min(folder.iterdir()), folder], [annotations],
    ]  # fmt: skip
    expected = [(path.name, _size(path)) for path in sorted(folder.iterdir())]
    for named in given:
        found = open_bare_images([str(one) for one in named], str(folder) if named == [annotations] else None)
        index = found.index
        names = [Path(name).name for name in index.file_names.to_pylist()]
        sizes = zip(index.heights.tolist(), index.widths.tolist(), strict=True)
        assert list(zip(names, sizes, strict=True)) == expected, named
        assert found.unreadable == () and not len(index.category_ids)
    boxes = []
    for number, images in enumerate((folder, tmp_path / "shards")):
        out = tmp_path / f"out{number}"
        assert run(capsys, trained.run_path, "--images", images, "--out", out, "--to", "parquet")[0] == 0
        boxes.append(by_name(out))
    assert len(boxes[0]) == 6 and boxes[0] == boxes[1]


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.height, image.width


def test_it_goes_on_where_it_was_interrupted(
    trained: FitResult, coco: list[str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [trained.run_path, *coco, "--part-images", 1]
    expected = predicted(capsys, tmp_path / "straight", *arguments)
    write, written = ResultFolder.write_part, []

    def interrupted(self: ResultFolder, part: int, findings: list) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        write(self, part, findings)
        written.append(part)

    with monkeypatch.context() as patch:
        patch.setattr(ResultFolder, "write_part", interrupted)
        code, out, _ = run(capsys, *arguments, "--out", tmp_path / "out")
        assert code == 130 and out.endswith("what is done is kept: the same command goes on with it\n")
    assert json.loads((tmp_path / "out" / "prediction.json").read_text())["complete"] is False
    assert not (tmp_path / "out" / "results.json").exists()
    parts = sorted((tmp_path / "out" / "parts").iterdir())
    before = [path.stat().st_mtime_ns for path in parts]
    assert len(parts) == 2
    code, out, _ = run(capsys, *arguments, "--out", tmp_path / "out")
    assert code == 0 and "6 images in 6 parts, of which 2 are done" in out
    assert [path.stat().st_mtime_ns for path in parts] == before
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == expected
    assert "of which 6 are done" in run(capsys, *arguments, "--out", tmp_path / "out", "--to", "csv")[1]
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 1 + len(expected)


def test_bad_images_are_listed_and_the_others_are_done(
    trained: FitResult, shapes: Path, tmp_path: Path, capsys
) -> None:
    folder = shutil.copytree(shapes / "val2017", tmp_path / "images")
    first, second, *rest = sorted(folder.iterdir())
    first.write_bytes(first.read_bytes()[:400])  # a header without pixels
    second.write_text("no image")
    out = tmp_path / "out"
    code, printed, err = run(
        capsys, trained.run_path, "--images", folder, "--out", out, "--to", "parquet,pictures", "--picture-score", 0
    )
    assert code == 0, err
    assert "detections on 4 of 6 images; 2 could not be read, see bad_images.txt" in printed
    lines = (out / "bad_images.txt").read_text().splitlines()
    assert len(lines) == 2 and {first.name in line for line in lines} == {True, False}
    assert any(line == f"{second}: not an image, or of a format that is not known" for line in lines)
    assert set(by_name(out)) == {path.name for path in rest}
    record = json.loads((out / "prediction.json").read_text())
    assert (record["complete"], record["images"], record["bad_images"]) == (True, 6, 2)
    assert {path.name for path in (out / "pictures").iterdir()} == {path.name for path in rest}
    with Image.open(out / "pictures" / rest[0].name) as drawn, Image.open(rest[0]) as plain:
        assert drawn.size == plain.size
        assert np.abs(np.asarray(drawn, int) - np.asarray(plain.convert("RGB"), int)).max() > 50


def test_pictures_with_another_score_are_drawn_again(trained: FitResult, shapes: Path, tmp_path: Path, capsys) -> None:
    image, out = min((shapes / "val2017").iterdir()), tmp_path / "out"
    times = []
    for score in (1, 0, 0):
        arguments = ("--images", image, "--out", out, "--to", "pictures", "--picture-score", score)
        assert run(capsys, trained.run_path, *arguments)[0] == 0
        (picture,) = (out / "pictures").iterdir()
        times.append((picture.read_bytes(), picture.stat().st_mtime_ns))
    assert times[0][0] != times[1][0] and times[1] == times[2]


def test_what_the_threshold_keeps_is_drawn(trained: FitResult, shapes: Path, tmp_path: Path, capsys) -> None:
    image, pictures = min((shapes / "val2017").iterdir()), []
    for more, said in [
        (["--threshold", 0.01], "pictures/ shows all"),
        ([], "pictures/ shows 0 of them: scores of at least 0.5"),
        (["--picture-score", 0.01], "pictures/ shows "),
        (["--threshold", 0.01, "--picture-score", 1], "pictures/ shows 0 of them: scores of at least 1"),
    ]:
        out = tmp_path / f"out{len(pictures)}"
        code, printed, _ = run(capsys, trained.run_path, "--images", image, "--out", out, "--to", "pictures", *more)
        assert code == 0 and "1 image in 1 part\n" in printed
        assert printed.splitlines()[-1].startswith(said)
        assert ("without --threshold all are kept" in printed) == ("--threshold" not in more)
        (picture,) = (out / "pictures").iterdir()
        pictures.append(picture.read_bytes())
    kept, usual, low, none = pictures
    assert kept == low != usual == none


def test_pictures_of_telephones_are_listed_and_not_passed_over(
    trained: FitResult, shapes: Path, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    shutil.copy(min((shapes / "val2017").iterdir()), folder / "b.jpg")
    with Image.open(folder / "b.jpg") as image:
        image.save(folder / "c.avif")
    code, printed, _ = run(capsys, trained.run_path, "--images", folder, "--out", tmp_path / "out")
    assert code == 0 and "detections on 2 of 3 images; 1 could not be read" in printed
    line = (tmp_path / "out" / "bad_images.txt").read_text()
    assert line.startswith(f"{folder}/a.HEIC: ") and line.endswith("HEIC is not read: convert it to JPEG\n")


def test_tables_say_names_and_boxes(trained: FitResult, shapes: Path, coco: list[str], tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    rows = predicted(capsys, out, trained.run_path, *coco, "--to", "coco,parquet,csv")
    table = pq.read_table(out / "predictions.parquet").to_pylist()
    with (out / "predictions.csv").open() as file:
        read = list(csv.DictReader(file))
    val = open_split(str(shapes), None, "val")
    names = dict(zip(val.image_ids.tolist(), val.file_names.to_pylist(), strict=True))
    for one, other, text in zip(rows, table, read, strict=True):
        assert other["category"] == text["category"] == dict(val.categories)[one["category_id"]]
        assert other["file_name"] == text["file_name"] == names[one["image_id"]]
        assert [other[key] for key in ("left", "top", "width", "height")] == one["bbox"]
        assert np.float32(text["score"]) == np.float32(one["score"])


def test_an_image_that_the_annotations_do_not_turn_is_predicted_as_it_is_stored(
    trained: FitResult, tmp_path: Path, capsys
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 66, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    images = [{"id": 5, "file_name": "a.jpg", "height": 40, "width": 66}]
    (tmp_path / "stored.json").write_text(json.dumps({"images": images}))
    images[0] |= {"height": 66, "width": 40}
    (tmp_path / "upright.json").write_text(json.dumps({"images": images}))
    widths = []
    for name in ("stored", "upright"):
        arguments = ["--images", tmp_path / f"{name}.json", "--root", tmp_path]
        rows = predicted(capsys, tmp_path / name, trained.run_path, *arguments)
        widths.append(rows)
    assert widths[0] != widths[1] and {row["image_id"] for row in widths[0] + widths[1]} == {5}


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--images: is missing"),
        (["--images", "DATA/val2017"], "--out: is missing"),
        (["--images", "DATA/absent", "--out", "OUT"], "DATA/absent: there is no such file or folder"),
        (["--images", "DATA/*.xyz", "--out", "OUT"], "DATA/*.xyz: no image matches"),
        (["--images", "DATA/annotations", "--out", "OUT"], "DATA/annotations: no image in it"),
        (["--images", "DATA/annotations/instances_val2017.json", "--out", "OUT"], "relative to is missing (--root)"),
        (["--images", "DATA/val2017", "--root", "DATA", "--out", "OUT"], "a root (--root) is for a COCO file"),
        (["--images", "DATA/a.json", "DATA/val2017", "--out", "OUT"], "a COCO file stands alone"),
        (["--images", "DATA/a.json", "--root", "DATA", "--out", "OUT"], "no such annotation file"),
        (
            ["--images", "https://example.org/a.jpg", "--out", "OUT"],
            "a.jpg: images behind web addresses are not listed",
        ),
        (["--images", "s3://me:hidden@bucket/a.jpg", "--out", "OUT"], "holds credentials"),
        (["--images", "DATA/val2017", "--out", "s3://me:hidden@bucket/out"], "holds credentials"),
        (["--images", "DATA/val2017", "--out", "OUT", "--to", "coco,xml"], "argument --to: 'xml' cannot be written"),
        (["--images", "DATA/val2017", "--out", "OUT", "--threshold", "2"], "must be a number from 0 to 1, or best_f1"),
        (["--images", "DATA/val2017", "--out", "OUT", "--top-k", "0"], "must be a whole number of at least 1"),
        (["--images", "DATA/val2017", "--out", "OUT", "eval.size=500"], "eval.size: must not exceed eval.max_size"),
        (
            ["--images", "DATA/val2017", "--out", "OUT", "model.num_queries=5"],
            "model.num_queries=5: changes nothing: RUN/checkpoints/",
        ),
        (["--images", "DATA/val2017", "--out", "DATA"], "--out: DATA holds something else (annotations)"),
        (["--images", "DATA/val2017", "--out", "DATA/annotations/instances_val2017.json"], "is a file; name a folder"),
    ],
)
def test_what_cannot_be_done_is_refused_first(
    arguments: list[str], message: str, trained: FitResult, shapes: Path, tmp_path: Path, capsys
) -> None:
    def filled(text: str) -> str:
        return text.replace("DATA", str(shapes)).replace("OUT", str(tmp_path / "out")).replace("RUN", trained.run_path)

    code, _, err = run(capsys, trained.run_path, *map(filled, arguments))
    assert code == 2 and filled(message) in err and "hidden" not in err
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_none_is_refused_first(shapes: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.pth").write_bytes(b"junk")
    for given, message in [
        ([tmp_path], "is neither a run nor a checkpoint"),
        ([tmp_path / "a.pth"], "a.pth is damaged or no torch file"),
        ([], "MODEL is missing: name it before --images"),
        (["models:detr@champion"], "models:detr@champion is no address of a model: give models:/NAME/VERSION"),
    ]:
        code, _, err = run(capsys, *given, "--images", shapes / "val2017", "--out", tmp_path / "out")
        assert code == 2 and message in err, err


def test_results_of_another_prediction_are_not_mixed(
    trained: FitResult, shapes: Path, coco: list[str], tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    predicted(capsys, out, trained.run_path, *coco)
    for more, message in [
        (["eval.size=40"], "eval.size: 48, now 40"),
        (["--threshold", "0.5"], "--threshold: None, now 0.5"),
        (["--part-images", "3"], "--part-images: 256, now 3"),
    ]:
        code, _, err = run(capsys, trained.run_path, *coco, "--out", out, *more)
        assert code == 2 and "holds the results of another prediction" in err and message in err
    code, _, err = run(capsys, trained.run_path, "--images", shapes / "train2017", "--out", out)
    assert code == 2 and "images: other images, or images of other names or sizes" in err
    scores, best = tmp_path / "scores.json", ["--threshold", "best_f1", "--scores", tmp_path / "scores.json"]
    scores.write_text('{"all": {"threshold": 0.1}, "categories": {}}')
    predicted(capsys, tmp_path / "best", trained.run_path, *coco, *best)
    scores.write_text('{"all": {"threshold": 0.2}, "categories": {}}')
    code, _, err = run(capsys, trained.run_path, *coco, "--out", tmp_path / "best", *best)
    assert code == 2 and "thresholds: other thresholds of categories" in err
    (out / "parts" / "part-000000.parquet").write_bytes(b"PAR1")
    code, _, err = run(capsys, trained.run_path, *coco, "--out", out)
    assert code == 2 and "part-000000.parquet is damaged" in err and "the same command makes it anew" in err
    assert json.loads((out / "prediction.json").read_text())["complete"] is False


def test_few_images_are_done_without_ray_unless_it_is_asked_for(
    trained: FitResult, coco: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "detr_ray.runtime.prediction", None)  # its import fails now
    monkeypatch.setitem(sys.modules, "ray", None)  # which other tests may have started
    arguments = [str(trained.run_path), *coco, "train.use_gpu=false", "--out"]
    assert command.main([*arguments, str(tmp_path / "few")]) == 0
    assert json.loads((tmp_path / "few" / "prediction.json").read_text())["complete"] is True
    for number, asked in enumerate(("train.launcher=ray", "train.num_workers=1")):
        with pytest.raises(ImportError):
            command.main([*arguments, str(tmp_path / f"ray{number}"), asked])
    monkeypatch.setenv("RAY_ADDRESS", "local")  # which names no cluster
    assert command.main([*arguments, str(tmp_path / "local")]) == 0
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ImportError):
        command.main([*arguments, str(tmp_path / "cluster")])
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(cluster_address, "FEW_IMAGES", 1)
    with pytest.raises(ImportError):
        command.main([*arguments, str(tmp_path / "many")])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(
    trained: FitResult,
    coco: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # which other tests may have started
    assert command.main([trained.run_path, *coco, "--out", str(tmp_path / "out"), "train.use_gpu=true"]) == 2
    assert "error: train.use_gpu: true, but torch finds no GPU on this machine" in capsys.readouterr().err
