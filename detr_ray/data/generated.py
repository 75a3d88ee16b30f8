"""Generated data: drawn shapes on cluttered backgrounds, in the layout and format of COCO.

For the quickstart and for tests: an object detection task that needs no download, that a person can solve at a glance
and that a small model learns from random weights in minutes. Image ``n`` of a split is a pure function of (seed,
split, n) and of the drawing parameters: more images are the same images and further ones, and no validation image is
a training image. Pixels come from integer arithmetic, so that the same library versions give the same bytes anywhere.

Knows nothing of training: what it writes is read like any other COCO data set.
"""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from detr_ray.callbacks import Progress
from detr_ray.data.errors import DataError

CLASSES = ("rectangle", "ellipse", "triangle", "star", "cross", "ring")
"""Names of the drawn classes; the category id of each is its place here, counted from 1."""

MARKER = "generated.json"
"""File in the data set's folder that says what it was made of."""

# Increased when the same parameters give other pixels, so that folders of earlier versions are not reused.
_DRAWING = 1
_SPLITS = {"train": (0, 0), "val": (1, 1_000_000)}
# Masks are drawn so many times larger than they appear: smooth edges, and boxes exact to a quarter of a pixel.
_SUPERSAMPLING = 4
_MIN_VISIBLE = 0.6
_PLACEMENTS = 12


@dataclass(frozen=True, slots=True)
class DrawingParameters:
    """Everything that the bytes of a generated data set depend on.

    Attributes:
        num_train: training images, from 1 to 1,000,000.
        num_val: validation images, the same.
        seed: not negative; other seeds give other images.
        image_size: smallest and largest side in pixels, at least 32; both sides are drawn on their own, so the aspect
            ratio varies.
        max_objects: most objects in an image.
        min_object_size: length in pixels of the smallest objects' longer side, from 4 to half the smallest image
            side.
        empty_fraction: share of images without objects, 0 <= share < 1.
        clutter: 0 for smooth noiseless backgrounds, 1 for the most lines, patches and noise.
    """

    num_train: int
    num_val: int
    seed: int
    image_size: tuple[int, int]
    max_objects: int
    min_object_size: int
    empty_fraction: float
    clutter: float

    def to_dict(self) -> dict[str, object]:
        """As the marker file has them."""
        return {**asdict(self), "image_size": list(self.image_size), "drawing": _DRAWING}


def generate_dataset(root: Path, parameters: DrawingParameters, progress: Progress | None = None) -> None:
    """Writes a data set of drawn shapes into ``root``, or finds it there.

    The folder gets ``annotations/instances_{train,val}2017.json``, ``train2017/`` and ``val2017/`` (JPEG), and
    ``generated.json`` with the parameters. It appears whole or not at all: everything is written beside it first.
    Boxes are tight around the whole shape, also where another shape covers part of it; at least 60 % of every
    annotated shape is visible.

    Args:
        root: folder to make. Its parents are made too.
        parameters: what to draw.
        progress: called with (images done, images in all) from time to time.

    Raises:
        DataError: ``root`` holds something else, or data made with other parameters (the message says which differ).
    """
    root = Path(root).expanduser().resolve()
    if _is_complete(root, parameters):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = root.parent / f".{root.name}.partial-{uuid.uuid4().hex[:12]}"
    try:
        done, total = 0, parameters.num_train + parameters.num_val
        for split, count in (("train", parameters.num_train), ("val", parameters.num_val)):
            for _ in _write_split(partial, split, count, parameters):
                done += 1
                if progress is not None and (done % 200 == 0 or done == total):
                    progress(done, total)
        (partial / MARKER).write_text(json.dumps(parameters.to_dict(), indent=2) + "\n")
        try:
            partial.rename(root)
        except OSError:
            # Another process may have finished the same folder in the meantime.
            if not _is_complete(root, parameters):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_complete(root: Path, parameters: DrawingParameters) -> bool:
    """Whether ``root`` holds this data set; False where there is nothing yet.

    Raises:
        DataError: something else is there.
    """
    marker = root / MARKER
    if not marker.is_file():
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise DataError(
                f"{root} exists and holds no {MARKER}: it is not a generated data set and is left as it is. "
                "Give another folder."
            )
        return False
    try:
        found = json.loads(marker.read_text())
    except ValueError as error:
        raise DataError(f"{marker} cannot be read ({error}). Delete the folder to generate it again.") from error
    wanted = parameters.to_dict()
    if found == wanted:
        return True
    names = sorted(wanted.keys() | found.keys()) if isinstance(found, dict) else []
    differences = [
        f"{name} is {found.get(name)}, wanted {wanted.get(name)}"
        for name in names
        if found.get(name) != wanted.get(name)
    ]
    raise DataError(
        f"{root} holds data generated with other parameters: {'; '.join(differences) or 'its marker is no mapping'}. "
        "Delete the folder, give another one, or set the parameters back."
    )


