"""YOLO: a text file of labels for each image, and a ``data.yaml`` that names the classes and the folders.

A row is ``class x y width height``, the middle and the size of a box as fractions of the image's sides, or ``class x1
y1 x2 y2 ...``, the outline of an object, of which the box around it is taken. Labels lie where the image lies, with
``labels`` for ``images`` in the path, or beside the image. Without a ``data.yaml``, ``classes.txt`` names the classes
and the folders are found by their names; or ``obj.names`` the classes, and ``train.txt`` and ``valid.txt`` the images,
as darknet has them. The category id of a class is its number, from 0.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from detr_ray.data.errors import DataError, few
from detr_ray.data.formats.assembly import Gathered, Reading, assemble, refuse_pixels
from detr_ray.data.formats.folder import Folder, is_image, stem
from detr_ray.data.formats.image_names import ImageFinder
from detr_ray.data.formats.values import (
    CLASS_FILES,
    at_line,
    categories_of,
    class_files,
    read_class_files,
    to_class_number,
    to_number,
)
from detr_ray.data.formats.yolo_file import find_data_file, read_data_file
from detr_ray.data.formats.yolo_ids import IDS_NAME, IdTable, read_ids
from detr_ray.data.index import DatasetIndex
from detr_ray.data.known_folders import SPLIT_NAMES
from detr_ray.printable import printable

NAME = "yolo"
NEEDS = "YOLO: data.yaml (or classes.txt) with folders of images and of labels"

LABEL_FOLDERS = {"images": "labels", "Images": "Labels"}
"""Name of a folder of images -> that of the folder beside it with their labels."""


@dataclass(frozen=True)
class YoloFolder:
    """A data set in YOLO's format.

    Attributes:
        folder: its folder.
        names: the classes by number.
        listed_in: the file that lists them.
        sources: split -> folders of images, or text files that list images; below the folder.
        has_keypoints: whether rows go on after the box with keypoints.
    """

    folder: Folder
    names: tuple[str, ...]
    listed_in: str
    sources: Mapping[str, Sequence[str]]
    has_keypoints: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        """Which of ``train``, ``val`` and ``all`` there are."""
        return tuple(self.sources)

    def first_image(self, split: str) -> str | None:
        """Name of an image below the folder; None if there is none."""
        return next(iter(self._images(split)[1]), None)

    def read(self, split: str, reading: Reading) -> DatasetIndex:
        """Reads a split into an index.

        Raises:
            DataError: no images, no labels, or a row that is not what it should be; names the file and the line.
        """
        root, images = self._images(split)
        what = f"{self.listed_in} ({split})"
        if not images:
            raise DataError(f"{what}: no images in {', '.join(map(self._shown, self.sources[split]))}")
        labels = self._labels(images, what)
        table = self._ids(split)
        gathered = Gathered(in_fractions=True, drop_repeated=table is None)
        names = [posixpath.relpath(name, root) if root else name for name in images]
        sizes = {} if table is None else table.sizes
        places = {image: gathered.add_image(name, sizes.get(name)) for image, name in zip(images, names, strict=True)}
        present = [image for image in images if image in labels]
        texts = self.folder.texts([labels[image] for image in present], reading.progress("read the labels of"))
        for image, text in zip(present, texts, strict=True):
            self._add_rows(gathered, places[image], labels[image], text)
        refuse_pixels(gathered, what, "x and width by the image's width, y and height by its height")
        self._count(gathered, images, labels)
        categories = categories_of(self.names)
        index = assemble(
            gathered, categories=categories, images_root=self.folder.location(root), source=what,
            follow_links=self.folder.follow_links, reading=reading,
        )  # fmt: skip
        return index if table is None else table.restore(index)

    def _ids(self, split: str) -> IdTable | None:
        table = read_ids(self.folder, split)
        if table is not None and len(table.category_ids) != len(self.names):
            raise DataError(
                f"{self._shown(IDS_NAME)} has ids of {len(table.category_ids)} classes, {self.listed_in} has "
                f"{len(self.names)}: delete {IDS_NAME}, and images, boxes and classes are numbered anew"
            )
        return table

    def _images(self, split: str) -> tuple[str, list[str]]:
        """The folder that names of images are relative to, and the images; both below the data set's folder."""
        folders, images = [], []
        for source in self.sources[split]:
            if source.endswith(".txt"):
                images += self._listed(source)
                folders.append("")
                continue
            found = self.folder.images(source)
            inner = posixpath.join(source, "images")
            has_inner = not LABEL_FOLDERS.keys() & set(source.split("/")) and bool(found)
            folders.append(inner if has_inner and all(name.startswith(f"{inner}/") for name in found) else source)
            images += found
        root = folders[0] if len(set(folders)) == 1 else posixpath.commonpath(folders) if "" not in folders else ""
        return root, sorted(set(images))

    def _listed(self, source: str) -> list[str]:
        above = posixpath.dirname(source)
        finder = ImageFinder(self.folder, (above, "", posixpath.join(above, "images")))
        lines = [line.strip() for line in self.folder.text(source).splitlines()]
        names = [line for line in lines if line]
        found = [finder.find(name) for name in names]
        missing = [name for name, place in zip(names, found, strict=True) if place is None]
        if missing:
            raise DataError(
                f"{self._shown(source)}: lists {len(missing)} of {len(names)} images that are not there "
                f"({few(missing, 3)}): take them out of the list, or put them into the folder"
            )
        return [name for name in found if name is not None]

    def _labels(self, images: Sequence[str], what: str) -> dict[str, str]:
        """Image -> its label file, for those that have one."""
        labels = {}
        for image in images:
            for name in label_names(image):
                if self.folder.has(name):
                    labels[image] = name
                    break
        if not labels:
            looked = " and ".join(self._shown(name) for name in label_names(images[0]))
            raise DataError(f"{what}: none of {len(images)} images has a label file (for the first: {looked})")
        taken: dict[str, str] = {}
        for image, label in labels.items():
            if label in taken:
                raise DataError(
                    f"{self._shown(label)}: belongs to two images, {printable(taken[label])} and {printable(image)}: "
                    "rename or remove one of them"
                )
            taken[label] = image
        return labels

    def _add_rows(self, gathered: Gathered, image: int, label: str, text: str) -> None:
        for number, line in enumerate(text.splitlines(), 1):
            values = line.split()
            if not values:
                continue
            where = at_line(self.folder.location(label), number)
            corners = self._corners(values, where)
            gathered.add_box(image, to_class_number(values[0], self.names, where, self.listed_in), corners)

    def _corners(self, values: list[str], where: str) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of a row, as fractions."""
        if len(values) == 5 or (self.has_keypoints and len(values) > 5):
            x, y, width, height = (to_number(value, where) for value in values[1:5])
            return x - width / 2, y - height / 2, x + width / 2, y + height / 2
        if len(values) >= 7 and len(values) % 2:
            numbers = [to_number(value, where) for value in values[1:]]
            if not all(map(math.isfinite, numbers)):
                return (math.nan,) * 4
            return min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])
        advice = "a row is: class x y width height, or: class and the corners of an outline, with blanks between"
        if len(values) == 6:
            advice += "; if the last value is a confidence, take it out"
        raise DataError(f"{where}: {len(values)} values: {advice}")

    def _count(self, gathered: Gathered, images: Sequence[str], labels: Mapping[str, str]) -> None:
        gathered.count("images_without_labels", len(images) - len(labels))
        used = set(labels.values())
        others = set(_listed_labels(self.folder, labels))
        gathered.count("labels_without_image", len(others - used))

    def _shown(self, name: str) -> str:
        return printable(self.folder.location(name))


def find(folder: Folder) -> YoloFolder | None:
    """The data set that lies in a folder in this format; None if it does not look like it.

    Raises:
        DataError: a ``data.yaml`` that is not what it should be.
    """
    name = find_data_file(folder)
    if name is not None:
        about = read_data_file(folder, name)
        sources = about.sources or _sources_by_name(folder)
        return YoloFolder(folder, about.names, folder.location(name), sources, about.has_keypoints)
    # First: without one, there is no need to list what may be large. That of the data set counts before those that
    # labelling tools wrote beside their labels; read is none before the folder is known to have YOLO's labels.
    listed = class_files(folder) or class_files(folder, _class_places())
    if not listed:
        return None
    lists = _lists_by_name(folder) if "obj.names" in folder.names() else {}
    sources = lists or _sources_by_name(folder)
    if not lists and not any(_has_labels(folder, source) for listed in sources.values() for source in listed):
        return None
    classes = read_class_files(folder, listed)
    assert classes is not None, "files are listed"
    return YoloFolder(folder, *classes, sources)


def _class_places() -> list[str]:
    """Folders that labelling tools write their list of classes into."""
    names, folders = [name for of_split in SPLIT_NAMES.values() for name in of_split], LABEL_FOLDERS.values()
    of_splits = [place for name in names for labels in folders for place in (f"{labels}/{name}", f"{name}/{labels}")]
    return [*folders, *of_splits, *names]


def _lists_by_name(folder: Folder) -> dict[str, list[str]]:
    """Text files that list the images of a split, as darknet has them beside its list of classes."""
    found = {split: [f"{name}.txt" for name in names] for split, names in SPLIT_NAMES.items()}
    lists = {split: [name for name in folder.names() if name.lower() in names][:1] for split, names in found.items()}
    return {split: names for split, names in lists.items() if names}


def _sources_by_name(folder: Folder) -> dict[str, list[str]]:
    """Folders of images by their names: ``images/train`` or ``train/images`` or ``train``; else ``images``."""
    sources = {}
    for split, names in SPLIT_NAMES.items():
        for name in names:
            places = (*(f"{inner}/{name}" for inner in LABEL_FOLDERS), f"{name}/images", name)
            found = next((place for place in places if folder.has(place) and not is_image(place)), None)
            if found is not None:
                sources[split] = [found]
                break
    return sources or {"all": ["images" if folder.has("images") else ""]}


def _has_labels(folder: Folder, source: str) -> bool:
    return any(folder.has(name) for image in folder.images(source)[:50] for name in label_names(image))


def label_names(image: str) -> list[str]:
    """Where the label file of an image may lie."""
    parts = stem(image).split("/")
    names = []
    place = max((place for place, part in enumerate(parts[:-1]) if part in LABEL_FOLDERS), default=None)
    if place is not None:
        names.append("/".join([*parts[:place], LABEL_FOLDERS[parts[place]], *parts[place + 1 :]]) + ".txt")
    return [*names, stem(image) + ".txt"]


def _listed_labels(folder: Folder, labels: Mapping[str, str]) -> list[str]:
    """All label files in the folders that hold those of the images."""
    folders = {
        posixpath.dirname(name) for name in labels.values() if set(LABEL_FOLDERS.values()) & set(name.split("/")[:-1])
    }
    return [
        posixpath.join(above, name)
        for above in folders
        for name in folder.names(above)
        if name.endswith(".txt") and name not in CLASS_FILES
    ]
