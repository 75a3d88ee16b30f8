"""The scores of all evaluations of a run, in a file of its folder; also those of removed checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from detr_ray.addresses import join
from detr_ray.engine.checkpoints.info import measured_alike
from detr_ray.locations import read_bytes, write_bytes

SCORES = "evaluations.json"

Scores = dict[int, dict[str, float]]
"""Steps that the weights had taken -> name of a score -> its value."""


def read_scores(run_path: str, measured_on: Mapping[str, Any]) -> Scores:
    """The scores of a run so far.

    Args:
        run_path: the run's folder.
        measured_on: data and settings of evaluations (`PlannedData.measured_on`); scores of others are left out.

    Returns:
        An empty dictionary if none were kept.

    Raises:
        OSError: the file cannot be read, or is damaged.
    """
    location = join(run_path, SCORES)
    try:
        content = json.loads(read_bytes(location))
        if not measured_alike(content["measured_on"], measured_on):
            return {}
        return {int(step): dict(scores) for step, scores in content["scores"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{location} is damaged ({error}); remove it, and evaluations are counted anew") from error


def write_scores(run_path: str, measured_on: Mapping[str, Any], scores: Scores) -> None:
    """Keeps the scores of a run.

    Raises:
        OSError: the storage cannot be written.
    """
    content = {"measured_on": dict(measured_on), "scores": {str(step): scores[step] for step in sorted(scores)}}
    write_bytes(join(run_path, SCORES), json.dumps(content, indent=1).encode())