def _write_split(root: Path, split: str, count: int, parameters: DrawingParameters) -> Iterator[None]:
    """Draws a split's images into ``root``, yielding after each one, and then writes its annotation file."""
    folder = root / f"{split}2017"
    folder.mkdir(parents=True)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    first_id = _SPLITS[split][1] + 1
    for number in range(count):
        image_id = first_id + number
        image, objects = _draw_image(split, number, parameters)
        name = f"{image_id:012d}.jpg"
        image.save(folder / name, quality=92, subsampling=0)
        images.append({"id": image_id, "file_name": name, "height": image.height, "width": image.width})
        for shape in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0, **shape})
        yield
    content = {
        "info": {"description": f"detr_ray generated shapes, {split}", "parameters": parameters.to_dict()},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES)],
    }
    path = root / "annotations" / f"instances_{split}2017.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def _draw_image(split: str, number: int, parameters: DrawingParameters) -> tuple[Image.Image, list[dict[str, object]]]:
    """One image and its annotations (``category_id``, ``bbox`` as xywh in pixels, ``area`` in pixels)."""
    rng = np.random.Generator(np.random.PCG64([parameters.seed, _SPLITS[split][0], number]))
    smallest, largest = parameters.image_size
    height, width = (int(side) for side in rng.integers(smallest, largest + 1, size=2))
    canvas = _draw_background(rng, height, width, parameters.clutter)

    wanted = 0 if rng.random() < parameters.empty_fraction else int(rng.integers(1, parameters.max_objects + 1))
    objects: list[dict[str, object]] = []
    owner = np.full((height, width), -1, np.int16)
    visible = np.zeros(0, np.int64)
    mask_pixels = np.zeros(0, np.int64)
    for _ in range(wanted):
        category = int(rng.integers(len(CLASSES)))
        for _ in range(_PLACEMENTS):
            coverage, box_xywh = _draw_shape(rng, CLASSES[category], height, width, parameters.min_object_size)
            mask_height, mask_width = coverage.shape
            top = int(rng.integers(0, height - mask_height + 1))
            left = int(rng.integers(0, width - mask_width + 1))
            window = (slice(top, top + mask_height), slice(left, left + mask_width))
            solid = coverage >= 128
            still_visible = visible - np.bincount(owner[window][solid] + 1, minlength=len(visible) + 1)[1:]
            if (still_visible >= _MIN_VISIBLE * mask_pixels).all():
                break
        else:
            continue
        owner[window][solid] = len(visible)
        visible = np.append(still_visible, solid.sum())
        mask_pixels = np.append(mask_pixels, solid.sum())
        _paint(rng, canvas[window], coverage)
        x, y, box_width, box_height = box_xywh
        objects.append(
            {
                "category_id": category + 1,
                "bbox": [left + x, top + y, box_width, box_height],
                "area": round(float(coverage.sum(dtype=np.int64)) / 255, 2),
            }
        )
    grain = 2 + round(14 * parameters.clutter * rng.random())
    canvas += rng.integers(-grain, grain + 1, size=canvas.shape, dtype=np.int16)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)), objects


def _draw_background(rng: np.random.Generator, height: int, width: int, clutter: float) -> np.ndarray:
    """A smooth gradient with patches, lines and dots: ``[height, width, 3]`` int16 in 0..255."""

    def smooth_field(rows: int, columns: int, resampling: Image.Resampling) -> np.ndarray:
        grid = rng.integers(0, 256, size=(rows, columns, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(grid).resize((width, height), resampling)).astype(np.int16)

    gradient = 128 + (smooth_field(2, 2, Image.Resampling.BILINEAR) - 128) * 3 // 5  # shapes keep the strongest colours
    patch_rows, patch_columns = (int(n) for n in rng.integers(4, 12, size=2))
    resampling = Image.Resampling.NEAREST if rng.random() < 0.3 else Image.Resampling.BICUBIC
    strength = round(80 * clutter * rng.random())
    patches = (smooth_field(patch_rows, patch_columns, resampling) - 128) * strength // 255
    image = Image.fromarray(np.clip(gradient + patches, 0, 255).astype(np.uint8))

    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(0, 1 + round(10 * clutter)))):
        points = rng.integers(0, (width, height), size=(int(rng.integers(2, 5)), 2))
        colour = tuple(int(c) for c in rng.integers(0, 256, size=3))
        draw.line([(int(x), int(y)) for x, y in points], fill=colour, width=int(rng.integers(1, 3)))
    for x, y in rng.integers(0, (width, height), size=(int(rng.integers(0, 1 + round(30 * clutter))), 2)):
        colour = tuple(int(c) for c in rng.integers(0, 256, size=3))
        draw.rectangle((int(x), int(y), int(x) + 1, int(y) + 1), fill=colour)
    return np.asarray(image).astype(np.int16)


