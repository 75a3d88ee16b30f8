"""Which weights are evaluated, how, on what, and what becomes of what they found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from observing import Forward, Noted, noting, observe, prepare, run, small_config
from tiny import make_dataset, tiny_config
from torch import Tensor

from detr_ray.config import Config
from detr_ray.engine.context import LocalContext
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.engine.validation.evaluation_job import EvaluationResult, prepare_evaluation, run_evaluation
from detr_ray.evaluation import DetectionTable, GroundTruth, evaluate_detections


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Category ids that are not their places, so that a label is never by chance the id; a crowd in validation."""
    root = make_dataset(tmp_path_factory.mktemp("data") / "shapes", num_train=16, num_val=6, image_size=(40, 90))
    for split in ("train", "val"):
        path = root / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        for category in content["categories"]:
            category["id"] = 70 - 7 * category["id"]
        for annotation in content["annotations"]:
            annotation["category_id"] = 70 - 7 * annotation["category_id"]
        path.write_text(json.dumps(content))
    return root


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def evaluated(config: Config, noted: Noted | None = None) -> EvaluationResult:
    """Evaluates in this process; notes what the model was given."""
    job = prepare_evaluation(config, lambda line: None)
    with noting(noted or Noted()):
        result = run_evaluation(job, LocalContext(), LocalBatches(job.data.plan(1, 0), *job.data.loaders()))
    assert result is not None
    return result


def plain_detections(forwards: list[Forward], sizes: dict[int, tuple[int, int]], order: list[list[int]]) -> dict:
    """(image id) -> rows (label, score, left, top, right, bottom) of every query, from outputs and stored sizes."""
    found = {}
    for forward, image_ids in zip(forwards, order, strict=True):
        for row, image_id in enumerate(image_ids):
            scores = forward.output["pred_logits"][row].float().softmax(-1)[:, :-1]
            score, label = scores.max(-1)
            x, y, w, h = forward.output["pred_boxes"][row].float().unbind(-1)
            height, width = sizes[image_id]
            box = torch.stack([(x - w / 2) * width, (y - h / 2) * height, w * width, h * height], dim=-1)
            found[image_id] = [(int(a), float(s), *b) for a, s, b in zip(label, score, box.tolist(), strict=True)]
    return found


@pytest.mark.parametrize("ema_decay", [0, 0.5])
def test_the_averaged_weights_are_evaluated_where_there_are_any(
    dataset: Path, tmp_path: Path, ema_decay: float
) -> None:
    settings = (f"optim.ema_decay={ema_decay}", "optim.lr=1e-2", "optim.lr_backbone=1e-2", "run.name=a")
    seen = observe(small_config(dataset, tmp_path, *settings))
    _, model_file, _ = seen.checkpoint(4)
    assert same(model_file["model"], seen.models[0].state_dict()) and ("ema" in model_file) is (ema_decay > 0)
    wanted = model_file["ema" if ema_decay else "model"]
    assert seen.evaluating and all(same(forward.weights, wanted) for forward in seen.evaluating)
    if ema_decay:
        assert not same(model_file["ema"], model_file["model"])
    # The command takes the same ones, and finds the same numbers.
    noted = Noted()
    config = small_config(dataset, tmp_path, f"eval.checkpoint={tmp_path / 'a'}")
    numbers = evaluated(config, noted).metrics.as_metrics("val/")
    assert all(same(forward.weights, wanted) for forward in noted.evaluating)
    assert all(seen.metric(name) == [value] for name, value in numbers.items() if seen.metric(name))
    assert seen.metric("val/AP")


