"""Pictures of a model show its numbers at their place: attention of points and queries, positions, predicted boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from observing import observe, small_config, without_validation
from tiny import make_dataset

from detr_ray.config import Config, ConfigError
from detr_ray.engine.pictures import of_model
from detr_ray.engine.pictures.request import PictureRequest
from detr_ray.engine.validation.evaluation_job import EvaluationJob, prepare_evaluation
from detr_ray.model.attention_maps import AttentionMap, AttentionRecord, record_attention
from detr_ray.structures import PaddedBatch, to_device


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, and a run of one step on it."""
    folder = tmp_path_factory.mktemp("model-pictures")
    make_dataset(folder / "data", num_train=4, num_val=4, image_size=(40, 90))
    observe(config(folder, "run.name=a", "train.max_steps=1", *without_validation(folder / "data")))
    return folder


def config(folder: Path, *keys: str) -> Config:
    return small_config(folder / "data", folder / "runs", *keys)


def test_where_each_query_predicts(place: Path) -> None:
    settings = config(place, f"eval.checkpoint={place}/runs/a")
    drawn = of_model.queries_picture(settings, PictureRequest(images=3), print)
    points = [sum(len(part.get_offsets()) for part in axes.collections) for axes in drawn.figure.axes]
    assert points == [4, 4, 4] and len(drawn.lines) == 3, "a point for each of the four images"
    assert "proposal" not in drawn.figure.get_suptitle()


def test_a_model_without_encoder_layers_has_no_such_picture(place: Path, tmp_path: Path) -> None:
    keys = ("run.name=b", "train.max_steps=1", "model.encoder_layers=0", *without_validation(place / "data"))
    observe(small_config(place / "data", tmp_path, *keys))
    bare = config(place, f"eval.checkpoint={tmp_path}/b")
    with pytest.raises(ConfigError, match="no encoder layer"):
        of_model.encoder_picture(bare, PictureRequest(), print)


def test_attention_of_a_deformable_model_is_its_points(place: Path, tmp_path: Path) -> None:
    keys = ("run.name=c", "train.max_steps=1", "model.architecture=deformable_detr", "model.num_feature_levels=2",
            "model.box_refine=true", "model.two_stage=true")  # fmt: skip
    observe(small_config(place / "data", tmp_path, *keys))
    deformable = config(place, f"eval.checkpoint={tmp_path}/c")
    request = PictureRequest(points=((20.0, 20.0),), images=1)
    encoder = of_model.encoder_picture(deformable, request, print).figure.axes[1]
    decoder = of_model.decoder_picture(deformable, request, print).figure.axes[1]
    for axes in (encoder, decoder):
        assert sum(len(part.get_offsets()) for part in axes.collections) == 2 * 2 * 4, "heads, maps, points"
        assert axes.get_title().startswith("1: "), "the number that the query has in the whole image"
    queries = of_model.queries_picture(deformable, request, print).figure.get_suptitle().replace("\n", " ")
    assert "query 0 begins with the encoder's best proposal" in queries


@pytest.fixture(scope="module")
def attention(place: Path) -> AttentionRecord:
    """What the layers of run a give for the first validation image."""
    job, padded = first_image(place, "a")
    model = job.build_detector().model
    batch = to_device(padded, torch.device("cpu"), model.pixels)
    return record_attention(model, batch.images, batch.mask)


def first_image(place: Path, name: str) -> tuple[EvaluationJob, PaddedBatch]:
    job = prepare_evaluation(config(place, f"eval.checkpoint={place}/runs/{name}"), lambda line: None)
    loader = job.data.loaders()[1]
    samples = [sample for batch in job.data.plan(1, 0).evaluation for sample in batch if sample.index == 0]
    assert loader is not None
    return job, loader.load(samples)


def shown_weights(axes: Axes) -> np.ndarray:
    return np.asarray(axes.images[-1].get_array())


def test_encoder_attention_is_that_of_the_cell_at_the_point(place: Path, attention: AttentionRecord) -> None:
    settings = config(place, f"eval.checkpoint={place}/runs/a")
    _, padded = first_image(place, "a")
    stored_height, stored_width = padded.orig_sizes[0].tolist()
    points = ((stored_width * 0.9, stored_height * 0.1), (stored_width * 0.1, stored_height * 0.9))
    request = PictureRequest(image=str(padded.image_ids[0]), points=points)
    figure = of_model.encoder_picture(settings, request, print).figure
    height, width = attention.map_sizes[0]
    assert width != height
    for axes, (x, y) in zip(figure.axes[1:], points, strict=True):
        cell = int(y / stored_height * height) * width + int(x / stored_width * width)
        one = attention.of_encoder(0, 0, [cell])
        assert isinstance(one, AttentionMap)
        expected = one.weights[:, 0].mean(0).numpy()
        assert expected.shape == (height, width)
        np.testing.assert_allclose(shown_weights(axes), expected, rtol=1e-5)
        assert f"from ({x:.0f}, {y:.0f})" in axes.get_title()


@pytest.mark.parametrize("layer", [1, 2])
def test_decoder_attention_is_that_of_the_query_that_found_the_object(
    place: Path, attention: AttentionRecord, layer: int
) -> None:
    settings = config(place, f"eval.checkpoint={place}/runs/a")
    request = PictureRequest(images=3, layer=layer, score=0.0)
    figure = of_model.decoder_picture(settings, request, print).figure
    scores = attention.output["pred_logits"][0].softmax(-1)[:, :-1].amax(-1)
    best = scores.argsort(descending=True)[:3].tolist()
    assert len(attention.decoder) == 2 and len(figure.axes) == 4
    assert [text.get_text()[:2] for text in figure.axes[0].texts] == ["1 ", "2 ", "3 "]
    for axes, query in zip(figure.axes[1:], best, strict=True):
        one = attention.of_decoder(layer - 1, 0, [query])
        assert isinstance(one, AttentionMap)
        np.testing.assert_allclose(shown_weights(axes), one.weights[:, 0].mean(0).numpy(), rtol=1e-5)
        assert f"{scores[query]:.2f}, query {query}" in axes.get_title()


@pytest.mark.parametrize("kind", ["sine", "learned"])
def test_the_position_embedding_says_which_channels_are_of_rows(place: Path, kind: str) -> None:
    if kind == "learned":
        keys = ("run.name=learned", "train.max_steps=1", "model.position_embedding=learned")
        observe(config(place, *keys, *without_validation(place / "data")))
    name = "a" if kind == "sine" else kind
    job, padded = first_image(place, name)
    model = job.build_detector().model
    batch = to_device(padded, torch.device("cpu"), model.pixels)
    with torch.no_grad():
        level = model.get_submodule("backbone.0")(batch.images, batch.mask)[0]
        vectors = model.get_submodule("backbone.1")(level.features, level.padding)[0].numpy()
    settings = config(place, f"eval.checkpoint={place}/runs/{name}")
    figure = of_model.position_picture(settings, PictureRequest(), print).figure
    of_channels = [axes for axes in figure.axes if axes.get_title().startswith("channel ")]
    assert len(of_channels) >= 6
    for axes in of_channels:
        channel = int(axes.get_title().split()[1])
        values = np.ma.filled(axes.images[0].get_array(), np.nan)
        np.testing.assert_array_equal(values, vectors[..., channel])
        along = "rows" if (values == values[:, :1]).all() else "columns"
        assert (values == values[:1]).all() or along == "rows"
        assert axes.get_title().endswith(f"half: {along})"), "a channel of rows is the same in all columns"
        assert axes.images[0].get_clim() == pytest.approx((-abs(vectors).max(), abs(vectors).max()))
