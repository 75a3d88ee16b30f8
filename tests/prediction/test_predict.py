"""`LoadedModel.predict`: the boxes of evaluation, for images of every kind."""

from __future__ import annotations

import dataclasses
import io
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config

import detr_ray
from detr_ray.data.decoding import decode_image
from detr_ray.data.image_headers import ImageError
from detr_ray.engine.reporting.progress import FitResult
from detr_ray.model.state_dicts import WeightsError
from detr_ray.prediction import LoadedModel, Prediction
from detr_ray.prediction.thresholds import label_thresholds
from detr_ray.runtime.launch import evaluate

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 66, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(trained: FitResult) -> LoadedModel:
    return detr_ray.load_model(trained.run_path)


def found(model: LoadedModel, image: object) -> dict:
    one = model.predict(image, device="cpu")  # type: ignore[call-overload]
    assert isinstance(one, Prediction)
    return {name: value for name, value in one.to_dict().items() if name != "image"}


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_the_boxes_are_those_of_evaluation_to_the_bit(
    model: LoadedModel, trained: FitResult, shapes: Path, tmp_path: Path
) -> None:
    config = tiny_config(
        shapes, tmp_path, f"eval.checkpoint={trained.run_path}", "eval.max_detections=7", "eval.max_size=60"
    )
    expected = evaluate(config).detections
    images = {int(path.stem): path for path in (shapes / "val2017").iterdir()}
    predicted = model.predict(images.values(), device="cpu")
    for image_id, one in zip(images, predicted, strict=True):
        rows = expected.image_ids == image_id
        assert rows.sum() == len(one) == 7
        for name in ("boxes_xywh_px", "scores", "category_ids"):
            assert np.array_equal(getattr(one, name), getattr(expected, name)[rows]), name
    assert {str(one.image) for one in predicted} == {str(path) for path in images.values()}
    with Image.open(images[min(images)]) as image:
        assert predicted[list(images).index(min(images))].size == (image.height, image.width)


def test_an_image_is_the_same_one_however_it_is_given(model: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "ä image #1.png"
    path.write_bytes(encoded(Image.fromarray(PIXELS), "PNG"))
    expected = found(model, PIXELS)
    assert (expected["height"], expected["width"]) == PIXELS.shape[:2]
    assert len(expected["scores"]) == 7 and sorted(expected["scores"], reverse=True) == expected["scores"]
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    opened = Image.open(path)
    given = [str(path), path, path.read_bytes(), memoryview(path.read_bytes()), opened, Image.fromarray(PIXELS), tensor]
    given += [path.as_uri(), tensor.float() / 255, (tensor.double() / 255).numpy().transpose(1, 2, 0)]
    given += [PIXELS.astype(np.uint16) * 257, np.dstack([PIXELS, PIXELS[:, :, 0]])]
    for image in given:
        assert found(model, image) == expected, type(image)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        assert found(model, f"{address}{path.as_uri().rpartition('/')[2]}") == expected
        with pytest.raises(ImageError, match=r"absent\.png: the server answers 404"):
            model.predict(f"{address}absent.png")
        server.shutdown()


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_images_of_every_mode_are_what_the_decoder_makes_of_them(mode: str, model: LoadedModel) -> None:
    if mode == "I;16":
        image = Image.fromarray(PIXELS[:, :, 0].astype(np.uint16) * 256)
    else:
        image = Image.fromarray(PIXELS).convert(mode)
    file = encoded(image, "TIFF")
    expected = found(model, decode_image(file, "a").permute(1, 2, 0).numpy())
    assert found(model, file) == found(model, image) == expected
    if mode in ("L", "I;16"):
        assert found(model, np.asarray(image)) == found(model, torch.tensor(np.asarray(image))[None]) == expected


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_boxes_are_of_the_image_turned_as_its_exif_says(image_format: str, model: LoadedModel, tmp_path: Path) -> None:
    options = {"lossless": True} if image_format == "WEBP" else {}
    file = encoded(Image.fromarray(PIXELS), image_format, exif=turned(6), **options)
    upright = decode_image(file, "a").permute(1, 2, 0).numpy()
    expected = found(model, upright)
    assert (expected["height"], expected["width"]) == (66, 40)
    (tmp_path / "turned").write_bytes(file)
    assert found(model, file) == found(model, tmp_path / "turned") == expected
    if image_format != "JPEG":  # which Pillow decodes by another library
        assert found(model, Image.open(io.BytesIO(file))) == expected


def test_many_images_are_answered_in_their_order_whatever_the_batches(model: LoadedModel) -> None:
    images = [PIXELS, PIXELS[:20], PIXELS[:, ::-1], PIXELS[::-1], PIXELS[:, :40]]
    one_by_one = [found(model, image) for image in images]
    for batch_size in (1, 3):
        many = model.predict(iter(images), batch_size=batch_size, device="cpu")
        for one, expected in zip(many, one_by_one, strict=True):
            assert one.size == (expected["height"], expected["width"])
            np.testing.assert_allclose(one.boxes_xyxy_px, expected["boxes_xyxy_px"], atol=1e-3)
            np.testing.assert_allclose(one.scores, expected["scores"], atol=1e-5)
    stacked = model.predict(np.stack([PIXELS, PIXELS[:, ::-1]]), device="cpu")
    for one, expected in zip(stacked, (one_by_one[0], one_by_one[2]), strict=True):
        np.testing.assert_allclose(one.scores, expected["scores"], atol=1e-5)
    assert model.predict([]) == []


def test_threshold_and_number_decide_what_is_answered(model: LoadedModel) -> None:
    everything = model.predict(PIXELS, device="cpu", top_k=100)
    assert len(everything) == 8, "one for each query; eval.max_detections is 7"
    middle = float(everything.scores[3])
    above = model.predict(PIXELS, threshold=middle, device="cpu")
    assert len(above) == 4 and (above.scores >= middle).all()
    assert len(model.predict(PIXELS, threshold=1, device="cpu")) == 0
    first = model.predict(PIXELS, top_k=2, device="cpu")
    assert np.array_equal(first.boxes_xyxy_px, everything.boxes_xyxy_px[:2])
    known = dict(model.label_map.categories)
    assert everything.names == [known[i] for i in everything.category_ids.tolist()]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "image 0: the file is empty"),
        (b"no image", "image 0: not an image"),
        ("/absent/a.jpg", r"/absent/a\.jpg: no such file"),
        ("/", "/: is a folder; give the images in it"),
        (np.zeros((3, 9, 9)), r"image 0: has the shape \[3, 9, 9\]; an array is \[height, width\]"),
        (np.zeros((2, 0, 3), np.uint8), r"image 0: has the shape \[2, 0, 3\]"),
        (np.full((9, 9), 255.0), r"image 0: its floats are not all in 0\.\.1"),
        (np.full((9, 9), np.nan), r"image 0: its floats are not all in 0\.\.1"),
        (np.zeros((9, 9), np.int64), "image 0: its pixels are int64; give uint8"),
        (np.full((9, 9), 255, np.uint16), "image 0: its 16-bit pixels reach 255 at most"),
        (torch.zeros(7, 9, 9), r"image 0: has the shape \[9, 9, 7\]"),
        (Image.new("F", (9, 9)), "image 0: its pixels are floats"),
        ("nowhere://bucket/a.jpg", "nowhere://bucket/a.jpg"),
        ("http://127.0.0.1:9/a.jpg?token=hidden", r"http://127\.0\.0\.1:9/a\.jpg\?\.\.\.: cannot be fetched"),
    ],
)
def test_images_that_are_none_are_named(image: object, message: str, model: LoadedModel) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        model.predict([image], device="cpu")  # type: ignore[list-item]
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold: must be a number from 0 to 1, 'best_f1' or None"),
        ({"threshold": "high"}, "threshold: must be a number"),
        ({"threshold": True}, "threshold: must be a number"),
        ({"threshold": float("nan")}, "threshold: must be a number"),
        ({"top_k": 0}, "top_k: must be a whole number of at least 1"),
        ({"batch_size": 1.5}, "batch_size: must be a whole number"),
        ({"device": "gpu"}, "device='gpu': torch has no such device; give 'cpu', 'cuda'"),
        ({"device": "cuda:99"}, "device=cuda:99: torch finds "),
    ],
)
def test_options_that_there_are_not_are_refused(options: dict, message: str, model: LoadedModel) -> None:
    with pytest.raises(ValueError, match=message):
        model.predict(PIXELS, **options)