def test_the_average_follows_its_rule_at_every_step(dataset: Path, tmp_path: Path) -> None:
    settings = ("optim.ema_decay=0.3", "optim.lr=1e-2", "optim.lr_backbone=1e-2", "train.epochs=2")
    seen = observe(small_config(dataset, tmp_path, *settings))
    after = [update.weights for update in seen.updates[1:]] + [dict(seen.models[0].named_parameters())]
    average = dict(seen.updates[0].weights)
    for number, weights in enumerate(after):
        decay = min(0.3, (1 + number) / (10 + number))
        average = {name: decay * value + (1 - decay) * weights[name] for name, value in average.items()}
    assert len(after) == 8
    model, averaged = seen.models
    for name, value in averaged.named_parameters():
        if name in average:
            torch.testing.assert_close(value, average[name], rtol=1e-4, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in averaged.parameters())
    for mine, theirs in zip(averaged.buffers(), model.buffers(), strict=True):
        assert torch.equal(mine, theirs), "running statistics are those of training"


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("bf16", torch.bfloat16)])
def test_training_and_evaluation_are_of_the_precision_that_is_set(
    dataset: Path, tmp_path: Path, precision: str, dtype: torch.dtype | None
) -> None:
    settings = (f"train.precision={precision}", "run.name=a", "train.max_steps=2")
    seen = observe(small_config(dataset, tmp_path, *settings))
    assert seen.training and seen.evaluating
    assert {forward.autocast for forward in seen.training + seen.evaluating} == {dtype}
    noted = Noted()
    settings = (f"train.precision={precision}", f"eval.checkpoint={tmp_path / 'a'}")
    evaluated(small_config(dataset, tmp_path, *settings), noted)
    assert {forward.autocast for forward in noted.evaluating} == {dtype}


