"""From a configuration to a job: labels, first weights, and evaluating what is there."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens import golden_state_dict
from tiny import fit_here, tiny_config

from detr_ray.config import Config, ConfigError
from detr_ray.data.errors import DataError
from detr_ray.data.label_map import LabelMap
from detr_ray.engine.checkpoints.store import CheckpointStore
from detr_ray.engine.context import LocalContext
from detr_ray.engine.job import code_version, prepare_job, run_summary
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.engine.validation.evaluation_job import EvaluationResult, prepare_evaluation, run_evaluation
from detr_ray.model import build_model
from detr_ray.model.state_dicts import WeightsError


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A file like the published ones, of a tiny model: 92 rows, no names, weights under ``model``."""
    folder = tmp_path_factory.mktemp("weights")
    model = build_model(tiny_config(dataset, folder).model, 91)
    path = folder / "published.pth"
    torch.save({"model": golden_state_dict(model)}, path)
    return path


def quiet(line: str) -> None:
    """Nobody listens."""


def coco128_config(coco128: Path, storage: Path, *overrides: str) -> Config:
    split = f"{{annotations: {coco128}/annotations/instances_train2017.json, images: {coco128}/train2017}}"
    return tiny_config(
        coco128, storage, "data.root=null", f"data.train={split}", f"data.val={split}", "data.max_images=16", *overrides
    )


def evaluate_here(config: Config) -> EvaluationResult:
    job = prepare_evaluation(config, quiet)
    result = run_evaluation(job, LocalContext(), LocalBatches(job.data.plan(1, 0), *job.data.loaders()))
    assert result is not None
    return result


def test_a_run_is_summed_up_in_a_line(dataset: Path, tmp_path: Path) -> None:
    one = prepare_job(tiny_config(dataset, tmp_path, "data.max_images=8", "run.name=a", "train.epochs=1"), quiet)
    assert run_summary(one) == "run a: 6 classes, 8 images, 1 step an epoch of 8 images, 1 step in all"
    more = prepare_job(tiny_config(dataset, tmp_path, "data.max_images=8", "run.name=b", "train.epochs=3"), quiet)
    assert run_summary(more).endswith("1 step an epoch of 8 images, 3 steps in all")


def test_labels_are_contiguous_from_scratch(coco128: Path, tmp_path: Path) -> None:
    job = prepare_job(coco128_config(coco128, tmp_path), quiet)
    assert job.data.label_map.num_classes == 80
    assert len(job.build_detector().model.class_embed.bias) == 81


