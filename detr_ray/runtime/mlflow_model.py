"""The code file of each registered model: MLflow runs it to serve the model. Nothing imports it.

It uses the code of the installed package; the model's folder beside it contains only data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detr_ray.model_sources import load_model
from detr_ray.prediction.answers import answers
from detr_ray.prediction.requests import Limits, RequestError, image_requests, threshold_of, top_k_of
from detr_ray.tracking.served_model import Answer, serve


def load(folder: str) -> Answer:
    """A function that answers requests with the model of a package."""
    model = load_model(folder)
    limits = Limits()

    def answer(texts: Sequence[str], params: Mapping[str, Any]) -> list[dict[str, Any]]:
        threshold, top_k = threshold_of(params.get("threshold")), top_k_of(params.get("top_k"))
        asked = image_requests(texts, threshold, top_k, limits)
        found = answers(model, asked, model.config.eval.batch_size)
        for one in found:
            if isinstance(one, Exception):
                raise one
        return [one for one in found if not isinstance(one, Exception)]

    return answer


serve(load, (RequestError,))
