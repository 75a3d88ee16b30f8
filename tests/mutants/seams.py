"""Where mutants are made: the modules that join the parts, and for each the tests that cover it, the fastest first.

A module's tests run in this order until one fails. A mutant survives where none of them does, so a list that lacks a
test makes mutants survive that the whole suite would notice.
"""

from __future__ import annotations

_SEAMS = "tests/seams"
_KEYS = "tests/config_keys"
_OPTIONS = "tests/commands"

MODULES: dict[str, tuple[str, ...]] = {
    "detr_ray/engine/loop.py": (_SEAMS, _KEYS, "tests/engine/test_loop.py", "tests/engine/test_scoring.py"),
    "detr_ray/engine/step.py": (_SEAMS, "tests/engine/test_workers.py", _KEYS, "tests/engine/test_loop.py"),
    "detr_ray/engine/meters.py": (_SEAMS, "tests/engine/test_loop.py", "tests/engine/test_workers.py", _KEYS),
    "detr_ray/engine/optimizer.py": ("tests/engine/test_optimizer.py", _SEAMS, _KEYS),
    "detr_ray/engine/ema.py": (_SEAMS, _KEYS, "tests/engine/test_loop.py"),
    "detr_ray/engine/evaluator.py": (_SEAMS, _KEYS, "tests/engine/test_job.py", "tests/engine/test_loop.py"),
    "detr_ray/engine/evaluation_job.py": (_SEAMS, "tests/engine/test_job.py", _OPTIONS, _KEYS),
    "detr_ray/engine/scoring.py": (_SEAMS, "tests/engine/test_scoring.py", "tests/engine/test_loop.py"),
    "detr_ray/engine/planned_data.py": (_SEAMS, _KEYS),
    "detr_ray/engine/batches.py": (_SEAMS, _KEYS, "tests/data/test_planner.py", "tests/engine/test_workers.py"),
    "detr_ray/engine/job.py": (_KEYS, "tests/engine/test_job.py", _SEAMS, "tests/engine/test_loop.py"),
    "detr_ray/engine/checkpoint.py": ("tests/engine/test_checkpoint.py", _SEAMS, "tests/engine/test_loop.py"),
    "detr_ray/engine/run_directory.py": ("tests/engine/test_loop.py", _KEYS, "tests/test_check.py"),
    "detr_ray/engine/records.py": (_KEYS, _OPTIONS),
    "detr_ray/structures.py": (_SEAMS, "tests/data/test_loader.py", "tests/engine/test_loop.py"),
    "detr_ray/data/loader.py": ("tests/data/test_loader.py", _SEAMS, _KEYS),
    "detr_ray/data/planner.py": ("tests/data/test_planner.py", _SEAMS, _KEYS),
    "detr_ray/data/augmentation.py": ("tests/data/test_augmentation.py", _SEAMS, _KEYS),
    "detr_ray/data/grouping.py": ("tests/data/test_planner.py",),
    "detr_ray/data/splits.py": (_KEYS, "tests/data/test_shards.py"),
    "detr_ray/data/label_map.py": ("tests/data/test_label_map.py", _SEAMS, "tests/engine/test_job.py"),
    "detr_ray/schedules.py": (_SEAMS, "tests/engine/test_optimizer.py", _KEYS),
    "detr_ray/loss/criterion.py": (_SEAMS, "tests/loss"),
    "detr_ray/loss/matcher.py": (_SEAMS, "tests/loss"),
    "detr_ray/model/__init__.py": (_KEYS, "tests/model"),
    "detr_ray/model/detr.py": (_SEAMS, "tests/model"),
    "detr_ray/model/transformer.py": (_SEAMS, "tests/model/test_transformer.py", "tests/model/test_detr.py"),
    "detr_ray/model/attention.py": (_SEAMS, "tests/model/test_attention.py", "tests/model/test_detr.py"),
    "detr_ray/model/backbone.py": ("tests/model/test_backbone.py", _SEAMS, "tests/model/test_detr.py"),
    "detr_ray/model/postprocess.py": ("tests/model/test_postprocess.py", _SEAMS),
    "detr_ray/evaluation/detections.py": ("tests/evaluation/test_detections.py", _SEAMS, _OPTIONS),
    "detr_ray/runtime/launch.py": (_KEYS, _OPTIONS),
    "detr_ray/runtime/session.py": (_KEYS, "tests/runtime/test_session.py"),
    "detr_ray/runtime/datasets.py": (_KEYS, "tests/runtime/test_fit.py"),
    "detr_ray/train.py": (_OPTIONS, "tests/test_cli.py"),
    "detr_ray/evaluate.py": (_OPTIONS,),
    "detr_ray/check.py": (_OPTIONS, "tests/test_check.py"),
    "detr_ray/prepare.py": (_OPTIONS, "tests/test_prepare.py"),
    "detr_ray/cli.py": (_OPTIONS, "tests/test_cli.py"),
    "detr_ray/viz/detections.py": (_OPTIONS, "tests/viz"),
}
