"""What may be asked of a served model, and what is said of each fault."""

from __future__ import annotations

import base64
import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image

from detr_ray.prediction.requests import Limits, RequestError, from_image, from_json

SMALL = Limits(request_bytes=20_000, image_pixels=3000, images=3)


def png(height: int = 30, width: int = 40) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 7, np.uint8)).save(file, "PNG")
    return file.getvalue()


def huge_png(side: int) -> bytes:
    """A file that says that it has so many pixels a side; nothing of them is there."""
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big") + png()[33:]


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def test_an_image_and_several() -> None:
    (one,) = from_json(body(image=text(png()), threshold=0.25, top_k=4), SMALL)
    assert (one.field, one.image, one.threshold, one.top_k) == ("image", png(), 0.25, 4)
    many = from_json(body(image=[text(png()), text(png(3, 5))]), SMALL)
    assert [(asked.field, asked.image) for asked in many] == [("image[0]", png()), ("image[1]", png(3, 5))]
    assert all(asked.threshold is None and asked.top_k is None for asked in many)


@pytest.mark.parametrize(
    ("fields", "threshold", "top_k"),
    [
        ({"threshold": 0}, 0.0, None),
        ({"threshold": 1, "top_k": 1}, 1.0, 1),
        ({"threshold": "best_f1", "top_k": 2.0}, "best_f1", 2),
        ({"threshold": None, "top_k": None}, None, None),
    ],
)
def test_what_is_wanted_of_the_scores(fields: dict, threshold: object, top_k: object) -> None:
    (asked,) = from_json(body(image=text(png()), **fields), SMALL)
    assert (asked.threshold, asked.top_k) == (threshold, top_k)


def test_base64_as_browsers_and_mail_programs_write_it() -> None:
    plain = text(png())
    broken = "\r\n".join(plain[at : at + 76] for at in range(0, len(plain), 76))
    for written in (broken, f"data:image/png;base64,{plain}"):
        assert from_json(body(image=written), SMALL)[0].image == png()


def test_the_bytes_of_an_image() -> None:
    (asked,) = from_image(png(), {"threshold": "0.5", "top_k": "3"}, SMALL)
    assert (asked.field, asked.image, asked.threshold, asked.top_k) == ("image", png(), 0.5, 3)
    (asked,) = from_image(png(), {}, SMALL)
    assert asked.threshold is None and asked.top_k is None


FAULTS: dict[str, tuple[bytes, str, int]] = {
    "not JSON": (b"image=abc", "the body is no JSON", 400),
    "not text": (b"\xff\xfe\x00", "the body is no JSON", 400),
    "too deep": (b"[" * 15_000, "the body is no JSON", 400),
    "a list": (b"[1]", "the body is a list; send a JSON object", 400),
    "null": (b"null", "the body is null", 400),
    "no image": (b"{}", "image: is missing", 400),
    "a misspelt field": (body(image="", thresh=1), "thresh: is no field of a request; did you mean threshold", 400),
    "a strange field": (body(image="", **{"x\n": 1}), r"x\n: is no field of a request; there are image, thr", 400),
    "a number": (body(image=5), "image: is a number; give the base64 text", 400),
    "an object": (body(image=[{}]), "image[0]: is an object", 400),
    "no images": (body(image=[]), "image: holds 0 images; from 1 to 3", 400),
    "too many images": (body(image=["a"] * 4), "image: holds 4 images", 400),
    "no base64": (body(image=["AAAA", "%%%"]), "image[0]: not an image", 400),
    "no base64 at all": (body(image="%%%"), "image: is no base64", 400),
    "no image in it": (body(image=text(b"hello")), "image: not an image", 400),
    "an empty image": (body(image=""), "image: the file is empty", 400),
    "100 megapixels": (body(image=text(huge_png(10_000))), "image: has 10,000 x 10,000 (height x width) pixels", 413),
    "over a gigapixel": (body(image=text(huge_png(40_000))), "image: too large", 400),
    "too long": (body(image="A" * 20_000), "the body is longer than the 20,000 bytes", 413),
    "a score above 1": (body(image=text(png()), threshold=1.5), "threshold: is 1.5; give a number from 0 to 1", 400),
    "a score that is none": (body(image=text(png()), threshold="high"), 'threshold: is "high"', 400),
    "not a number": (b'{"image": "%s", "threshold": NaN}' % text(png()).encode(), "threshold: is NaN", 400),
    "true": (body(image=text(png()), threshold=True), "threshold: is true", 400),
    "half an object": (body(image=text(png()), top_k=1.5), "top_k: is 1.5; give a whole number of at least 1", 400),
    "no objects": (body(image=text(png()), top_k=0), "top_k: is 0", 400),
    "endless objects": (body(image=text(png()), top_k=float("inf")), "top_k: is Infinity", 400),
}


def test_the_images_of_a_request_are_limited_together() -> None:
    limits = Limits(image_pixels=1200)
    assert len(from_json(body(image=[text(png())] * 4), limits)) == 4
    with pytest.raises(
        RequestError, match=r"^image: up to image\[4\] they have 4,815 pixels together, and 4,800"
    ) as big:
        from_json(body(image=[text(png())] * 4 + [text(png(3, 5))]), limits)
    assert big.value.status == 413


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_json_name_the_field(fault: str) -> None:
    content, message, status = FAULTS[fault]
    with pytest.raises(RequestError) as raised:
        from_json(content, SMALL)
    assert message in str(raised.value) and raised.value.status == status
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "query", "message", "status"),
    [
        (b"", {}, "image: the file is empty", 400),
        (b"no image", {}, "image: not an image", 400),
        (png(60, 60), {}, "image: has 60 x 60 (height x width) pixels, and 3,000 are the most", 413),
        (bytes(20_001), {}, "the body is longer", 413),
        (png(), {"top_k": "x"}, 'top_k: is "x"', 400),
        (png(), {"image": "x"}, "image: is no field", 400),
    ],
)
def test_faults_of_image_bodies_name_the_field(content: bytes, query: dict, message: str, status: int) -> None:
    with pytest.raises(RequestError) as raised:
        from_image(content, query, SMALL)
    assert message in str(raised.value) and raised.value.status == status


def test_limits_are_reached_and_not_passed() -> None:
    assert from_image(png(50, 60), {}, SMALL)
    exact = body(image=text(png()))
    assert from_json(exact, Limits(request_bytes=len(exact)))
    with pytest.raises(RequestError, match="longer"):
        from_json(exact, Limits(request_bytes=len(exact) - 1))
