"""One small data set, written in every format that is read, with what real exports do: CRLF, byte order marks, paths of
other machines, outlines for boxes, sizes that are missing.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import yaml
from coco_folder import encoded

from detr_ray.data.images import ImageReader
from detr_ray.data.index import DatasetIndex

NAMES = ("'quoted', with comma", "Straße & <Weg>", "no", "点 1")
"""Class names that YAML, CSV and XML each have trouble with, in alphabetical order."""

SIZES = ((48, 64), (64, 40), (56, 72), (60, 60))
"""(height, width); boxes at whole pixels have fractions of few digits in some, and of many in others."""

Box = tuple[int, int, int, int, int]
"""Class, left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class Picture:
    name: str
    size: tuple[int, int]
    content: bytes
    boxes: tuple[Box, ...]


def pictures(split: str, count: int) -> list[Picture]:
    found = []
    for number in range(count):
        seed = number + (500 if split == "val" else 0)
        height, width = SIZES[number % len(SIZES)]
        boxes: list[Box] = [(number % 4, 3 + number % 5, 5, width // 2 + number % 7, height // 2 + 1)]
        if number % 3 == 0:
            boxes.append(((number + 1) % 4, width // 2, 2, width - 1, height - 3))
        if number in (2, 7):
            boxes = []
        if number == 5:
            boxes.append((1, -4, 10, 20, height + 6))  # over the border
        suffix = "png" if number % 2 else "jpg"
        content = encoded(suffix.replace("jpg", "jpeg").upper(), size=(height, width), seed=seed)
        found.append(Picture(f"{split} ü{number:02d}.{suffix}", (height, width), content, tuple(boxes)))
    return found


def data_set() -> dict[str, list[Picture]]:
    return {"train": pictures("train", 12), "val": pictures("val", 5)}


def put(root: Path, files: dict[str, str | bytes]) -> Path:
    """Writes files below a folder, by their paths."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def put_images(folder: Path, images: Sequence[Picture]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        (folder / image.name).write_bytes(image.content)


def write_coco(root: Path) -> Path:
    (root / "annotations").mkdir(parents=True)
    for split, images in data_set().items():
        put_images(root / f"{split}2017", images)
        rows = [(number, *box) for number, image in enumerate(images, 1) for box in image.boxes]
        content = {
            "images": [
                {"id": number, "file_name": image.name, "height": image.size[0], "width": image.size[1]}
                for number, image in enumerate(images, 1)
            ],
            "annotations": [
                {"id": i, "image_id": image, "category_id": k, "bbox": [x, y, right - x, bottom - y],
                 "area": (right - x) * (bottom - y), "iscrowd": 0}
                for i, (image, k, x, y, right, bottom) in enumerate(rows, 1)
            ],
            "categories": [{"id": number, "name": name} for number, name in enumerate(NAMES)],
        }  # fmt: skip
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def yolo_rows(image: Picture, outlines: bool = False) -> str:
    height, width = image.size
    rows = []
    for k, x, y, right, bottom in image.boxes:
        if outlines:
            corners = [(x, y), (right, (y + bottom) / 2), ((x + right) / 2, bottom), (x, bottom)]
            rows.append([k, *(value for px, py in corners for value in (px / width, py / height))])
        else:
            rows.append(
                [k, (x + right) / 2 / width, (y + bottom) / 2 / height, (right - x) / width, (bottom - y) / height]
            )
    return "\r\n".join(" ".join(map(str, row)) for row in rows)


def write_yolo(root: Path, layout: str = "images/{split}", outlines: bool = False, about: dict | None = None) -> Path:
    """With images in ``layout``, whose ``images`` is ``labels`` for the labels."""
    for split, images in data_set().items():
        place = layout.format(split=split)
        put_images(root / place, images)
        labels = root / place.replace("images", "labels")
        labels.mkdir(parents=True, exist_ok=True)
        for image in images:
            text = yolo_rows(image, outlines)
            if text or image.name.endswith("jpg"):  # an empty file and a missing one both mean: nothing on it
                (labels / image.name).with_suffix(".txt").write_bytes(b"\xef\xbb\xbf" * bool(text) + text.encode())
    if about is None:
        about = {split: layout.format(split=split) for split in ("train", "val")} | {"names": list(NAMES)}
    (root / "data.yaml").write_text(yaml.safe_dump(about, allow_unicode=True), encoding="utf-8")
    return root


def voc_xml(image: Picture, sized: bool = True, extra: str = "") -> str:
    height, width = image.size if sized else (0, 0)
    objects = "".join(
        f"<object><name>{escape(NAMES[k])}</name><pose>Unspecified</pose><difficult>0</difficult><bndbox>"
        f"<ymin>{y}</ymin><xmin>{x}</xmin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox>\r\n"
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        "</object>"
        for k, x, y, right, bottom in image.boxes
    )
    return (
        f"<annotation><folder>x</folder><filename>{escape(image.name)}</filename>\n<size><width>{width}</width>"
        f"<height>{height}</height><depth>3</depth></size>{objects}{extra}</annotation>"
    )


def write_voc(root: Path, lists: bool = True) -> Path:
    """With lists in ``ImageSets/Main``, or with XML files beside the images in a folder for each split."""
    for split, images in data_set().items():
        folder = root / "JPEGImages" if lists else root / {"train": "train", "val": "valid"}[split]
        annotations = root / "Annotations" if lists else folder
        annotations.mkdir(parents=True, exist_ok=True)
        put_images(folder, images)
        for number, image in enumerate(images):
            (annotations / image.name).with_suffix(".xml").write_text(voc_xml(image, number != 3), encoding="utf-8")
        if lists:
            (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
            listed = "\r\n".join(Path(image.name).stem for image in images[::-1])
            (root / f"ImageSets/Main/{split}.txt").write_text(listed, encoding="utf-8")
    return root


def write_csv(root: Path, header: Sequence[str] | None = None, delimiter: str = ",", prefix: str = "") -> Path:
    for split, images in data_set().items():
        put_images(root / split, images)
        file = io.StringIO()
        writer = csv.writer(file, delimiter=delimiter)
        if header is not None:
            writer.writerow(header)
        for image in images[::-1]:
            rows = [(x, y, right, bottom, NAMES[k]) for k, x, y, right, bottom in image.boxes] or [("",) * 5]
            for x, y, right, bottom, name in rows:
                values = {"path": prefix + image.name, "x1": x, "y1": y, "x2": right, "y2": bottom, "class": name}
                values |= {"filename": values["path"], "xmin": x, "ymin": y, "xmax": right, "ymax": bottom}
                values |= {"height": image.size[0], "width": image.size[1]}
                writer.writerow([values[key] for key in header or ("path", "x1", "y1", "x2", "y2", "class")])
        (root / f"{split}.csv").write_bytes(b"\xef\xbb\xbf" + file.getvalue().encode())
    return root


OPEN_IMAGES_HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)


def write_open_images(root: Path, exported: bool = False) -> Path:
    """As Open Images is downloaded, or in a folder for each split as it is exported."""
    for split, images in data_set().items():
        name = {"train": "train", "val": "validation"}[split]
        put_images(root / name / ("data" if exported else ""), images)
        file = io.StringIO()
        writer = csv.writer(file)
        writer.writerow(OPEN_IMAGES_HEADER.split(","))
        for image in images[::-1]:
            height, width = image.size
            rows = [
                (Path(image.name).stem, "xclick", f"/m/0{k}", 1, x / width, right / width, y / height, bottom / height,
                 0, -1, 0, 0, 0)
                for k, x, y, right, bottom in image.boxes
            ] or [(Path(image.name).stem, *("",) * 12)]  # fmt: skip
            writer.writerows(rows)
        table = root / (f"{name}/labels/detections.csv" if exported else f"oidv6-{name}-annotations-bbox.csv")
        table.parent.mkdir(exist_ok=True)
        table.write_bytes(b"\xef\xbb\xbf" + file.getvalue().encode())
    classes = io.StringIO()
    csv.writer(classes).writerows([(f"/m/0{k}", name) for k, name in enumerate(NAMES)])
    described = root / ("train/metadata/classes.csv" if exported else "class-descriptions-boxable.csv")
    described.parent.mkdir(exist_ok=True)
    described.write_text(classes.getvalue(), encoding="utf-8")
    return root


ROBOFLOW_ROOT = {
    "train": "../train/images",
    "val": "../valid/images",
    "nc": 4,
    "names": list(NAMES),
    "roboflow": {"v": 1},
}

FORMATS: dict[str, Callable[[Path], Path]] = {
    "yolo": write_yolo,
    "yolo, split folders and names with numbers": lambda root: write_yolo(
        root, "{split}/images", about={
            "path": "/content/my set", "train": "train/images", "val": ["val/images"], "names": dict(enumerate(NAMES)),
        },
    ),
    "yolo, as ultralytics": lambda root: write_yolo(
        root, about={"path": f"../datasets/{root.name}", "train": "images/train", "val": "images/val", "test": None,
                     "names": dict(enumerate(NAMES)), "download": "https://nowhere"},
    ),
    "yolo, as roboflow": lambda root: write_yolo(
        root, "{split}/images", about={
            "train": "../train/images", "val": "../val/images", "test": "../test/images", "nc": 4, "names": list(NAMES),
            "roboflow": {"version": 1},
        },
    ),
    "yolo, outlines": lambda root: write_yolo(root, outlines=True),
    "voc": write_voc,
    "voc, split folders": lambda root: write_voc(root, lists=False),
    "csv": write_csv,
    "csv, header": lambda root: write_csv(
        root, ("class", "width", "height", "filename", "xmin", "xmax", "ymin", "ymax"), ";"
    ),
    "open images": write_open_images,
    "open images, exported": lambda root: write_open_images(root, exported=True),
    "csv, paths of another machine": lambda root: write_csv(root, prefix="C:\\data\\set\\"),
}  # fmt: skip


def assert_same(found: DatasetIndex, expected: DatasetIndex) -> None:
    """The same annotations, names and images."""
    assert found.categories == expected.categories
    assert found.file_names.to_pylist() == expected.file_names.to_pylist()
    assert np.array_equal(found.boxes_xywh_px, expected.boxes_xywh_px)
    assert found.fingerprint == expected.fingerprint
    images, theirs = ImageReader(found), ImageReader(expected)
    assert [images.read(i) for i in range(len(found))] == [theirs.read(i) for i in range(len(found))]
