"""Answers many requests to a served model at once, each with its own threshold.

A faulty request does not affect others: if one image cannot be decoded, or gives predictions that are not finite, the
other requests are still answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detr_ray.data.image_headers import ImageError
from detr_ray.model.state_dicts import WeightsError
from detr_ray.prediction.loaded_model import Device, LoadedModel
from detr_ray.prediction.requests import ImageRequest, RequestError
from detr_ray.prediction.thresholds import ThresholdError

Answer = dict[str, Any] | RequestError | WeightsError
"""`Prediction.to_dict` with the image named after the request's field; the fault of the request; or the model's."""


def answers(model: LoadedModel, asked: Sequence[ImageRequest], batch_size: int, device: Device = None) -> list[Answer]:
    """Answers requests.

    Args:
        model: finds the objects.
        asked: one entry an image.
        batch_size: most images of one forward pass.
        device: as `LoadedModel.predict` takes it.

    Returns:
        One entry for each request, in order.
    """
    groups: dict[Any, list[int]] = {}
    for number, one in enumerate(asked):
        groups.setdefault((one.threshold, one.top_k), []).append(number)
    found: dict[int, Answer] = {}
    for members in groups.values():
        answered = _answer_alike(model, [asked[number] for number in members], batch_size, device)
        found |= zip(members, answered, strict=True)
    return [found[number] for number in range(len(asked))]


def _answer_alike(model: LoadedModel, asked: list[ImageRequest], batch_size: int, device: Device) -> list[Answer]:
    """Answers requests with the same threshold and number of objects."""
    first = asked[0]
    try:
        found = model.predict([one.image for one in asked], first.threshold, first.top_k, batch_size, device)
    except (ImageError, WeightsError) as error:
        if len(asked) > 1:  # it stops at the first such image
            return [_answer_alike(model, [one], 1, device)[0] for one in asked]
        if isinstance(error, WeightsError):
            return [error]
        reason = str(error).removeprefix("image 0: ")
        return [RequestError(f"{first.field}: {reason}")]
    except ThresholdError as error:  # the best ones are unknown
        return [RequestError(str(error)) for _ in asked]
    return [{**one.to_dict(), "image": request.field} for one, request in zip(found, asked, strict=True)]
