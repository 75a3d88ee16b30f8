"""The evaluate command: what it refuses before any work, which settings it takes from a run, and what it writes.

Everything runs in this process, without Ray.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from tiny import TINY, fit_here, make_dataset, tiny_config

from detr_ray import evaluate as command
from detr_ray.config import load_config
from detr_ray.engine.reporting.progress import FitResult
from detr_ray.model import build_model


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    """A run whose sizes, and number of detections, are not the defaults."""
    storage = tmp_path_factory.mktemp("runs")
    return fit_here(tiny_config(dataset, storage, "train.epochs=1", "run.name=a", "eval.max_detections=7"))


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that begins is a failure."""
    from detr_ray.engine.validation import evaluation_job

    def begun(*_: object) -> None:
        pytest.fail("the evaluation began")

    monkeypatch.setattr(evaluation_job, "run_evaluation", begun)


def run(capsys: pytest.CaptureFixture[str], checkpoint: object, *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of the command."""
    argv = ["train.launcher=local", "train.use_gpu=false", f"eval.checkpoint={checkpoint}", *map(str, arguments)]
    capsys.readouterr()
    code = command.main(argv)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def one_error(capsys: pytest.CaptureFixture[str], checkpoint: object, *arguments: object) -> str:
    """The one line that the command ends with."""
    code, out, err = run(capsys, checkpoint, *arguments)
    assert code == 2, out + err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ").strip()


def test_few_images_are_evaluated_without_ray(
    trained: FitResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detr_ray.runtime import cluster_address, launch

    def started(*_: object) -> None:
        raise TimeoutError("Ray is started")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)  # which other tests may have started
    monkeypatch.setattr(launch, "session_of", started)
    numbers = tmp_path / "numbers.json"
    arguments = [f"eval.checkpoint={trained.run_path}", "train.use_gpu=false", "--json", str(numbers)]
    assert command.main(arguments) == 0 and json.loads(numbers.read_text())["metrics"]["AP"] >= 0
    for asked in ("train.launcher=ray", "train.num_workers=1"):
        with pytest.raises(TimeoutError):
            command.main([*arguments, asked])
    with monkeypatch.context() as given:
        given.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        with pytest.raises(TimeoutError):
            command.main(arguments)
    with monkeypatch.context() as given:
        given.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
        with pytest.raises(TimeoutError):
            command.main(arguments)
    monkeypatch.setattr(cluster_address, "FEW_IMAGES", 7)
    with pytest.raises(TimeoutError):
        command.main(arguments)


# What is refused before any work


@pytest.mark.parametrize("option", ["--json", "--detections", "--picture"])
def test_places_that_cannot_be_written_are_refused_first(
    option: str, trained: FitResult, tmp_path: Path, capsys, no_work: None
) -> None:
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "folder.png").mkdir()
    for name, reason in [
        ("folder.png", "it is a folder; name a file in it"),
        ("new/", "it is a folder"),
        ("taken/found.png", "cannot be made a folder: there is a file of that name"),
        ("taken/deeper/found.png", "cannot be made a folder"),
        ("long" * 70 + ".png", "File name too long"),
    ]:
        location = f"{tmp_path}/{name}"
        if option == "--picture" and not name.endswith(".png"):
            continue
        line = one_error(capsys, trained.run_path, option, location)
        assert line.startswith(f"{option}: {location} cannot be written: ") and reason in line
    for option_and_value in ([option, ""], [f"{option}="]):
        assert one_error(capsys, trained.run_path, *option_and_value) == f"argument {option}: must name a file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "taken"]


def test_a_folder_that_may_not_be_written_is_refused_first(trained: FitResult, capsys, no_work: None) -> None:
    # Also for a superuser, whom permissions do not stop.
    assert "cannot be written" in one_error(capsys, trained.run_path, "--json", "/proc/found.json")


def test_an_address_that_nothing_answers_to_is_refused_first(trained: FitResult, capsys, no_work: None) -> None:
    line = one_error(capsys, trained.run_path, "--json", "nowhere://bucket/found.json")
    assert line.startswith("--json: nowhere://bucket/found.json cannot be written: ")


def test_one_file_for_two_things_is_refused_first(trained: FitResult, tmp_path: Path, capsys, no_work: None) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a.json")
    line = one_error(capsys, trained.run_path, "--json", f"{tmp_path}/a.json", "--detections", f"{tmp_path}/link")
    assert line == f"--detections: {tmp_path}/link is the file of --json too; name another one"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--picture", "found.xyz"],
            "--picture: found.xyz names no format that pictures are written in: it",
        ),
        (["--picture", "found"], "--picture: found names no format"),
        (["--picture", "found.ico"], "--picture: found.ico names no format"),
        (
            ["--picture", "a.webp", "--picture-images", "999"],
            "--picture-images: a.webp has room for 248 images, not",
        ),
        (["--picture-images", "0"], "argument --picture-images: must be a whole number of at least 1 (got 0)"),
        (["--picture-images", "-3"], "argument --picture-images: must be a whole number of at least 1 (got -3)"),
        (["--picture-images=2.5"], "argument --picture-images: must be a whole number of at least 1 (got 2.5)"),
        (["--picture-score", "1.5"], "argument --picture-score: must be a number from 0 to 1 (got 1.5)"),
        (["--picture-score", "-0.1"], "argument --picture-score: must be a number from 0 to 1 (got -0.1)"),
        (["--picture-score=nan"], "argument --picture-score: must be a number from 0 to 1 (got nan)"),
        (["--picture-score=high"], "argument --picture-score: must be a number from 0 to 1 (got high)"),
    ],
)
def test_pictures_that_cannot_be_drawn_are_refused_first(
    arguments: list[str], message: str, trained: FitResult, capsys, no_work: None
) -> None:
    assert one_error(capsys, trained.run_path, *arguments).startswith(message)


def changed(trained: FitResult, path: Path, change) -> Path:
    """The best checkpoint's file, after a change."""
    content = torch.load(f"{trained.best_checkpoint}/model.pt", weights_only=True)
    change(content)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_first(
    value: float, trained: FitResult, tmp_path: Path, capsys, no_work: None
) -> None:
    path = changed(trained, tmp_path / "m.pt", lambda c: c["model"]["query_embed.weight"].fill_(value))
    line = one_error(capsys, path)
    assert line == f"eval.checkpoint: {path} holds NaN or infinity in query_embed.weight: take an earlier checkpoint"


def test_finite_weights_that_overflow_are_named_afterwards(trained: FitResult, tmp_path: Path, capsys) -> None:
    path = changed(trained, tmp_path / "m.pt", lambda c: c["model"]["class_embed.weight"].fill_(3e38))
    code, _, err = run(capsys, path)
    assert code == 1
    assert err.startswith(f"error: eval.checkpoint: {path} gives predictions that are not finite with train.precision=")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].pop("query_embed.weight"), "does not fit the model section: it lacks query_embed.weight"),
        (lambda c: c["model"].update({"query_embed.more": torch.ones(1)}), "it has more, query_embed.more"),
        (lambda c: c.pop("config"), "is damaged: it lacks its label map or its configuration"),
        (lambda c: c["config"]["model"].update(num_queries=9), "does not fit (is the model section the one"),
        (lambda c: c["model"].clear(), "holds no weights"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused_first(
    change, message: str, trained: FitResult, tmp_path: Path, capsys, no_work: None
) -> None:
    path = changed(trained, tmp_path / "m.pt", change)
    line = one_error(capsys, path)
    assert line.startswith(f"eval.checkpoint: {path} ") and message in line


def test_broken_files_are_refused_first(trained: FitResult, tmp_path: Path, capsys, no_work: None) -> None:
    whole = Path(f"{trained.best_checkpoint}/model.pt").read_bytes()
    for name, content in [("cut.pt", whole[:-999]), ("empty.pt", b""), ("cut.safetensors", b"\x09" + b"\0" * 7 + b"{")]:
        path = tmp_path / name
        path.write_bytes(content)
        assert one_error(capsys, path).startswith(f"eval.checkpoint: {path} is damaged or no ")
    absent = f"eval.checkpoint: there is no file or folder {tmp_path}/absent.pt"
    assert one_error(capsys, tmp_path / "absent.pt") == absent


# Which settings are used


def numbers(capsys, tmp_path: Path, checkpoint: object, *arguments: object) -> dict:
    path = tmp_path / "new" / "folder" / "numbers.json"
    code, out, err = run(capsys, checkpoint, "--json", path, *arguments)
    assert code == 0, err
    return json.loads(path.read_text()) | {"output": out}


def test_a_run_is_scored_with_its_own_settings_and_data(trained: FitResult, tmp_path: Path, capsys) -> None:
    model_file = f"{trained.best_checkpoint}/model.pt"
    for checkpoint in (trained.run_path, trained.best_checkpoint, model_file):
        found = numbers(capsys, tmp_path, checkpoint)
        assert found["checkpoint"] == model_file
        measured = {name.removeprefix("val/"): value for name, value in trained.metrics.items()}
        assert found["metrics"] == {name: value for name, value in measured.items() if name != "seconds"}
        assert found["settings"]["eval.size"] == 48 and found["settings"]["eval.max_detections"] == 7
        expected = (
            "scored with eval.size=48, eval.max_size=96, eval.max_detections=7, train.precision=fp32 (from the run)"
        )
        assert expected in found["output"].splitlines()
        assert "the validation data is the run's own, since none is given" in found["output"]


def test_the_settings_that_are_said_are_those_that_are_used(trained: FitResult, tmp_path: Path, capsys) -> None:
    found = []
    for given in ((), ("eval={size: 48, max_size: 96, max_detections: 7}",), ("eval.size=64",)):
        path = tmp_path / "found.json"
        assert run(capsys, trained.run_path, "--detections", path, *given)[0] == 0
        found.append(json.loads(path.read_text()))
    assert found[0] == found[1] and found[0] != found[2]


def test_given_data_is_scored_at_the_runs_sizes(trained: FitResult, dataset: Path, tmp_path: Path, capsys) -> None:
    other = make_dataset(tmp_path / "other", num_train=1, num_val=3, seed=9)
    found = numbers(capsys, tmp_path, trained.run_path, f"data.root={other}")
    assert found["settings"]["eval.size"] == 48
    assert "\n3 images, " in found["output"] and "run's own" not in found["output"]


def test_what_is_given_wins_and_differences_are_said(trained: FitResult, tmp_path: Path, capsys) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("eval: {size: 64}\ntrain: {precision: bf16}\n")
    found = numbers(capsys, tmp_path, trained.run_path, "--config", config, "eval.max_detections=100")
    settings = found["settings"]
    assert (settings["eval.size"], settings["eval.max_size"], settings["train.precision"]) == (64, 96, "bf16")
    line = (
        "scored with eval.size=64, eval.max_detections=100, train.precision=bf16 (as given); eval.max_size=96 "
        "(from the run); the run itself was validated with eval.size=48, eval.max_detections=7, train.precision=fp32"
    )
    assert line in found["output"].splitlines()


def test_given_and_stored_sizes_that_contradict_are_refused(trained: FitResult, capsys, no_work: None) -> None:
    line = one_error(capsys, trained.run_path, "eval.size=500")
    assert line.startswith(
        "eval.checkpoint: eval.size: must not exceed eval.max_size (96) (got 500, from what was given"
    )


def test_fp16_of_a_run_is_not_asked_of_a_cpu(trained: FitResult, tmp_path: Path, capsys) -> None:
    path = changed(trained, tmp_path / "m.pt", lambda c: c["config"]["train"].update(precision="fp16", use_gpu=None))
    found = numbers(capsys, tmp_path, path)
    assert found["settings"]["train.precision"] == "fp32"
    assert "which needs a GPU: it is scored in fp32 here" in found["output"]


# Weights of others


@pytest.fixture(scope="module")
def model_of_91() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_model(load_config(None, [item for item in TINY if item.startswith("model")]).model, 91).state_dict()


def coco(coco128: Path) -> list[str]:
    split = f"{{annotations: {coco128}/annotations/instances_train2017.json, images: {coco128}/train2017}}"
    model = [item for item in TINY if item.startswith("model")]
    return [f"data.val={split}", "data.max_images=4", "eval={size: 48, max_size: 96}", *model]


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "detr."])
def test_published_weights_are_scored_whatever_wraps_them(
    prefix: str, model_of_91: dict[str, torch.Tensor], coco128: Path, tmp_path: Path, capsys
) -> None:
    state = {prefix + name: value.clone() for name, value in model_of_91.items()}
    if prefix == "detr.":  # the panoptic model, whose head has 250 classes
        for kind in ("weight", "bias"):
            value = state[f"detr.class_embed.{kind}"]
            state[f"detr.class_embed.{kind}"] = torch.cat([value[:91], value[:91] - 9, value[:68] - 9, value[91:]])
        state["mask_head.lay1.bias"] = torch.ones(2)
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    found = [numbers(capsys, tmp_path, tmp_path / name, *coco(coco128)) for name in ("w.pth", "w.safetensors")]
    assert found[0]["metrics"] == found[1]["metrics"]
    assert ("beside the detector: mask_head.lay1.bias" in found[0]["output"]) == (prefix == "detr.")
    assert "scored with eval.size=48, eval.max_size=96 (as given); eval.max_detections=100" in found[0]["output"]


