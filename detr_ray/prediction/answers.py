"""What a served model answers to what was asked, many requests at a time, each with its own threshold.

One request's fault is not another's: where an image of several cannot be decoded, the others are answered all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detr_ray.data.image_headers import ImageError
from detr_ray.prediction.loaded_model import LoadedModel
from detr_ray.prediction.requests import ImageRequest, RequestError


def answers(model: LoadedModel, asked: Sequence[ImageRequest], batch_size: int) -> list[dict[str, Any] | RequestError]:
    """Answers requests.

    Args:
        model: finds the objects.
        asked: one entry an image.
        batch_size: most images of one forward pass.

    Returns:
        For each, in this order, `Prediction.to_dict` with the image under the name of its field, or what is wrong with
        the request.
    """
    groups: dict[Any, list[int]] = {}
    for number, one in enumerate(asked):
        groups.setdefault((one.threshold, one.top_k), []).append(number)
    found: dict[int, dict[str, Any] | RequestError] = {}
    for members in groups.values():
        answered = _answer_alike(model, [asked[number] for number in members], batch_size)
        found |= zip(members, answered, strict=True)
    return [found[number] for number in range(len(asked))]


def _answer_alike(
    model: LoadedModel, asked: list[ImageRequest], batch_size: int
) -> list[dict[str, Any] | RequestError]:
    """Answers requests that want the same scores and numbers."""
    first = asked[0]
    try:
        found = model.predict([one.image for one in asked], first.threshold, first.top_k, batch_size)
    except ImageError as error:
        if len(asked) > 1:  # the decoder stops at the first bad one
            return [_answer_alike(model, [one], 1)[0] for one in asked]
        reason = str(error).removeprefix("image 0: ")
        return [RequestError(f"{first.field}: {reason}")]
    except ValueError as error:  # best thresholds that are not known, which the message says
        return [RequestError(str(error)) for _ in asked]
    return [{**one.to_dict(), "image": request.field} for one, request in zip(found, asked, strict=True)]
