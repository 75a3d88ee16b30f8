"""Images of every kind that Pillow writes, whole and damaged: the check and training come to the same verdict."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from coco_folder import CocoFolder
from PIL import Image, TiffImagePlugin
from samples import read_image_size

from detr_ray.data.decoding import decode_image
from detr_ray.data.formats import open_split
from detr_ray.data.formats.shards import read_shard_index
from detr_ray.data.image_headers import MOST_PIXELS, ImageError, read_header
from detr_ray.data.inspection import inspect_images
from detr_ray.data.packing import write_shards

HEIGHT, WIDTH = 30, 44
NOISE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)
BROKEN_EXIF = [
    b"Exif\0\0garbage!",
    b"Exif\0\0",
    b"Exif\0\0II*\0\xff\xff\xff\xff",
    b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12",
]


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def deep_png(values: np.ndarray, colour_type: int) -> bytes:
    """A PNG of 16 bits a channel; ``values`` are ``[H, W]`` grey or ``[H, W, 3]``."""
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def with_late_exif(png: bytes, orientation: int) -> bytes:
    """A PNG whose EXIF stands behind its pixels, where some tools put it."""
    return png[:-12] + chunk(b"eXIf", exif(orientation).tobytes()[6:]) + png[-12:]


def tiff(values: np.ndarray, tags: dict[int, int] | None = None, **options: object) -> bytes:
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in (tags or {}).items():
        directory[tag] = value
    return encode(Image.fromarray(values), "TIFF", tiffinfo=directory, **options)


def zoo() -> dict[str, bytes]:
    picture = Image.fromarray(NOISE)
    inverse = Image.fromarray(255 - NOISE)
    made: dict[str, bytes] = {}
    modes = {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"), "JPEG": ("L", "RGB", "CMYK"), "GIF": ("1", "L", "P", "RGB"),
        "BMP": ("1", "L", "P", "RGB", "RGBA"), "PPM": ("1", "L", "RGB"), "TGA": ("L", "LA", "P", "RGB", "RGBA"),
        "TIFF": ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"),
        "WEBP": ("RGB", "RGBA"), "JPEG2000": ("L", "LA", "RGB", "RGBA", "YCbCr"), "AVIF": ("RGB", "RGBA"),
        "PCX": ("1", "L", "P", "RGB"), "SGI": ("L", "RGB", "RGBA"), "ICO": ("RGBA",), "DDS": ("RGB", "RGBA"),
        "MPO": ("RGB",), "QOI": ("RGB", "RGBA"),
    }  # fmt: skip
    for file_format, kinds in modes.items():
        for mode in kinds:
            stored = picture.convert(mode) if mode not in ("PA", "LAB") else None
            if mode == "PA":
                stored = picture.convert("RGBA").convert("PA")
            if mode == "LAB":
                stored = Image.frombytes("LAB", picture.size, NOISE.tobytes())
            made[f"{file_format}-{mode}"] = encode(stored, file_format)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        made[f"TIFF-{compression}"] = encode(picture, "TIFF", compression=compression)
    for file_format in ("JPEG", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if file_format == "WEBP" else {}
        for orientation in (0, 2, 3, 5, 6, 8, 9):
            made[f"{file_format}-turned-{orientation}"] = encode(
                picture, file_format, exif=exif(orientation), **options
            )
        if file_format != "TIFF":
            for number, content in enumerate(BROKEN_EXIF):
                made[f"{file_format}-broken-exif-{number}"] = encode(picture, file_format, exif=content, **options)
    for orientation in (3, 6):
        made[f"PNG-late-{orientation}"] = with_late_exif(encode(picture, "PNG"), orientation)
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    made["JPEG-xmp"] = encode(picture, "JPEG", xmp=xmp)
    made["PNG-transparent-palette"] = encode(picture.quantize(16), "PNG", transparency=bytes(range(0, 256, 16)))
    for file_format in ("GIF", "WEBP", "TIFF", "PNG", "MPO"):
        made[f"{file_format}-many"] = encode(picture, file_format, save_all=True, append_images=[inverse])
    made["JPEG-garbage-between-markers"] = made["JPEG-RGB"][:2] + b"\xff\xfe\0\4ab" + b"zz" + made["JPEG-RGB"][2:]
    for name, values in (("deep", DEEP), ("12-of-16", DEEP >> 4), ("8-of-16", DEEP >> 8), ("black", DEEP * 0)):
        made[f"PNG-{name}"] = deep_png(values, 0)
        made[f"PNG-colour-{name}"] = deep_png(np.stack([values, values // 2, values], axis=2), 2)
        made[f"TIFF-{name}"] = tiff(values)
        made[f"JPEG2000-{name}"] = encode(Image.fromarray(values), "JPEG2000")
    made["TIFF-says-12"] = tiff(DEEP >> 4, {281: 4095})
    made["TIFF-white-is-zero"] = tiff(DEEP, {262: 0})
    made["TIFF-float"] = tiff(DEEP.astype(np.float32) / 65535)
    made["TIFF-int32"] = tiff(DEEP.astype(np.int32))
    made["PPM-deep"] = b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + DEEP.astype(">u2").tobytes()
    made["PPM-12"] = b"P5 %d %d 4095\n" % (WIDTH, HEIGHT) + (DEEP >> 4).astype(">u2").tobytes()
    made["PFM"] = b"Pf\n%d %d\n-1.0\n" % (WIDTH, HEIGHT) + DEEP.astype("<f4").tobytes()
    lossless = bytearray(made["JPEG-RGB"])
    lossless[lossless.index(b"\xff\xc0") + 1] = 0xC3
    made["JPEG-lossless"] = bytes(lossless)
    twelve = bytearray(made["JPEG-RGB"])
    twelve[twelve.index(b"\xff\xc0") + 4] = 12
    made["JPEG-12-bits"] = bytes(twelve)
    for file_format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        made[f"{file_format}-one-pixel"] = encode(Image.new("RGB", (1, 1), (9, 99, 199)), file_format)
    return made


ZOO = zoo()
REFUSED = {
    "PNG-12-of-16", "PNG-8-of-16", "PNG-colour-12-of-16", "PNG-colour-8-of-16", "PNG-colour-black", "TIFF-12-of-16",
    "TIFF-8-of-16", "JPEG2000-12-of-16", "JPEG2000-8-of-16", "TIFF-float", "TIFF-int32", "PFM", "JPEG-lossless",
    "JPEG-12-bits",
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_warned_of(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    said = capsys.readouterr()
    assert said.out == said.err == ""


@pytest.mark.parametrize("name", ZOO)
def test_headers_and_decoding_agree_on_whole_images(name):
    data = ZOO[name]
    if name in REFUSED:
        with pytest.raises(ImageError, match=r"^some/x: ") as caught:
            decode_image(data, "some/x")
        try:
            header = read_header(data, "some/x")
        except ImageError as error:
            assert str(error) == str(caught.value)
        else:
            assert not header.is_certain
        return
    pixels = decode_image(data, "some/x")
    size = tuple(pixels.shape[1:])
    header = read_header(data, "some/x")
    assert sorted(header.stored) == sorted(size)
    if header.is_certain:
        assert read_image_size(data, "some/x") == header.upright == size
    for annotated in {header.stored, header.stored[::-1], size}:
        try:
            expected = tuple(decode_image(data, "some/x", annotated).shape[1:])
        except ImageError as error:
            assert "annotations say" in str(error)
            with pytest.raises(ImageError, match="annotations say"):
                read_image_size(data, "some/x", annotated)
            continue
        assert expected == annotated
        if header.is_certain:
            assert read_image_size(data, "some/x", annotated) == annotated


def places_to_cut(data: bytes) -> list[int]:
    count = len(data)
    return sorted({0, 1, 2, 8, 20, 40, 100, *(count * k // 8 for k in range(1, 8)), count - 9, count - 2, count - 1})


@pytest.mark.parametrize("name", [name for name in ZOO if "-turned" not in name and "one-pixel" not in name])
def test_check_and_training_agree_on_images_cut_off_anywhere(tmp_path, name):
    data, folder = ZOO[name], CocoFolder(tmp_path / "set")
    folder.add("train", "whole.x", data, size=(HEIGHT, WIDTH))
    for place in places_to_cut(data):
        if place < len(data):
            folder.add("train", f"cut-{place}.x", data[:place], size=(HEIGHT, WIDTH))
    index = open_split(str(folder.write()), None, "train")
    by_header = {bad.file: bad.reason for bad in inspect_images(index).bad}
    assert by_header == {bad.file: bad.reason for bad in inspect_images(index, decode=True).bad}
    assert len(by_header) >= len(index) // 2


def test_check_and_training_agree_on_images_cut_off_in_shards(tmp_path):
    folder = CocoFolder(tmp_path / "set")
    for name in ("PNG-RGB", "JPEG-RGB", "GIF-RGB", "WEBP-RGB", "BMP-RGB", "TIFF-RGB"):
        folder.add("train", f"{name}.x", ZOO[name], size=(HEIGHT, WIDTH))
        for share in (0.3, 0.7, 0.99):
            folder.add("train", f"{name}-{share}.x", ZOO[name][: int(share * len(ZOO[name]))], size=(HEIGHT, WIDTH))
    write_shards(open_split(str(folder.write()), None, "train"), tmp_path / "shards")
    index = read_shard_index(str(tmp_path / "shards"))
    by_header = [bad.file for bad in inspect_images(index).bad]
    assert by_header == [bad.file for bad in inspect_images(index, decode=True).bad]
    assert len(by_header) == 18


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_are_turned_like_all_others(orientation):
    data = encode(Image.fromarray(NOISE), "TIFF", exif=exif(orientation))
    expected = encode(Image.fromarray(NOISE), "PNG", exif=exif(orientation))
    upright = decode_image(expected, "a.png")
    np.testing.assert_array_equal(decode_image(data, "a.tif").numpy(), upright.numpy())
    stored = decode_image(data, "a.tif", (HEIGHT, WIDTH)).permute(1, 2, 0).numpy()
    if orientation >= 5:
        np.testing.assert_array_equal(stored, NOISE)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("number", range(len(BROKEN_EXIF)))
def test_broken_exif_costs_nothing_but_the_turn(file_format, number):
    sound = decode_image(ZOO[f"{file_format}-turned-0"], "a.x")
    header = read_header(data := ZOO[f"{file_format}-broken-exif-{number}"], "a.x")
    assert header.orientation == 1
    np.testing.assert_array_equal(decode_image(data, "a.x").numpy(), sound.numpy())


def test_exif_behind_the_pixels_of_a_png_counts():
    decoded = decode_image(ZOO["PNG-late-6"], "a.png")
    np.testing.assert_array_equal(decoded.numpy(), decode_image(ZOO["PNG-turned-6"], "a.png").numpy())


def test_images_that_say_that_they_use_12_bits_are_scaled_by_them():
    pixels = decode_image(ZOO["TIFF-says-12"], "a.tif").numpy()
    np.testing.assert_array_equal(pixels[0], DEEP >> 8)


def test_packed_12_bit_tiffs_are_scaled_by_12_bits():
    values = np.arange(8 * 6, dtype=np.uint16).reshape(6, 8) * 85
    pairs = values.reshape(-1, 2)
    packed = np.stack(
        [pairs[:, 0] >> 4, ((pairs[:, 0] & 15) << 4) | (pairs[:, 1] >> 8), pairs[:, 1] & 255], axis=1
    ).astype(np.uint8)
    entries = {256: 8, 257: 6, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 6, 279: packed.size}
    start = 8 + packed.size
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in entries.items())
    data = b"II*\0" + struct.pack("<I", start) + packed.tobytes() + directory + struct.pack("<I", 0)
    np.testing.assert_array_equal(decode_image(data, "a.tif").numpy()[0], values >> 4)


def test_white_is_zero_at_16_bits_as_at_8():
    np.testing.assert_array_equal(decode_image(ZOO["TIFF-white-is-zero"], "a.tif").numpy()[0], 255 - (DEEP >> 8))


@pytest.mark.parametrize("name", ["PNG-12-of-16", "PNG-colour-12-of-16", "TIFF-8-of-16"])
def test_pixels_that_would_be_nearly_black_are_refused_with_what_to_do(name):
    with pytest.raises(ImageError, match=r"of 65535.*nearly black: 12 bits or fewer in 16\? Scale them to 16 bits"):
        decode_image(ZOO[name], "a.x")


def too_large(file_format: str, height: int, width: int) -> bytes:
    """An image that claims a size in its header."""
    data = bytearray(encode(Image.new("RGB", (8, 8)), file_format))
    if file_format == "JPEG":
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", height, width)
        return bytes(data)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return bytes(data[:8]) + chunk(b"IHDR", header) + bytes(data[33:])


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [None, (20_000, 20_000)])
def test_one_limit_for_all_formats(file_format, size):
    data = too_large(file_format, 20_000, 20_000)
    for look in (decode_image, read_image_size):
        with pytest.raises(ImageError, match=r"a\.x: too large: .*more than the 178,956,970 pixels that are read"):
            look(data, "a.x", size)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_below_the_limit_nothing_is_said_of_size(file_format):
    assert MOST_PIXELS > 12_000**2
    assert read_image_size(too_large(file_format, 12_000, 12_000), "a.x") == (12_000, 12_000)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_the_annotated_size_is_compared_before_anything_is_decoded(file_format):
    with pytest.raises(ImageError, match=r"12000x12000 .*annotations say 8x8"):
        decode_image(too_large(file_format, 12_000, 12_000), "a.x", (8, 8))


def test_kept_back_warnings_come_again_outside():
    decode_image(ZOO["PNG-deep"], "a.png")
    with pytest.raises(UserWarning), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.warn_explicit("of others", UserWarning, "x.py", 1, module="PIL.Image")
