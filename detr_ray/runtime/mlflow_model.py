"""The code file of each registered model: MLflow runs it to serve the model. Nothing imports it.

It uses the code of the installed package; the model's folder beside it contains only data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detr_ray.model_sources import load_model
from detr_ray.prediction.answers import answers
from detr_ray.prediction.requests import ImageRequest, Limits, RequestError, image_bytes, threshold_of, top_k_of
from detr_ray.tracking.served_model import Answer, serve


def load(folder: str) -> Answer:
    """A function that answers requests with the model of a package."""
    model = load_model(folder)
    limits = Limits()

    def answer(texts: Sequence[str], params: Mapping[str, Any]) -> list[dict[str, Any]]:
        if not 1 <= len(texts) <= limits.images:
            raise RequestError(f"image: holds {len(texts)} images; from 1 to {limits.images} are taken at once")
        threshold, top_k = threshold_of(params.get("threshold")), top_k_of(params.get("top_k"))
        fields = [f"image[{number}]" for number in range(len(texts))]
        asked = [
            ImageRequest(field, image_bytes(text, field, limits), threshold, top_k)
            for field, text in zip(fields, texts, strict=True)
        ]
        found = answers(model, asked, model.config.eval.batch_size)
        for one in found:
            if isinstance(one, RequestError):
                raise one
        return [one for one in found if not isinstance(one, RequestError)]

    return answer


serve(load, (RequestError,))
