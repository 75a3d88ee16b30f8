"""Pictures show what they say: read from the figures, and from the lines beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from observing import observe, small_config
from tiny import make_dataset

from detr_ray.config import Config, ConfigError
from detr_ray.engine.pictures import of_augmentation, of_data, of_evaluation, of_model
from detr_ray.engine.pictures.request import PictureRequest
from detr_ray.evaluation import DetectionTable, GroundTruth
from detr_ray.show import PICTURES
from detr_ray.viz.comparison import COLOURS

MAGENTA = COLOURS["suspected"]
CROPPED = "data.augment={scales: [48, 64], max_size: 96, crop: 1, crop_scales: [60], crop_min: 30, crop_max: 50}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    make_dataset(folder / "data", num_train=16, num_val=4, image_size=(40, 90))
    observe(config(folder, "run.name=a", "train.max_steps=1"))
    return folder


def config(folder: Path, *keys: str) -> Config:
    return small_config(folder / "data", folder / "runs", *keys)


def boxes_of(axes: object) -> list[tuple[float, float, float, float]]:
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle) and not patch.get_fill()]  # type: ignore[attr-defined]
    return [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in patches]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def test_a_batch_is_shown_as_the_model_gets_it(place: Path) -> None:
    settings = config(place, "data.augment.shared_draws=1")
    drawn = of_data.batch_picture(settings, PictureRequest(step=1), print)
    data = of_data.planned_data(settings, lambda line: None)
    samples = data.plan(1, 0).step(1)[0]
    loader = data.loaders()[0]
    assert loader is not None
    batch = loader.load(samples)
    assert len(drawn.figure.axes) == 4 == len(samples)
    height, width = batch.images.shape[2:]
    first = 0
    for axes, sample, count in zip(drawn.figure.axes, samples, batch.counts, strict=True):
        assert f"image {sample.image_id}," in axes.get_title()
        hatched = [patch for patch in axes.patches if patch.get_hatch()]
        padded = sum(patch.get_width() * patch.get_height() for patch in hatched)
        assert padded == height * width - sample.size[0] * sample.size[1]
        cxcywh = batch.boxes_cxcywh[first : first + count] * np.array([*sample.size[::-1], *sample.size[::-1]])
        expected = np.concatenate([cxcywh[:, :2] - cxcywh[:, 2:] / 2, cxcywh[:, 2:]], axis=1)
        np.testing.assert_allclose(np.array(boxes_of(axes)).reshape(-1, 4), expected, atol=1e-3)
        assert len(axes.texts) == count
        first += count
    share = 1 - sum(a * b for a, b in (sample.size for sample in samples)) / (4 * height * width)
    assert f"{share:.1%} of them padding" in drawn.figure.get_suptitle()
    assert len(of_data.batch_picture(settings, PictureRequest(images=2), print).figure.axes) == 2


def test_a_sample_is_shown_after_each_step(place: Path) -> None:
    settings = config(place, CROPPED, "data.augment.flip=1")
    data = of_data.planned_data(settings, lambda line: None)
    sample = data.plan(1, 0).step(0)[0][1]
    drawn = of_data.sample_picture(settings, PictureRequest(image=str(sample.image_id)), print)
    shown = titles(drawn.figure)
    assert [title.split("\n")[0].split()[0] for title in shown] == ["image", "flip", "resize", "crop", "resize"]
    assert f"{sample.size[1]} x {sample.size[0]}" in shown[-1]
    loader = data.loaders()[0]
    assert loader is not None
    pixels = drawn.figure.axes[-1].images[0].get_array()
    assert np.array_equal(pixels, loader.load([sample]).images[0].transpose(1, 2, 0)), "the last is what is trained on"
    with pytest.raises(ConfigError, match="no image with the id or the file name 'nowhere'"):
        of_data.sample_picture(settings, PictureRequest(image="nowhere"), print)


def test_an_image_is_found_in_an_epoch_that_repeats_others(place: Path) -> None:
    settings = config(place, "data.root=null", f"data.sources=[{{root: {place}/data, weight: 9}}]")
    data = of_data.planned_data(settings, lambda line: None)
    assert data.train is not None and data.planner.epoch_samples == 9 * len(data.train)
    seen = [sample.image_id for step in range(data.planner.steps_per_epoch) for sample in data.plan(1, 0).step(step)[0]]
    last = max(set(seen), key=seen.index)
    assert seen.index(last) >= 2 * len(data.train), "later than in two epochs without repeats"
    drawn = of_data.sample_picture(settings, PictureRequest(image=str(last), step=0), print)
    assert f"image {last}," in titles(drawn.figure)[0]


def test_the_same_images_are_shown_under_each_transform(place: Path) -> None:
    transforms = "data.augment.transforms=[mosaic: {p: 0.1}, grayscale: {p: 0.1, until_epoch: 1}, detr]"

    def drawn(step: int) -> Figure:
        request = PictureRequest(images=5, step=step)
        return of_augmentation.augmentation_picture(config(place, transforms), request, print).figure

    figure = drawn(0)
    expected = ["as stored", "mosaic", "grayscale", "detr", "as trained"]
    assert [title.split("\n")[0] for title in titles(figure)] == [name for name in expected for _ in range(5)]
    images = [axes.images[0].get_array() for axes in figure.axes]
    ids = [title.split("\n")[1].split(",")[0] for title in titles(figure)]
    assert ids == ids[:5] * 5 and len(set(ids)) == 5
    assert all((image[..., 0] == image[..., 2]).all() for image in images[10:15]), "each is done to all images"
    assert not any((image[..., 0] == image[..., 2]).all() for image in images[:10])
    boxes = [len(boxes_of(axes)) for axes in figure.axes]
    assert sum(boxes[5:10]) > sum(boxes[:5]) and boxes[10:15] == boxes[:5], "a mosaic has objects of four images"
    stored, mosaic, other = (figure.axes[place].images[0].get_array() for figure, place in
                             ((figure, 0), (figure, 5), (drawn(1), 5)))  # fmt: skip
    assert stored.shape == mosaic.shape == other.shape and (mosaic != other).any() and (stored != mosaic).any()


def test_steps_of_transforms_are_named_with_what_was_drawn(place: Path) -> None:
    transforms = "[mosaic: {p: 1}, zoom_out: {p: 1}, photometric: {p: 1}, detr]"
    settings = config(place, f"data.augment.transforms={transforms}")
    shown = titles(of_data.sample_picture(settings, PictureRequest(images=1), print).figure)
    assert [title.split("\n")[0].split()[0] for title in shown][:6] == [
        "image",
        "crop",
        "resize",
        "tile",
        "place",
        "change",
    ]
    assert any(title.startswith("change colours brightness ") for title in shown)


def test_a_data_set_at_a_glance_has_its_numbers(place: Path) -> None:
    drawn = of_data.data_picture(config(place), PictureRequest(), print)
    train = of_data.planned_data(config(place), lambda line: None).train
    assert train is not None
    assert "train: images: 16" in drawn.lines and "val: images: 4" in drawn.lines
    assert f"train: boxes: {len(train.category_ids)}" in drawn.lines
    bars = drawn.figure.axes[3].patches
    assert sum(bar.get_width() for bar in bars) == pytest.approx(200), "the classes of each split are 100 %"


def test_where_each_query_predicts(place: Path) -> None:
    settings = config(place, f"eval.checkpoint={place}/runs/a")
    drawn = of_model.queries_picture(settings, PictureRequest(images=3), print)
    points = [sum(len(part.get_offsets()) for part in axes.collections) for axes in drawn.figure.axes]
    assert points == [4, 4, 4] and len(drawn.lines) == 3, "a point for each of the four images"


def test_a_model_without_encoder_layers_has_no_such_picture(place: Path, tmp_path: Path) -> None:
    keys = ("run.name=b", "train.max_steps=1", "model.encoder_layers=0")
    observe(small_config(place / "data", tmp_path, *keys))
    bare = config(place, f"eval.checkpoint={tmp_path}/b")
    with pytest.raises(ConfigError, match="no encoder layer"):
        of_model.encoder_picture(bare, PictureRequest(), print)


def test_attention_of_a_deformable_model_is_its_points(place: Path, tmp_path: Path) -> None:
    keys = ("run.name=c", "train.max_steps=1", "model.architecture=deformable_detr", "model.num_feature_levels=2")
    observe(small_config(place / "data", tmp_path, *keys))
    deformable = config(place, f"eval.checkpoint={tmp_path}/c")
    request = PictureRequest(points=((20.0, 20.0),), images=1)
    encoder = of_model.encoder_picture(deformable, request, print).figure.axes[1]
    decoder = of_model.decoder_picture(deformable, request, print).figure.axes[1]
    for axes in (encoder, decoder):
        assert sum(len(part.get_offsets()) for part in axes.collections) == 2 * 2 * 4, "heads, maps, points"


def found_of(place: Path) -> of_evaluation.Found:
    """All but the first annotation, found at half a pixel's distance, and one false detection."""
    data = of_data.planned_data(config(place), lambda line: None)
    val = data.val
    assert val is not None
    truth = GroundTruth.from_columns(val)
    ids = np.append(truth.image_of_box()[1:], val.image_ids[0])
    boxes = np.append(truth.boxes_xywh_px[1:] + 0.5, [[0.0, 0.0, 3.0, 3.0]], axis=0)
    categories = np.append(truth.category_ids[1:], 1)
    scores = np.full(len(ids), 0.9, np.float32)
    found = DetectionTable(ids, categories, boxes.astype(np.float32), scores)
    return of_evaluation.Found("a", truth, found, truth.category_names(), val)