def test_heads_without_names_must_have_the_datas_number_of_classes(
    model_of_91: dict[str, torch.Tensor], dataset: Path, tmp_path: Path, capsys, no_work: None
) -> None:
    for rows in (5, 91):
        state = {n: v[: rows + 1] if n.startswith("class_embed") else v for n, v in model_of_91.items()}
        torch.save(state, tmp_path / "w.pth")
        line = one_error(capsys, tmp_path / "w.pth", f"data.root={dataset}", *coco(dataset)[1:], "data.val=null")
        assert ("names no classes; it has 5, which does not fit the 6" in line) == (rows == 5)
        assert ("its categories are not COCO's" in line) == (rows == 91)


# What is written


def test_detections_and_picture_are_written_into_new_folders(trained: FitResult, tmp_path: Path, capsys) -> None:
    found, picture = tmp_path / "a" / "b" / "found.json", tmp_path / "c" / "found.JPG"
    code, out, err = run(capsys, trained.run_path, "--detections", found, "--picture", picture, "--picture-images", 3)
    assert code == 0, err
    rows = json.loads(found.read_text())
    assert len(rows) == 7 * 8 and rows[0].keys() == {"image_id", "category_id", "bbox", "score"}
    with Image.open(picture) as image:
        assert image.format == "JPEG" and image.size == (3 * 264 + 8, 264 + 8)
    assert f"detections   {found}" in out and f"picture      {picture}" in out


