"""Requests of several clients in one batch: each gets its own answer, and its own fault."""

from __future__ import annotations

from typing import Any

import numpy as np

from detr_ray.data.image_headers import ImageError
from detr_ray.model.state_dicts import WeightsError
from detr_ray.prediction import Prediction
from detr_ray.prediction.answers import answers
from detr_ray.prediction.requests import ImageRequest, RequestError
from detr_ray.prediction.thresholds import ThresholdError


class Model:
    """Finds as many objects as an image has bytes; cannot decode ``b""``, and knows no best thresholds.

    Its predictions on ``b"nan"`` are not finite.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def predict(
        self, images: list[bytes], threshold: Any, top_k: int | None, batch_size: int, device: Any
    ) -> list[Prediction]:
        self.calls.append((images, threshold, top_k, batch_size, device))
        if threshold == "best_f1":
            raise ThresholdError("threshold: 'best_f1' is not known of this")
        if b"nan" in images:
            raise WeightsError("a.pt gives predictions that are not finite")
        for number, image in enumerate(images):
            if not image:
                raise ImageError(f"image {number}: damaged image")
        return [self._found(image, threshold or 0.0, top_k or 9) for image in images]

    @staticmethod
    def _found(image: bytes, threshold: float, top_k: int) -> Prediction:
        count = min(len(image), top_k)
        scores = np.full(count, threshold, np.float32)
        return Prediction("x", (2, 3), np.zeros((count, 4), np.float32), scores, np.arange(count), ["a"] * count)


def asked(image: bytes, threshold: Any = None, top_k: int | None = None, field: str = "image") -> ImageRequest:
    return ImageRequest(field, image, threshold, top_k)


def test_each_gets_its_own_answer_in_order() -> None:
    model = Model()
    found = answers(
        model, [asked(b"a"), asked(b"bb", 0.5), asked(b"ccc", field="image[1]"), asked(b"dd", 0.5, 1)], 8, "cpu"
    )
    assert [len(one["scores"]) for one in found] == [1, 2, 3, 1]
    assert [one["scores"][0] for one in found] == [0.0, 0.5, 0.0, 0.5]
    assert [one["image"] for one in found] == ["image", "image", "image[1]", "image"]
    assert model.calls == [
        ([b"a", b"ccc"], None, None, 8, "cpu"), ([b"bb"], 0.5, None, 8, "cpu"), ([b"dd"], 0.5, 1, 8, "cpu"),
    ]  # fmt: skip


def test_a_bad_image_does_not_spoil_the_others() -> None:
    found = answers(Model(), [asked(b"a"), asked(b"", field="image[7]"), asked(b"ccc")], 8)
    assert [isinstance(one, RequestError) for one in found] == [False, True, False]
    assert str(found[1]) == "image[7]: damaged image" and found[1].status == 400
    assert len(found[2]["scores"]) == 3


def test_thresholds_that_are_not_known_are_the_clients_fault() -> None:
    found = answers(Model(), [asked(b"a", "best_f1"), asked(b"a")], 8)
    assert str(found[0]) == "threshold: 'best_f1' is not known of this" and found[0].status == 400
    assert found[1]["scores"] == [0.0]


def test_a_model_that_fails_is_not_the_clients_fault() -> None:
    failed, found = answers(Model(), [asked(b"nan"), asked(b"a")], 8)
    assert isinstance(failed, WeightsError) and "not finite" in str(failed)
    assert len(found["scores"]) == 1, "nor that of another client whose image shared the batch"
