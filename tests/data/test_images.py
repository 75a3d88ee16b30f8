"""Every fault and every mode of a stored image, caused for real: each becomes RGB pixels or an error that names it."""

from __future__ import annotations

import io
import json
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.io
from PIL import Image, ImageOps
from samples import read_image_size, read_size

from detr_ray.data.decoding import decode_image, reduction
from detr_ray.data.errors import DataError
from detr_ray.data.formats.coco import read_coco_index
from detr_ray.data.image_headers import ImageError
from detr_ray.data.images import ImageReader

HEIGHT, WIDTH = 37, 53


def picture(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Smooth, different in every corner and channel: survives JPEG, and shows every flip and turn."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x // max(width - 1, 1), 255 * y // max(height - 1, 1)
    return Image.fromarray(np.stack([red, green, (red + green) // 2], axis=2).astype(np.uint8))


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def png(colour_type: int, bit_depth: int, rows: list[bytes], width: int) -> bytes:
    """A PNG by hand, for the kinds that Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, len(rows), bit_depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def pixels(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.dtype == torch.uint8 and tensor.ndim == 3 and tensor.shape[0] == 3
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_lossless_formats_keep_every_pixel(file_format: str) -> None:
    decoded = decode_image(encode(picture(), file_format), "a.x", (HEIGHT, WIDTH))
    np.testing.assert_array_equal(pixels(decoded), np.asarray(picture()))


@pytest.mark.parametrize(
    ("file_format", "options", "tolerance"),
    [
        ("JPEG", {"quality": 95}, 8),
        ("JPEG", {"quality": 95, "progressive": True}, 8),
        ("WEBP", {"quality": 95}, 16),
        ("GIF", {}, 64),
    ],
)
def test_lossy_formats_come_close(file_format: str, options: dict, tolerance: int) -> None:
    decoded = pixels(decode_image(encode(picture(), file_format, **options), "a.x"))
    assert np.abs(decoded.astype(int) - np.asarray(picture())).max() <= tolerance


def test_jpeg_pixels_are_those_of_pillow() -> None:
    data = encode(picture(), "JPEG", quality=80)
    np.testing.assert_array_equal(pixels(decode_image(data, "a.jpg")), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    stored = picture().convert(mode)
    file_format = "TIFF" if mode == "CMYK" else "PNG"
    decoded = pixels(decode_image(encode(stored, file_format), "a.x"))
    np.testing.assert_array_equal(decoded, np.asarray(stored.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_become_rgb(mode: str) -> None:
    stored = picture().convert(mode)
    decoded = pixels(decode_image(encode(stored, "JPEG", quality=95), "a.jpg"))
    assert np.abs(decoded.astype(int) - np.asarray(stored.convert("RGB"))).max() <= 12


def test_ycck_jpegs_are_read_as_pillow_reads_them() -> None:
    data = bytearray(encode(picture().convert("CMYK"), "JPEG", quality=95))
    transform = data.index(b"Adobe") + 11
    data[transform] = 2
    expected = Image.open(io.BytesIO(bytes(data))).convert("RGB")
    np.testing.assert_array_equal(pixels(decode_image(bytes(data), "a.jpg")), np.asarray(expected))


def test_alpha_is_dropped_not_blended() -> None:
    stored = picture()
    stored.putalpha(Image.new("L", stored.size, 7))
    for file_format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(pixels(decode_image(encode(stored, file_format), "a.x")), np.asarray(picture()))


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency_keeps_its_colours() -> None:
    stored = picture().quantize(16)
    data = encode(stored, "PNG", transparency=bytes(range(0, 256, 16)))
    np.testing.assert_array_equal(pixels(decode_image(data, "a.png")), np.asarray(stored.convert("RGB")))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, HEIGHT * WIDTH).round().astype(np.uint16).reshape(HEIGHT, WIDTH)
    for data in (encode(Image.fromarray(values), "PNG"), encode(Image.fromarray(values), "TIFF")):
        decoded = pixels(decode_image(data, "a.png"))
        np.testing.assert_array_equal(decoded, np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def test_sixteen_bit_colour_is_scaled_like_sixteen_bit_grey() -> None:
    values = np.random.default_rng(0).integers(0, 65536, size=(5, 7, 3)).astype(">u2")
    data = png(colour_type=2, bit_depth=16, rows=[row.tobytes() for row in values], width=7)
    np.testing.assert_array_equal(pixels(decode_image(data, "a.png")), (values >> 8).astype(np.uint8))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_range_are_refused(dtype: type) -> None:
    data = encode(Image.fromarray(np.full((4, 4), 100_000, dtype)), "TIFF")
    with pytest.raises(ImageError, match=r"depth\.tif: its pixels are .* without a defined range"):
        decode_image(data, "depth.tif")


def test_an_animation_shows_its_first_frame() -> None:
    frames = [picture(), ImageOps.invert(picture())]
    data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(pixels(decode_image(data, "a.webp")), np.asarray(picture()))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(), file_format, exif=exif, **({"lossless": True} if file_format == "WEBP" else {}))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    upright = (WIDTH, HEIGHT) if orientation >= 5 else (HEIGHT, WIDTH)
    assert expected.shape[:2] == upright
    np.testing.assert_array_equal(pixels(decode_image(data, "a.x", upright)), expected)
    assert read_image_size(data, "a.x", upright) == read_image_size(data, "a.x") == upright


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_annotations_of_the_image_as_stored_leave_it_as_stored(file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(picture(), file_format, exif=exif)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(pixels(decode_image(data, "a.x", (HEIGHT, WIDTH))), expected)
    assert read_image_size(data, "a.x", (HEIGHT, WIDTH)) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(HEIGHT + 1, WIDTH), (WIDTH, HEIGHT)])
def test_another_size_than_annotated_is_an_error(file_format: str, size: tuple[int, int]) -> None:
    data = encode(picture(), file_format)
    message = rf"a\.x: the image is {HEIGHT}x{WIDTH} .*annotations say {size[0]}x{size[1]}"
    with pytest.raises(ImageError, match=message):
        decode_image(data, "a.x", size)
    with pytest.raises(ImageError, match=message):
        read_image_size(data, "a.x", size)


def test_a_header_that_claims_gigabytes_is_refused_before_decoding() -> None:
    data = bytearray(encode(picture(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(ImageError, match="65535x65535"):
        decode_image(bytes(data), "a.jpg", (HEIGHT, WIDTH))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.97])
def test_truncated_images_are_errors(file_format: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, file_format)
    with pytest.raises(ImageError, match=r"^train/cut\.x: "):
        decode_image(data[: int(share * len(data))], "train/cut.x", (64, 64))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_ends_in_zeros_is_an_error(progressive: bool) -> None:
    """What a download that broke into a preallocated file leaves; Pillow shows grey pixels for it."""
    data = encode(picture(200, 200), "JPEG", quality=95, progressive=progressive)
    half = len(data) // 2
    with pytest.raises(ImageError, match="incomplete or truncated"):
        decode_image(data[:half] + bytes(len(data) - half), "a.jpg")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"<html>404 not found</html>", "not an image"),
        (bytes(1000), "not an image"),
        (b"\xff\xd8\xff", "image"),
        (b"\xff\xd8\xff\xe0" + bytes(500), "image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "image"),
    ],
)
def test_what_is_not_an_image_is_an_error_that_names_it(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=rf"^some/file\.jpg: .*{reason}") as caught:
        decode_image(data, "some/file.jpg")
    assert isinstance(caught.value, DataError)
    assert ".cpp" not in str(caught.value)
    with pytest.raises(ImageError, match=r"^some/file\.jpg: "):
        read_image_size(data, "some/file.jpg")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_an_image_of_one_pixel_is_an_image(file_format: str) -> None:
    data = encode(Image.new("RGB", (1, 1), (200, 100, 50)), file_format)
    assert np.abs(pixels(decode_image(data, "a.x", (1, 1))).astype(int) - (200, 100, 50)).max() <= 4
    with pytest.raises(ImageError, match="the image is 1x1"):
        decode_image(data, "a.x", (480, 640))


def test_jpegs_are_decoded_as_by_torchvision_without_its_warnings() -> None:
    data = encode(Image.effect_noise((16, 8), 50).convert("RGB"), "JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode_image(data, "a.jpg")
    theirs = torchvision.io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode="RGB")
    assert torch.equal(found, theirs)


def folder_reader(tmp_path: Path, file_names: list[str], root: str | None = None) -> ImageReader:
    images = [{"id": i + 1, "file_name": n, "height": HEIGHT, "width": WIDTH} for i, n in enumerate(file_names)]
    annotations = tmp_path / "annotations.json"
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    annotations.write_text(json.dumps(content))
    return ImageReader(read_coco_index(str(annotations), root or str(tmp_path / "images")))


def test_reader_reads_files_of_a_folder_and_its_subfolders(tmp_path: Path) -> None:
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "images" / "a.bin").write_bytes(b"first")
    (tmp_path / "images" / "sub" / "b.bin").write_bytes(b"second")
    for root in (str(tmp_path / "images"), (tmp_path / "images").as_uri()):
        reader = pickle.loads(pickle.dumps(folder_reader(tmp_path, ["a.bin", "sub/b.bin"], root)))
        assert [reader.read(0), reader.read(1)] == [b"first", b"second"]
        assert reader.read_head(1, 3) == b"sec"


def test_reader_keeps_its_folder_when_the_working_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.bin").write_bytes(b"first")
    monkeypatch.chdir(tmp_path)
    reader = folder_reader(tmp_path, ["a.bin"], "images")
    monkeypatch.chdir("/")
    assert reader.read(0) == b"first"


@pytest.mark.parametrize("name", ["../secret.txt", "sub/../../secret.txt", "/etc/hostname", "a\0b"])
def test_reader_refuses_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.txt").write_bytes(b"secret")
    for root in (str(tmp_path / "images"), (tmp_path / "images").as_uri()):
        with pytest.raises(ImageError, match="inside of the images' folder"):
            folder_reader(tmp_path, [name], root).read(0)


@pytest.mark.parametrize("as_uri", [False, True])
def test_reader_names_files_that_are_missing_or_folders(tmp_path: Path, as_uri: bool) -> None:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    reader = folder_reader(tmp_path, ["gone.jpg", "sub"], folder.as_uri() if as_uri else None)
    with pytest.raises(ImageError, match=r"images/gone\.jpg: no such file"):
        reader.read(0)
    with pytest.raises(DataError, match=r"images/sub: "):
        reader.read(1)


@pytest.mark.parametrize("padding", [0, 200_000])
def test_size_is_read_from_the_header_however_long_that_is(tmp_path: Path, padding: int) -> None:
    (tmp_path / "images").mkdir()
    comment = b"".join(b"\xff\xfe\xff\xff" + bytes(65533) for _ in range(padding // 65533))
    data = encode(picture(), "JPEG")
    (tmp_path / "images" / "a.jpg").write_bytes(data[:2] + comment + data[2:])
    reader = folder_reader(tmp_path, ["a.jpg"])
    assert read_size(reader, 0, (HEIGHT, WIDTH)) == read_size(reader, 0) == (HEIGHT, WIDTH)
    with pytest.raises(ImageError, match=r"a\.jpg: the image is"):
        read_size(reader, 0, (HEIGHT, WIDTH + 1))


def test_real_images_have_the_size_that_their_annotations_say(coco128: Path) -> None:
    index = read_coco_index(*coco_paths(coco128))
    reader = ImageReader(index)
    for i in range(0, len(index), 16):
        size = (int(index.heights[i]), int(index.widths[i]))
        assert decode_image(reader.read(i), reader.name(i), size).shape == (3, *size)
        assert read_size(reader, i, size) == size


def coco_paths(coco128: Path) -> tuple[str, str]:
    return str(next(coco128.glob("**/instances*.json"))), str(next(coco128.glob("**/*.jpg")).parent)


# ---- decoding at a fraction of the size


@pytest.mark.parametrize(
    ("stored", "wanted", "margin", "expected"),
    [
        ((480, 640), (480, 640), 2.0, 1),
        ((1920, 2560), (480, 640), 2.0, 2),
        ((1920, 2560), (481, 640), 2.0, 1),  # one pixel too many
        ((1920, 2560), (480, 640), 1.0, 4),
        ((3840, 5120), (480, 640), 2.0, 4),
        ((9600, 9600), (400, 400), 2.0, 8),
        ((1922, 2560), (400, 500), 2.0, 2),  # 1922 / 4 is no whole number
        ((1921, 2560), (400, 500), 2.0, 1),
        ((200, 4000), (100, 100), 2.0, 1),  # the short side decides
    ],
)
def test_reduction(stored: tuple[int, int], wanted: tuple[int, int], margin: float, expected: int) -> None:
    assert reduction(stored, wanted, margin) == expected


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_reduced_image_is_the_whole_one_averaged(mode: str, factor: int) -> None:
    size = (160, 240)
    data = encode(picture(*size).convert(mode), "JPEG", quality=95)
    whole = pixels(decode_image(data, "a.jpg", size)).astype(float)
    reduced = pixels(decode_image(data, "a.jpg", size, factor))
    assert reduced.shape == (160 // factor, 240 // factor, 3)
    blocks = whole.reshape(160 // factor, factor, 240 // factor, factor, 3).mean(axis=(1, 3))
    assert np.abs(reduced - blocks).max() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_image_is_turned_as_the_whole_one_is(orientation: int) -> None:
    stored = picture(160, 240)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, "JPEG", quality=95, exif=exif)
    upright = (240, 160) if orientation >= 5 else (160, 240)
    for size in {upright, (160, 240)}:  # annotated with the orientation, and without it
        whole = pixels(decode_image(data, "a.jpg", size)).astype(float)
        reduced = pixels(decode_image(data, "a.jpg", size, 2))
        blocks = whole.reshape(size[0] // 2, 2, size[1] // 2, 2, 3).mean(axis=(1, 3))
        assert np.abs(reduced - blocks).max() < 4


@pytest.mark.parametrize(("mode", "file_format"), [("CMYK", "JPEG"), ("RGB", "PNG"), ("RGBA", "WEBP")])
def test_what_cannot_be_reduced_comes_whole(mode: str, file_format: str) -> None:
    data = encode(picture(160, 240).convert(mode), file_format)
    assert pixels(decode_image(data, "a.x", (160, 240), 4)).shape == (160, 240, 3)


def test_faults_are_named_in_reduced_images_too() -> None:
    data = encode(picture(160, 240), "JPEG", quality=95)
    with pytest.raises(ImageError, match=r"a\.jpg: damaged image: .*truncated"):
        decode_image(data[: len(data) // 2], "a.jpg", (160, 240), 2)
    with pytest.raises(ImageError, match=r"a\.jpg: the image is 160x240 .* say 320x480"):
        decode_image(data, "a.jpg", (320, 480), 2)
