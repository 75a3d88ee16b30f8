"""The cluster that ``RAY_ADDRESS`` names. Ray is not imported, so that commands can ask whether there is one."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from detr_ray.config import Config, ConfigError
from detr_ray.credentials import without_credentials

_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]@]+):(\d{1,5})")
HOW_TO_NAME_IT = "name a running cluster in RAY_ADDRESS (HOST:PORT), or unset it to train on this machine"
FEW_IMAGES = 200
"""A model is applied to so many images in this process, if nothing else is asked for: Ray takes seconds to start."""


def needs_no_ray(config: Config, images: int) -> bool:
    """Whether this process applies a model to images by itself: if it is told to, or if they are few.

    Args:
        config: of an evaluation or a prediction. Few images are left to Ray, too, where the configuration names a
            launcher or a number of workers, or where there is a cluster or a running Ray.
        images: how many there are.

    Raises:
        ConfigError: see `cluster_address`.
    """
    train = config.train
    if {"launcher", "num_workers"} & train.model_fields_set:
        return train.launcher == "local"
    ray: Any = sys.modules.get("ray")
    return images <= FEW_IMAGES and cluster_address() is None and not (ray is not None and ray.is_initialized())


def cluster_address() -> str | None:
    """The cluster named by ``RAY_ADDRESS``: ``HOST:PORT`` or ``auto``; None if a Ray must be started here.

    Raises:
        ConfigError: it names something that training cannot join.
    """
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if address in ("", "local"):
        return None
    found = _HOST_AND_PORT.fullmatch(address)
    if address == "auto" or (found is not None and 0 < int(found[2]) < 65536):
        return address
    shown = without_credentials(address)
    if "://" not in address:
        raise ConfigError(f"RAY_ADDRESS: {shown!r} is no address of a Ray cluster; {HOW_TO_NAME_IT}")
    kind = "a Ray client server" if address.startswith("ray://") else "a job server"
    raise ConfigError(
        f"RAY_ADDRESS: {shown!r} would be {kind}, through which training cannot run; submit it with `ray job submit` "
        "(its server goes into RAY_API_SERVER_ADDRESS), or name the cluster itself, on one of its machines: HOST:PORT, "
        "where the port is 6379 by default"
    )
