"""Requests to a served model, for any server: JSON with base64 images, or the bytes of one image.

Every fault raises a `RequestError` that names the field. The size of an image is checked by its header, before it is
decoded. Knows nothing of servers or models.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detr_ray.data.image_headers import ImageError, read_header
from detr_ray.prediction.thresholds import Threshold
from detr_ray.printable import printable, shortened

FIELDS = ("image", "threshold", "top_k")
"""Keys of a request. ``image`` is one image or a list of images, each the base64 text of an image file."""

_LARGEST_IMAGES = 4
"""A request may have so many images of the largest size; of smaller ones more."""

BAD_REQUEST, TOO_LARGE, UNSUPPORTED = 400, 413, 415


class RequestError(Exception):
    """A request that is not valid.

    Args:
        message: names the field and says what to do.
        status: the HTTP status, 4xx.
    """

    def __init__(self, message: str, status: int = BAD_REQUEST) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a request.

    Attributes:
        request_bytes: largest length of its body.
        image_pixels: largest number of pixels of each image. Those of a request have together at most
            `request_pixels`, since some kinds of images (16 bits, for example) are decoded before they share a batch.
        images: largest number of images.
    """

    request_bytes: int = 32 << 20
    image_pixels: int = 50_000_000
    images: int = 32

    @property
    def request_pixels(self) -> int:
        """Largest number of pixels of all images of a request."""
        return _LARGEST_IMAGES * self.image_pixels

    def check_body(self, num_bytes: int) -> None:
        """Refuses a body that is too long.

        Raises:
            RequestError: it has more than ``request_bytes`` bytes.
        """
        if num_bytes > self.request_bytes:
            raise RequestError(f"the body is longer than the {self.request_bytes:,} bytes that are taken", TOO_LARGE)

    def check_image(self, data: bytes, field: str) -> int:
        """Refuses data that is no image, by its header, and images with too many pixels.

        Args:
            data: the content of an image file.
            field: its name in messages.

        Returns:
            Its number of pixels.

        Raises:
            RequestError: the image is refused.
        """
        try:
            height, width = read_header(data, field).stored
        except ImageError as error:
            raise RequestError(str(error)) from error
        if height * width > self.image_pixels:
            raise RequestError(
                f"{field}: has {height:,} x {width:,} (height x width) pixels, and {self.image_pixels:,} are the most "
                "that are taken: make it smaller",
                TOO_LARGE,
            )
        return height * width


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """A request for one image.

    Attributes:
        field: name of the image in messages and answers.
        image: content of an image file.
        threshold: as `LoadedModel.predict` takes it.
        top_k: likewise.
    """

    field: str
    image: bytes
    threshold: Threshold
    top_k: int | None


def from_json(body: bytes, limits: Limits) -> list[ImageRequest]:
    """Reads a request for images: ``{"image": "<base64>" or ["<base64>", ...], "threshold": 0.5, "top_k": 10}``.

    Raises:
        RequestError: it cannot be answered.
    """
    limits.check_body(len(body))
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON ({error}); send {{'image': '<base64>'}} in JSON") from error
    if not isinstance(content, dict):
        raise RequestError(f"the body is {_kind(content)}; send a JSON object with the key image")
    check_fields(content, FIELDS)
    if "image" not in content:
        raise RequestError("image: is missing; give the base64 text of an image file, or a list of such texts")
    given = content["image"]
    threshold, top_k = threshold_of(content.get("threshold")), top_k_of(content.get("top_k"))
    if not isinstance(given, list):
        return [ImageRequest("image", image_bytes(given, "image", limits), threshold, top_k)]
    return image_requests(given, threshold, top_k, limits)


def image_requests(texts: Sequence[Any], threshold: Threshold, top_k: int | None, limits: Limits) -> list[ImageRequest]:
    """Requests for several images, ``image[0]`` and so on; see `image_bytes`.

    Raises:
        RequestError: one of them is refused, or they are too many, or too large together.
    """
    if not 1 <= len(texts) <= limits.images:
        raise RequestError(f"image: holds {len(texts)} images; from 1 to {limits.images} are taken at once")
    asked, pixels = [], 0
    for number, text in enumerate(texts):
        field = f"image[{number}]"
        data = _decoded(text, field)
        pixels += limits.check_image(data, field)
        if pixels > limits.request_pixels:
            raise RequestError(
                f"image: up to {field} they have {pixels:,} pixels together, and {limits.request_pixels:,} are the "
                "most that are taken at once: send fewer, or make them smaller",
                TOO_LARGE,
            )
        asked.append(ImageRequest(field, data, threshold, top_k))
    return asked


def from_image(body: bytes, query: Mapping[str, str], limits: Limits) -> list[ImageRequest]:
    """Reads a request whose body is an image file; ``threshold`` and ``top_k`` are parameters of the address.

    Raises:
        RequestError: it cannot be answered.
    """
    limits.check_body(len(body))
    check_fields(query, FIELDS[1:])
    limits.check_image(body, "image")
    return [ImageRequest("image", body, threshold_of(query.get("threshold")), top_k_of(query.get("top_k")))]


def image_bytes(text: Any, field: str, limits: Limits) -> bytes:
    """Decodes an image file from base64 text or a ``data:`` URL.

    Raises:
        RequestError: it is no image, or too large; see `Limits.check_image`.
    """
    data = _decoded(text, field)
    limits.check_image(data, field)
    return data


def _decoded(text: Any, field: str) -> bytes:
    if not isinstance(text, str):
        raise RequestError(f"{field}: is {_kind(text)}; give the base64 text of an image file")
    encoded = text.partition(";base64,")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{field}: is no base64 ({error})") from error


def threshold_of(value: Any) -> Threshold:
    """A score in 0..1 from a number or a text; ``"best_f1"`` and None are returned unchanged.

    Raises:
        RequestError: it is something else.
    """
    if value == "best_f1":
        return "best_f1"
    number = _number(value)
    if value is not None and (number is None or not 0 <= number <= 1):
        raise RequestError(f"threshold: is {_shown(value)}; give a number from 0 to 1, or best_f1")
    return number


def top_k_of(value: Any) -> int | None:
    """A number of objects, at least 1, from a whole number or a text; None is returned unchanged.

    Raises:
        RequestError: it is something else.
    """
    number = _number(value)
    if value is not None and (number is None or number < 1 or number != int(number)):
        raise RequestError(f"top_k: is {_shown(value)}; give a whole number of at least 1")
    return None if number is None else int(number)


def check_fields(content: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Refuses unknown keys, which may be misspelt.

    Raises:
        RequestError: there are unknown keys.
    """
    for name in content:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}"
            raise RequestError(f"{printable(shortened(name, 60))}: is no field of a request; {hint}")


def _number(value: Any) -> float | None:
    """A finite number from a number or a text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None


def _kind(value: Any) -> str:
    """The kind of a JSON value, in words."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _shown(value: Any) -> str:
    return printable(shortened(json.dumps(value, default=str), 60))