def test_the_model_trains_in_training_and_does_not_in_evaluation(dataset: Path, tmp_path: Path) -> None:
    settings = ("model.dropout=0.5", "train.epochs=3", "optim.ema_decay=0")
    seen = prepare(small_config(dataset, tmp_path, *settings))
    seen.loop.model.eval()  # as anybody may have left it
    run(seen)
    assert all(f.with_gradient for f in seen.training) and not any(f.with_gradient for f in seen.evaluating)
    assert len(seen.training) == 12 and len(seen.losses) == 12, "it trains again after each evaluation"
    first, second = seen.evaluating[: len(seen.evaluating) // 3], seen.evaluating[len(seen.evaluating) // 3 :]
    assert not same(first[0].weights, second[0].weights)
    # Neither dropout nor running statistics: the same weights see the same in the same image.
    statistics = {name: value for name, value in first[0].weights.items() if "running" in name}
    assert statistics and all(same(statistics, {n: f.weights[n] for n in statistics}) for f in first)
    with torch.no_grad():
        again = seen.models[0].eval()(seen.evaluating[-1].images, seen.evaluating[-1].mask)
    assert torch.equal(again["pred_logits"], seen.evaluating[-1].output["pred_logits"])


def test_detections_are_in_pixels_of_the_stored_image_with_its_category_ids(dataset: Path, tmp_path: Path) -> None:
    observe(small_config(dataset, tmp_path, "run.name=a", "train.max_steps=1"))
    noted = Noted()
    config = small_config(dataset, tmp_path, f"eval.checkpoint={tmp_path / 'a'}", "eval={size: 56, max_size: 90}")
    result = evaluated(config, noted)
    job = prepare_evaluation(config, lambda line: None)
    val = job.data.val
    assert val is not None
    order = [[sample.image_id for sample in batch] for batch in job.data.plan(1, 0).evaluation]
    sizes = dict(zip(val.image_ids.tolist(), zip(val.heights.tolist(), val.widths.tolist(), strict=True), strict=True))
    content = json.loads((dataset / "annotations" / "instances_val2017.json").read_text())
    assert sizes == {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    ids = sorted(category["id"] for category in content["categories"])
    expected = plain_detections(noted.evaluating, sizes, order)
    table = result.detections
    assert len(table.scores) == 6 * 6, "every query of every image"
    for image_id, rows in expected.items():
        mine = table.image_ids == image_id
        got = sorted(
            zip(table.scores[mine].tolist(), table.category_ids[mine].tolist(), table.boxes_xywh_px[mine].tolist(),
                strict=True)
        )  # fmt: skip
        for (score, category, box), (label, wanted, *wanted_box) in zip(
            got, sorted(rows, key=lambda row: row[1]), strict=True
        ):
            assert score == pytest.approx(wanted, abs=1e-5) and category == ids[label]
            assert box == pytest.approx(wanted_box, abs=1e-3)


def test_the_numbers_are_those_of_the_detections_that_are_written(dataset: Path, tmp_path: Path) -> None:
    observe(small_config(dataset, tmp_path, "run.name=a", "train.max_steps=1"))
    result = evaluated(small_config(dataset, tmp_path, f"eval.checkpoint={tmp_path / 'a'}"))
    rows = json.loads(result.detections.coco_results_json())
    columns = [np.array([row[name] for row in rows]) for name in ("image_id", "category_id", "bbox", "score")]
    table = DetectionTable(columns[0], columns[1], columns[2].astype(np.float32), columns[3].astype(np.float32))
    job = prepare_evaluation(small_config(dataset, tmp_path, f"eval.checkpoint={tmp_path / 'a'}"), lambda line: None)
    again = evaluate_detections(GroundTruth.from_columns(job.data.val), table)
    assert again.as_metrics("") == result.metrics.as_metrics("")


def test_crowds_are_no_boxes_to_train_on_and_are_ignored_in_scores(dataset: Path, tmp_path: Path) -> None:
    """With a crowd over the whole of each image, nothing that is found is wrong, and nothing is missed."""
    copy = make_dataset(tmp_path / "crowded", num_train=8, num_val=4)
    for split in ("train", "val"):
        path = copy / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        image = {entry["id"]: entry for entry in content["images"]}
        for entry in content["annotations"]:
            if split == "val" or entry["image_id"] % 2:
                width, height = image[entry["image_id"]]["width"], image[entry["image_id"]]["height"]
                entry |= {"iscrowd": 1, "bbox": [0, 0, width, height], "area": width * height}
        path.write_text(json.dumps(content))
    seen = observe(small_config(copy, tmp_path, "train.epochs=1", "data.augment.flip=0"))
    for step in range(2):
        for sample, target in zip(seen.samples(step), seen.losses[step].targets, strict=True):
            assert (len(target["labels"]) == 0) is bool(sample.image_id % 2)
    assert seen.metric("val/AP") == [], "no box is scored"


@pytest.mark.parametrize("limit", [2, 100])
def test_an_image_keeps_its_best_detections_up_to_the_limit(dataset: Path, tmp_path: Path, limit: int) -> None:
    observe(small_config(dataset, tmp_path, "run.name=a", "train.max_steps=1"))
    results = [
        evaluated(small_config(dataset, tmp_path, f"eval.checkpoint={tmp_path / 'a'}", f"eval.max_detections={n}"))
        for n in (limit, 100)
    ]
    few, all_of_them = (result.detections for result in results)
    for image_id in np.unique(all_of_them.image_ids):
        best = np.sort(all_of_them.scores[all_of_them.image_ids == image_id])[::-1][:limit]
        assert np.sort(few.scores[few.image_ids == image_id])[::-1].tolist() == best.tolist()
    assert len(few.scores) == 6 * min(limit, 6)


def test_a_run_is_scored_in_the_runs_own_classes_whatever_the_configuration_says(dataset: Path, tmp_path: Path) -> None:
    trained = observe(small_config(dataset, tmp_path, "run.name=a", "train.max_steps=1"))
    config = tiny_config(dataset, tmp_path, f"eval.checkpoint={tmp_path / 'a'}", "model.hidden_dim=64")
    job = prepare_evaluation(config, lambda line: None)
    assert job.data.label_map == trained.job.data.label_map and job.model_config == trained.job.config.model