def test_published_weights_bring_their_labels(coco128: Path, published: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    job = prepare_job(coco128_config(coco128, tmp_path, f"model.init_from={published}"), lines.append)
    assert job.data.label_map == LabelMap.coco91()
    expected = torch.load(published, weights_only=True)["model"]
    found = job.build_detector().model.state_dict()
    learned = [name for name in expected if not name.endswith("num_batches_tracked")]
    assert [name for name in learned if not torch.equal(found[name], expected[name])] == []
    assert "rebuilt     0" in "\n".join(lines)


def test_published_weights_start_a_model_for_other_classes(dataset: Path, published: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    config = tiny_config(dataset, tmp_path, f"model.init_from={published}", "model.num_queries=10")
    job = prepare_job(config, lines.append)
    assert job.data.label_map.num_classes == 6
    expected = torch.load(published, weights_only=True)["model"]
    found = job.build_detector().model.state_dict()
    assert torch.equal(found["class_embed.weight"][-1], expected["class_embed.weight"][-1]), "no-object is kept"
    assert torch.equal(found["query_embed.weight"][:8], expected["query_embed.weight"])
    assert torch.equal(found["transformer.decoder.norm.weight"], expected["transformer.decoder.norm.weight"])
    assert "class_embed.weight" in "\n".join(lines)
    assert fit_here(config).status == "finished"


def test_layers_that_the_weights_lack_are_warned_of(coco128: Path, published: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    prepare_job(
        coco128_config(coco128, tmp_path, f"model.init_from={published}", "model.decoder_layers=3"), lines.append
    )
    (warning,) = [line for line in lines if line.startswith("WARNING")]
    assert warning.startswith("WARNING: 18 tensors start from random weights") and "decoder.layers.2.* (18)" in warning


def test_own_weights_start_another_run(dataset: Path, tmp_path: Path) -> None:
    first = fit_here(tiny_config(dataset, tmp_path, "run.name=first", "optim.ema_decay=0.9"))
    source = f"{first.best_checkpoint}/model.pt"
    job = prepare_job(tiny_config(dataset, tmp_path, f"model.init_from={source}"), quiet)
    saved = torch.load(source, weights_only=True)
    assert all(
        torch.equal(value, saved["ema"][name]) for name, value in job.build_detector().model.state_dict().items()
    )


def test_weights_that_are_not_there_are_refused(dataset: Path, tmp_path: Path) -> None:
    absent = f"model.init_from={tmp_path / 'nowhere.pth'}"
    with pytest.raises(WeightsError, match=r"there is no file .*nowhere\.pth"):
        prepare_job(tiny_config(dataset, tmp_path, absent, "run.name=mine"), quiet)
    assert prepare_job(tiny_config(dataset, tmp_path, "run.name=mine"), quiet).run.is_new, "the name is still free"


def test_published_weights_are_evaluated_in_coco_ids(coco128: Path, published: Path, tmp_path: Path) -> None:
    result = evaluate_here(coco128_config(coco128, tmp_path, f"eval.checkpoint={published}"))
    coco_ids = [category_id for category_id, _ in LabelMap.coco91().categories]
    assert set(np.unique(result.detections.category_ids)) <= set(coco_ids)
    assert result.metrics.images == 16


def test_the_numbers_are_those_of_a_plain_script(coco128: Path, published: Path, tmp_path: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    result = evaluate_here(coco128_config(coco128, tmp_path, f"eval.checkpoint={published}"))
    results = tmp_path / "results.json"
    results.write_bytes(result.detections.coco_results_json())
    ground_truth = COCO(str(coco128 / "annotations/instances_train2017.json"))
    scorer = COCOeval(ground_truth, ground_truth.loadRes(str(results)), "bbox")
    scorer.params.imgIds = sorted(ground_truth.getImgIds())[:16]
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    metrics = result.metrics.as_metrics("")
    assert [metrics[name] for name in names] == pytest.approx(scorer.stats.tolist(), abs=1e-12)


def test_a_run_is_evaluated_by_its_best_checkpoint(dataset: Path, tmp_path: Path) -> None:
    trained = fit_here(tiny_config(dataset, tmp_path, "run.name=a", "train.epochs=3", "optim.ema_decay=0.9"))
    result = evaluate_here(tiny_config(dataset, tmp_path, f"eval.checkpoint={trained.run_path}"))
    best = CheckpointStore(f"{trained.run_path}/checkpoints").best()
    assert best is not None and result.checkpoint == f"{best.path}/model.pt"
    assert (
        result.metrics.as_metrics("val/")["val/AP"]
        == json.loads(Path(best.path, "manifest.json").read_text())["metrics"]["val/AP"]
    )


def test_a_folder_without_a_checkpoint_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no whole checkpoint"):
        evaluate_here(tiny_config(dataset, tmp_path, f"eval.checkpoint={tmp_path}"))


def test_a_checkpoint_of_another_model_is_refused(
    dataset: Path, published: Path, coco128: Path, tmp_path: Path
) -> None:
    config = coco128_config(coco128, tmp_path, f"eval.checkpoint={published}", "model.hidden_dim=64")
    with pytest.raises(ConfigError, match=r"eval\.checkpoint: .* does not fit"):
        evaluate_here(config)


def test_a_wrong_image_folder_is_found_before_anything_starts(coco128: Path, tmp_path: Path) -> None:
    config = coco128_config(coco128, tmp_path, f"data.train.images={tmp_path}")
    with pytest.raises(DataError, match=r"000000000009\.jpg: no such file.*Is the folder right"):
        prepare_job(config, quiet)


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_the_commit_is_that_of_the_working_tree(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()

    def git(*arguments: str, folder: Path = first) -> str:
        me = ("-c", "user.name=me", "-c", "user.email=me@example.org", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", *me, *arguments], cwd=folder, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "--initial-branch=main")
    assert code_version(first) == "", "there is no commit yet"
    git("commit", "--allow-empty", "--message=one")
    git("worktree", "add", "-b", "other", str(second))
    git("commit", "--allow-empty", "--message=two", folder=second)
    (second / "sub").mkdir()
    one, two = (git("rev-parse", "HEAD", folder=folder) for folder in (first, second))
    assert one != two
    for _ in range(2):
        assert (code_version(first), code_version(second), code_version(second / "sub")) == (one, two, two)
        git("pack-refs", "--all")
    git("checkout", "--detach")
    assert code_version(first) == one