def test_outcomes_have_colours_of_their_own(place: Path) -> None:
    found = found_of(place)
    drawn = of_evaluation.predictions_picture(found, PictureRequest(images=4))
    boxes = len(found.truth.category_ids)
    assert drawn.lines == [f"{boxes - 1} matched", "0 confused", "1 false", "1 missed"]
    shown = [text.get_text() for text in drawn.figure.legends[0].get_texts()]
    assert shown == ["matched", "false: no annotation is left for it", "missed"]
    assert len(drawn.figure.axes) == 8, "annotations and predictions of each image"


def test_the_worst_image_comes_first_and_says_what_it_costs(place: Path) -> None:
    found = found_of(place)
    drawn = of_evaluation.worst_picture(found, PictureRequest(images=1))
    assert drawn.lines[0].startswith(f"image {found.truth.image_ids[0]},") and "costs" in titles(drawn.figure)[0]


def test_suspicious_annotations_are_named(place: Path) -> None:
    found = found_of(place)
    drawn = of_evaluation.suspicious_picture(found, PictureRequest())
    assert sum("never found" in line for line in drawn.lines) == 1
    assert sum("no annotation" in line for line in drawn.lines) == 1
    assert f"annotation {found.truth.annotation_ids[0]} " in " ".join(drawn.lines)
    suspected = [
        patch for axes in drawn.figure.axes for patch in axes.patches if to_hex(patch.get_edgecolor()) == MAGENTA
    ]
    assert len(suspected) == 2, "the annotation, and what was found beside all annotations"
    strict = of_evaluation.suspicious_picture(found, PictureRequest(score=0.99))
    assert strict.lines[0].startswith("no annotation looks wrong"), "fewer with more strength"
    blind = of_evaluation.Found("a", found.truth, found.detections.select(np.arange(0)), found.names, found.index)
    assert of_evaluation.suspicious_picture(blind, PictureRequest()).lines == [
        "no annotation looks wrong to this model (AP50 0.000; one that finds little accuses none)"
    ]


def test_every_picture_has_a_meaning_and_is_drawn() -> None:
    assert len(PICTURES) >= 17 and all(meaning and callable(draw) for meaning, draw in PICTURES.values())
