"""The trainings that confirm the best configuration of a search, and the file in its folder with what they gave."""

from __future__ import annotations

import json

from detr_ray.addresses import join
from detr_ray.locations import read_bytes, write_bytes
from detr_ray.search.confirmation import Confirmation, compare

FIRST_SEED = 1000
"""Added to ``run.seed``, so that no trial had the same seed."""
CONFIRMATION_FILE = "confirmation.json"

DEFAULT = "default"
"""Stands for the unchanged configuration where runs are named."""


def confirmation_run(configuration: str, seed: int) -> str:
    """Name of the run that trains one of the two configurations with a seed.

    Args:
        configuration: name of the run that had the best one (a resumed search may find a better one), or `DEFAULT`.
        seed: its ``run.seed``.
    """
    return f"confirm-{configuration}-{seed}"


def write_confirmation(folder: str, best: str, found: Confirmation) -> None:
    """Writes the results into the folder of the search, atomically.

    Args:
        folder: folder or URI.
        best: name of the run whose configuration was confirmed.
        found: the results.
    """
    content = {"run": best, "mode": found.mode, "best": found.best, "default": found.default}
    write_bytes(join(folder, CONFIRMATION_FILE), json.dumps(content, indent=1).encode())


def read_confirmation(folder: str, best: str) -> Confirmation | None:
    """The results for a configuration; None where there are none, or those of another configuration.

    Args:
        folder: folder or URI.
        best: name of the run whose configuration is asked for.

    Raises:
        ValueError: the file is damaged.
    """
    place = join(folder, CONFIRMATION_FILE)
    try:
        content = json.loads(read_bytes(place))
        return compare(content["best"], content["default"], content["mode"]) if content["run"] == best else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place}: damaged ({error}); --confirm writes it anew") from error
