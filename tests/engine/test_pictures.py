"""Pictures show what they say: read from the figures, and from the lines beside them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from observing import Observed, observe, small_config
from tiny import make_dataset

from detr_ray import show
from detr_ray.config import Config, ConfigError
from detr_ray.data.errors import DataError
from detr_ray.data.formats import open_split
from detr_ray.engine.pictures import of_augmentation, of_data, of_evaluation
from detr_ray.engine.pictures.request import PictureRequest
from detr_ray.evaluation import DetectionTable, GroundTruth, evaluate_detections
from detr_ray.tracking.event_log import EventLog
from detr_ray.viz.comparison import COLOURS

MAGENTA = COLOURS["suspected"]
CROPPED = "data.augment={scales: [48, 64], max_size: 96, crop: 1, crop_scales: [60], crop_min: 30, crop_max: 50}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """Two steps, whose metrics are in the log as the tracker of a recorded run writes them."""
    folder = tmp_path_factory.mktemp("pictures")
    make_dataset(folder / "data", num_train=16, num_val=4, image_size=(40, 90))
    seen = observe(config(folder, "run.name=a", "train.max_steps=2"))
    log = EventLog(Path(seen.job.run.path) / "tracking")
    log.append("start")
    for step, metrics in seen.tracker.metrics:
        log.append("metrics", step=step, metrics=metrics)
    log.close()
    return seen


@pytest.fixture(scope="module")
def place(run: Observed) -> Path:
    return Path(run.job.run.path).parents[1]


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
        assert axes.get_title().startswith(f"image {sample.image_id}\n")
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
    assert all("here" in title for title in titles(drawn.figure))


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


def test_samples_that_cannot_be_read_give_way_to_the_next_ones(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    settings = config(tmp_path)
    data = of_data.planned_data(settings, lambda line: None)
    assert data.train is not None
    first, second, *later = (sample for step in (1, 2) for sample in data.plan(1, 0).step(step)[0])
    file = tmp_path / "data" / "train2017" / data.train.file_name(first.index)
    file.write_bytes(b"no image")
    drawn = of_data.sample_picture(settings, PictureRequest(step=1, images=2), print)
    stored = [title.split(",")[0] for title in titles(drawn.figure) if title.startswith("image")]
    assert stored == [f"image {sample.image_id}" for sample in (second, later[0])]
    assert len(drawn.lines) == 3 and drawn.lines[-1].startswith(f"WARNING: left out: {file}: ")
    with pytest.raises(DataError, match=file.name):
        of_data.sample_picture(settings, PictureRequest(step=1, image=str(first.image_id)), print)
    monkeypatch.setattr(of_data, "_MOST_UNREADABLE", 1)
    with pytest.raises(DataError, match=file.name):
        of_data.sample_picture(settings, PictureRequest(step=1), print)


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
    texts = [text.get_text() for axes in drawn.figure.axes for text in axes.texts]
    assert [line[:3] for line in drawn.lines] == ["1: ", "2: "]
    assert sorted(text[:2] for text in texts if text[0].isdigit()) == ["1 ", "2 "], "the same numbers beside the boxes"
    assert "1 never found" in titles(drawn.figure)[0] or "2 never found" in titles(drawn.figure)[0]
    strict = of_evaluation.suspicious_picture(found, PictureRequest(score=0.99))
    assert strict.lines[0].startswith("no annotation looks wrong"), "fewer with more strength"
    blind = of_evaluation.Found("a", found.truth, found.detections.select(np.arange(0)), found.names, found.index)
    assert of_evaluation.suspicious_picture(blind, PictureRequest()).lines == [
        "no annotation looks wrong to this model (AP50 0.000; one that finds little accuses none)"
    ]


# All of them, as the command draws them


@pytest.fixture(scope="module")
def shown(place: Path) -> dict[str, Figure]:
    """What the command draws, by its name; of an evaluation, from what `found_of` gives."""
    figures: dict[str, Figure] = {}
    (place / "config.yaml").write_text(config(place, f"eval.checkpoint={place}/runs/a").to_yaml())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(show, "_evaluated", lambda config: found_of(place))
        for what in show.PICTURES:
            patch.setattr(show, "_write", lambda figure, out, what=what: figures.update({what: figure}) or 0)
            arguments = [what, "--config", str(place / "config.yaml"), "--images", "2", "--out", str(place / "a.png")]
            assert show.main(arguments) == 0, what
    return figures


def test_every_picture_is_drawn_by_its_name(shown: dict[str, Figure]) -> None:
    assert list(shown) == list(show.PICTURES) and len(shown) >= 18
    assert [what for what, figure in shown.items() if not any(axes.has_data() for axes in figure.axes)] == []


def lines_of(axes: Axes) -> dict[str, list[float]]:
    return {str(line.get_label()): np.asarray(line.get_ydata(), float).tolist() for line in axes.lines}


def test_the_curves_of_a_run_are_what_it_logged(run: Observed, shown: dict[str, Figure]) -> None:
    loss, parts, scores, norm = (lines_of(axes) for axes in shown["training"].axes)
    assert loss == {"loss": run.metric("train/loss")} and len(loss["loss"]) == 2
    assert parts == {name: run.metric(f"train/loss_{name}") for name in ("ce", "bbox", "giou")}
    assert scores == {name: run.metric(f"val/{name}") for name in ("AP", "AP50", "AP75")}
    assert norm == {"gradient norm": run.metric("train/grad_norm")}
    epochs = [step / run.job.steps_per_epoch for step in (1, 2)]
    assert np.asarray(shown["training"].axes[0].lines[0].get_xdata()).tolist() == pytest.approx(epochs)

    rates, weights = (lines_of(axes) for axes in shown["schedules"].axes)
    assert rates["lr"] == run.metric("optim/lr") and rates["lr_backbone"] == run.metric("optim/lr_backbone")
    assert weights["giou"] == run.metric("loss/weight/giou") == [2.0, 2.0]

    _, mean, rate, shares = shown["times"].axes
    phases = ("data_wait", "forward", "loss", "backward", "update")
    seconds = [np.mean(run.metric(f"perf/{phase}_s")) for phase in phases]
    rest = np.mean(run.metric("perf/step_s")) - sum(seconds)
    assert [bar.get_width() for bar in mean.patches] == pytest.approx([*seconds, rest])  # type: ignore[attr-defined]
    assert min(seconds) > 0 and rest > 0, "validation and checkpoints take time too"
    assert lines_of(rate) == {"images/s": run.metric("perf/images_per_s")}
    assert lines_of(shares)["padding"] == run.metric("perf/padding_frac")


def test_scores_in_detail_are_those_of_what_was_found(place: Path, shown: dict[str, Figure]) -> None:
    """All annotations but one are found, and one detection is false."""
    found = found_of(place)
    boxes = len(found.truth.category_ids)
    summary = evaluate_detections(found.truth, found.detections).summary
    for axes, name in zip(shown["precision-recall"].axes, ("AP50", "AP75"), strict=True):
        (mean,) = [line for line in axes.lines if str(line.get_label()).startswith("mean of")]
        assert np.mean(mean.get_ydata()) == pytest.approx(summary[name])

    confusion = shown["confusion"].axes[0]
    rows = [label.get_text() for label in confusion.get_yticklabels()]
    columns = [label.get_text() for label in confusion.get_xticklabels()]
    counts = {
        (rows[round(text.get_position()[1])], columns[round(text.get_position()[0])]): int(text.get_text())
        for text in confusion.texts
    }
    missed, false = found.names[int(found.truth.category_ids[0])], found.names[int(found.detections.category_ids[-1])]
    assert {pair: count for pair, count in counts.items() if pair[0] != pair[1]} == {
        (missed, "missed"): 1,
        ("(nothing)", false): 1,
    }
    assert sum(counts.values()) == boxes + 1
    shares = np.asarray(confusion.images[0].get_array())
    of_its_category = int((found.truth.category_ids == found.truth.category_ids[0]).sum())
    assert shares[rows.index(missed), columns.index("missed")] == 1 / of_its_category

    heights = [bar.get_height() for bar in shown["sizes"].axes[0].patches]  # type: ignore[attr-defined]
    names = ("AP", "APs", "APm", "APl", "AR100", "ARs", "ARm", "ARl")
    assert heights == pytest.approx([summary[name] or 0.0 for name in names])

    whole, alone = ([bar.get_width() for bar in axes.patches] for axes in shown["errors"].axes)  # type: ignore[attr-defined]
    assert whole[0] == pytest.approx(summary["AP50"]) and sum(whole) == pytest.approx(1)
    ends = np.cumsum(whole)
    starts = [bar.get_x() for bar in shown["errors"].axes[0].patches]  # type: ignore[attr-defined]
    assert starts == pytest.approx([0, *ends[:-1]]), "one after another"
    kinds = [label.get_text() for label in shown["errors"].axes[1].get_yticklabels()]
    assert {kind for kind, gain in zip(kinds, alone, strict=True) if gain > 0} == {"background", "missed"}


# Images that cannot be read


def test_an_image_that_cannot_be_read_is_named(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    index = open_split(str(tmp_path / "data"), None, "val")
    (tmp_path / "data" / "val2017" / index.file_name(0)).write_bytes(b"no image")
    found = dataclasses.replace(found_of(place), index=index)
    drawn = of_evaluation.predictions_picture(found, PictureRequest(images=2))
    (warning,) = [line for line in drawn.lines if line.startswith("WARNING")]
    assert f"image {index.image_ids[0]}: " in warning and index.file_name(0) in warning
    shown = [titles(drawn.figure)[cell] for cell in (0, 2)]
    assert ["cannot be read" in title for title in shown] == [True, False]


def test_a_sample_that_cannot_be_read_is_an_error_that_names_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    index = open_split(str(tmp_path / "data"), None, "train")
    file = tmp_path / "data" / "train2017" / index.file_name(3)
    file.write_bytes(b"no image")
    keys = [f"data.root={tmp_path}/data", "train.global_batch_size=4"]
    asked = ["sample", *keys, "--image", str(index.image_ids[3]), "--out", f"{tmp_path}/sample.png"]
    assert show.main(asked) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(file) in line