def test_a_file_is_replaced_through_a_link_and_a_pipe_is_written_into(
    trained: FitResult, tmp_path: Path, capsys
) -> None:
    link, target, pipe = tmp_path / "link.json", tmp_path / "target.json", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    os.mkfifo(pipe)  # as devices are, but no harm is done where it is replaced
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()), daemon=True)
    reader.start()
    assert run(capsys, trained.run_path, "--json", link, "--detections", pipe)[0] == 0
    reader.join(30)
    assert link.is_symlink() and json.loads(target.read_text())["metrics"]
    assert pipe.is_fifo() and len(json.loads(received[0])) == 7 * 8


def test_one_file_that_fails_in_the_end_does_not_take_the_others(
    trained: FitResult, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detr_ray.engine.validation import evaluation_job

    numbers_file, found = tmp_path / "numbers.json", tmp_path / "found" / "found.json"
    work = evaluation_job.run_evaluation

    def meanwhile(*arguments: object) -> object:
        found.parent.rmdir()
        found.parent.write_text("in the way")
        return work(*arguments)

    monkeypatch.setattr(evaluation_job, "run_evaluation", meanwhile)
    code, out, err = run(capsys, trained.run_path, "--detections", found, "--json", numbers_file)
    assert code == 1
    assert err.startswith(f"error: --detections: {found} could not be written: ") and err.count("\n") == 1
    assert json.loads(numbers_file.read_text())["metrics"] and "AP75" in out


@pytest.mark.parametrize("annotated", ["upright", "as stored"])
def test_boxes_are_drawn_on_the_objects_of_turned_images(annotated: str, tmp_path: Path, capsys) -> None:
    """A white square on black, stored lying on its side; annotation tools do and do not turn such images."""
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[4:20, 50:66] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", exif=exif, quality=95)
    root = make_dataset(tmp_path / "data", num_train=1, num_val=1)
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    image = content["images"][0]
    (root / "val2017" / image["file_name"]).write_bytes(file.getvalue())
    size, box = ({"width": 80, "height": 40}, [50, 4, 16, 16])
    if annotated == "upright":
        size, box = ({"width": 40, "height": 80}, [40 - 20, 50, 16, 16])
    content["images"] = [image | size]
    category = content["categories"][0]["id"]
    annotation = {"id": 1, "image_id": image["id"], "category_id": category, "bbox": box, "area": 256, "iscrowd": 0}
    content["annotations"] = [annotation]
    path.write_text(json.dumps(content))
    weights, picture = tmp_path / "w.pth", tmp_path / "found.png"
    config = tiny_config(root, tmp_path)
    torch.save(build_model(config.model, len(content["categories"])).state_dict(), weights)
    arguments = [*TINY, f"data.root={root}", "--picture", picture, "--picture-score", "1"]
    code, _, err = run(capsys, weights, *arguments)
    assert code == 0, err
    # 256 pixels of the picture are 80 of the image: the inside of the drawn box is white, its surroundings are black.
    shown = np.asarray(Image.open(picture).convert("L")).astype(int)
    scale, margin_x, margin_y = 256 / 80, (256 - size["width"] * 3.2) / 2, (256 - size["height"] * 3.2) / 2
    left, top = (round(8 + margin_x + box[0] * scale), round(8 + margin_y + box[1] * scale))
    side = round(16 * scale)
    assert shown[top + 6 : top + side - 6, left + 6 : left + side - 6].min() > 200
    assert shown[top : top + side, left - 12 : left - 6].max() < 60


def test_categories_that_only_the_model_has_are_drawn(
    trained: FitResult, dataset: Path, tmp_path: Path, capsys
) -> None:
    subset = tmp_path / "subset"
    shutil.copytree(dataset, subset)
    path = subset / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    kept = content["categories"][:1]
    content["categories"] = kept
    content["annotations"] = [one for one in content["annotations"] if one["category_id"] == kept[0]["id"]]
    path.write_text(json.dumps(content))
    found, picture = tmp_path / "found.json", tmp_path / "found.png"
    arguments = [f"data.root={subset}", "--picture", picture, "--picture-score", "0", "--detections", found]
    code, _, err = run(capsys, trained.run_path, *arguments)
    assert code == 0, err
    assert {row["category_id"] for row in json.loads(found.read_text())} - {kept[0]["id"]}, "others were found"
    assert picture.is_file()


def test_the_least_score_decides_what_is_drawn(trained: FitResult, tmp_path: Path, capsys) -> None:
    pictures = []
    for score in ("0", "1"):
        picture = tmp_path / f"{score}.png"
        assert run(capsys, trained.run_path, "--picture", picture, "--picture-score", score)[0] == 0
        pictures.append(np.asarray(Image.open(picture)))
    assert not np.array_equal(*pictures)
