"""Where mutants are made, the modules that join the parts, and the tests that are asked about them."""

from __future__ import annotations

TESTS = (
    "tests/seams", "tests/config_keys", "tests/commands", "tests/data", "tests/engine", "tests/loss", "tests/model",
    "tests/evaluation", "tests/viz", "tests/test_cli.py", "tests/test_check.py", "tests/test_prepare.py",
)  # fmt: skip
"""Without Ray, so that a change is tried in seconds."""

MODULES = (
    "detr_ray/engine/loop.py",
    "detr_ray/engine/step.py",
    "detr_ray/engine/reporting/meters.py",
    "detr_ray/engine/optimizer.py",
    "detr_ray/engine/ema.py",
    "detr_ray/engine/checkpoints/training_state.py",
    "detr_ray/engine/validation/in_training.py",
    "detr_ray/engine/checkpoints/run_checkpoints.py",
    "detr_ray/engine/validation/evaluator.py",
    "detr_ray/engine/validation/evaluation_job.py",
    "detr_ray/engine/validation/scoring.py",
    "detr_ray/engine/stream/planned_data.py",
    "detr_ray/engine/stream/batches.py",
    "detr_ray/engine/job.py",
    "detr_ray/engine/checkpoints/store.py",
    "detr_ray/engine/checkpoints/run_directory.py",
    "detr_ray/engine/reporting/records.py",
    "detr_ray/engine/reporting/tracking_store.py",
    "detr_ray/structures.py",
    "detr_ray/data/loader.py",
    "detr_ray/data/planner.py",
    "detr_ray/data/augmentation.py",
    "detr_ray/data/grouping.py",
    "detr_ray/data/splits.py",
    "detr_ray/data/label_map.py",
    "detr_ray/schedules.py",
    "detr_ray/loss/criterion.py",
    "detr_ray/loss/matcher.py",
    "detr_ray/model/__init__.py",
    "detr_ray/model/detr.py",
    "detr_ray/model/transformer.py",
    "detr_ray/model/attention.py",
    "detr_ray/model/backbones/resnet.py",
    "detr_ray/detector/postprocess.py",
    "detr_ray/evaluation/detections.py",
    "detr_ray/runtime/launch.py",
    "detr_ray/train.py",
    "detr_ray/evaluate.py",
    "detr_ray/check.py",
    "detr_ray/prepare.py",
    "detr_ray/cli.py",
    "detr_ray/viz/detections.py",
)
