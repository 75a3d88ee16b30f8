"""The model learns eight real images by heart: data, loss, model and workers fit together."""

from __future__ import annotations

from pathlib import Path

import pytest

from detr_ray.config import load_config
from detr_ray.runtime.launch import fit

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_eight_real_images_are_learnt_by_heart(coco128: Path, tmp_path: Path) -> None:
    split = f"{{annotations: {coco128}/annotations/instances_train2017.json, images: {coco128}/train2017}}"
    overrides = [f"data.train={split}", f"data.val={split}", f"run.storage={tmp_path}", "tracking.enabled=false"]
    result = fit(load_config([CONFIGS / "coco128.yaml", CONFIGS / "overfit.yaml"], overrides))
    assert result.best_metrics["val/AP"] >= 0.6