def _draw_shape(
    rng: np.random.Generator, name: str, height: int, width: int, min_size: int
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """The mask of a shape of random size, aspect ratio and rotation.

    Returns:
        Coverage of each pixel as uint8, in the smallest array of whole pixels that holds the shape; and the tight box
        (x, y, width, height) in pixels of that array.
    """
    largest = max(min_size, 0.65 * min(height, width))
    long_side = min_size * math.exp(float(rng.random()) * math.log(largest / min_size))
    ratio = 1 - 0.4 * float(rng.random())
    sides = (long_side, long_side * ratio) if rng.random() < 0.5 else (long_side * ratio, long_side)
    angle = math.radians(float(rng.random()) * 60 - 30)

    loops = [
        [
            (
                _SUPERSAMPLING * (x * sides[0] * math.cos(angle) - y * sides[1] * math.sin(angle)) / 2,
                _SUPERSAMPLING * (x * sides[0] * math.sin(angle) + y * sides[1] * math.cos(angle)) / 2,
            )
            for x, y in loop
        ]
        for loop in _outline(name)
    ]
    x_min, y_min = min(x for x, _ in loops[0]), min(y for _, y in loops[0])
    columns = math.ceil((max(x for x, _ in loops[0]) - x_min + 1) / _SUPERSAMPLING)
    rows = math.ceil((max(y for _, y in loops[0]) - y_min + 1) / _SUPERSAMPLING)
    mask = Image.new("L", (columns * _SUPERSAMPLING, rows * _SUPERSAMPLING), 0)
    draw = ImageDraw.Draw(mask)
    for loop, fill in zip(loops, (255, 0), strict=False):
        draw.polygon([(round(x - x_min), round(y - y_min)) for x, y in loop], fill=fill)
    left, top, right, bottom = mask.getbbox() or (0, 0, 1, 1)
    box = (left, top, right - left, bottom - top)
    x, y, box_width, box_height = (value / _SUPERSAMPLING for value in box)
    return np.asarray(mask.reduce(_SUPERSAMPLING)), (x, y, box_width, box_height)


def _circle(points: int, radius: float) -> list[tuple[float, float]]:
    turns = (2 * math.pi * i / points for i in range(points))
    return [(radius * math.sin(turn), -radius * math.cos(turn)) for turn in turns]


def _outline(name: str) -> Sequence[list[tuple[float, float]]]:
    """The shape's outline within -1..1, and the outline of its hole where it has one."""
    if name == "rectangle":
        return [[(-1, -1), (1, -1), (1, 1), (-1, 1)]]
    if name == "ellipse":
        return [_circle(48, 1)]
    if name == "triangle":
        return [[(0, -1), (1, 1), (-1, 1)]]
    if name == "star":
        outer, inner = _circle(5, 1), _circle(10, 0.42)[1::2]
        return [[point for pair in zip(outer, inner, strict=True) for point in pair]]
    if name == "cross":
        t = 0.32
        corner = [(t, -1), (t, -t), (1, -t), (1, t), (t, t), (t, 1)]
        return [corner + [(-x, -y) for x, y in corner]]
    if name == "ring":
        return [_circle(48, 1), _circle(48, 0.55)]
    raise AssertionError(name)


def _paint(rng: np.random.Generator, window: np.ndarray, coverage: np.ndarray) -> None:
    """Fills the covered part of ``window`` (int16, changed in place) with a shaded colour that stands out from it."""
    under = window[coverage >= 128]
    contrast = int(rng.integers(50, 150))
    candidates = rng.integers(0, 256, size=(8, 3)).astype(np.int16)
    stands_out = (np.abs(under[None] - candidates[:, None]).max(axis=2) >= contrast).mean(axis=1)
    good = stands_out >= 0.9
    colour = candidates[int(good.argmax()) if good.any() else int(stands_out.argmax())]
    slope = int(rng.integers(-20, 21))
    rows = coverage.shape[0]
    shade = (2 * np.arange(rows, dtype=np.int32) - rows) * slope // rows
    fill = np.clip(colour[None, None] + shade[:, None, None], 0, 255).astype(np.int32)
    weight = coverage[:, :, None].astype(np.int32)
    window[...] = (window * (255 - weight) + fill * weight + 127) // 255