def test_what_is_no_image_at_all_is_refused(model: LoadedModel) -> None:
    with pytest.raises(TypeError, match="image 1: dict is no image; give a path"):
        model.predict([PIXELS, {}])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="image 0: int is no image; give a path"):
        model.predict(5)  # type: ignore[arg-type]
    for images in (None, [None]):  # a file that cv2.imread did not find
        with pytest.raises(TypeError, match=r"image 0: is None, which cv2\.imread gives"):
            model.predict(images)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"photos/\*\.jpg: no such file; a pattern is expanded by sorted\(glob"):
        model.predict("photos/*.jpg")


def test_predictions_that_are_not_finite_are_refused(trained: FitResult) -> None:
    broken = detr_ray.load_model(trained.run_path)
    broken.model.get_parameter("class_embed.weight").fill_(3e38)
    with pytest.raises(WeightsError, match="predictions that are not finite on image 0"):
        broken.predict(PIXELS, device="cpu")


def test_the_best_thresholds_are_those_of_each_category(model: LoadedModel) -> None:
    everything = model.predict(PIXELS, device="cpu", top_k=8)
    ids = [category_id for category_id, _ in model.label_map.categories]
    middle = float(np.median(everything.scores))
    of_each: dict[str, dict] = {str(i): {"threshold": 0.25 + i / 100} for i in ids}
    of_each[str(everything.category_ids[0])] = {"threshold": middle}
    without = next(i for i in ids if i != everything.category_ids[0])
    of_each[str(without)] = {"threshold": None}
    scores: dict[str, dict] = {"all": {"threshold": 0.125}, "categories": of_each}
    expected = np.array([of_each[str(i)]["threshold"] or 0.125 for i in model.label_map.category_ids], np.float32)
    assert np.array_equal(label_thresholds("best_f1", model.label_map, scores, "a"), expected)  # type: ignore[arg-type]
    other = LoadedModel(model.saved, dataclasses.replace(model.facts, scores=scores))
    chosen = other.predict(PIXELS, threshold="best_f1", top_k=8, device="cpu")
    labels = [model.label_map.category_ids.index(i) for i in everything.category_ids.tolist()]
    assert chosen.scores.tolist() == everything.scores[everything.scores >= expected[labels]].tolist()
    assert 0 < len(chosen) < 8
    scores["all"]["threshold"] = None
    with pytest.raises(ValueError, match="none of its detections was right"):
        other.predict(PIXELS, threshold="best_f1", device="cpu")
