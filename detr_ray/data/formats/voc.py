"""Pascal VOC: an XML file for each image, and lists of images in ``ImageSets/Main`` or folders for the splits.

Boxes are taken as written: left, top, right, bottom in pixels. (Files of the original data sets, whose database is
named ``The VOC...``, count pixels from 1: 1 is taken from left and top.) ``difficult`` objects are treated as crowds:
they are not learnt, and in evaluation a detection of one is neither right nor wrong, as in VOC's own. Categories are
the lines of ``classes.txt``; without it, all names of all files in alphabetical order, numbered from 0.
"""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from detr_ray.data.errors import DataError, few, shown
from detr_ray.data.formats.assembly import Gathered, Reading, assemble
from detr_ray.data.formats.folder import SPLIT_NAMES, Folder, stem
from detr_ray.data.formats.values import at_line, read_class_file
from detr_ray.data.formats.voc_file import VocImage, read_annotation
from detr_ray.data.index import DatasetIndex
from detr_ray.printable import printable

NAME = "voc"
NEEDS = "Pascal VOC: an XML file for each image, with ImageSets/Main or folders train and val"

_LISTS = "ImageSets/Main"
_ANNOTATION_FOLDERS = ("Annotations", "annotations", "xmls", "xml", "labels")
_IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "imgs")


@dataclass(frozen=True)
class VocFolder:
    """A data set in Pascal VOC's format.

    Attributes:
        folder: its folder.
        files: split -> its XML files, below the folder.
        missing: split -> images that are listed and have no XML file.
    """

    folder: Folder
    files: Mapping[str, Sequence[str]]
    missing: Mapping[str, int] = field(default_factory=dict)
    _parsed: dict[str, VocImage] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def splits(self) -> tuple[str, ...]:
        """Which of ``train``, ``val`` and ``all`` there are."""
        return tuple(self.files)

    def first_image(self, split: str) -> str | None:
        """Name of an image below the folder; None if there is none."""
        images = _Images(self.folder, self.files[split])
        return next(filter(None, (images.beside(name) for name in self.files[split])), None)

    def read(self, split: str, reading: Reading) -> DatasetIndex:
        """Reads a split into an index.

        Raises:
            DataError: no XML files, or one that is not what it should be; names the file and the line.
        """
        listed = read_class_file(self.folder)
        names = self._class_names(reading) if listed is None else listed[0]
        source = printable(self.folder.root) + ("" if split == "all" else f" ({split})")
        if not names:
            raise DataError(f"{source}: no object in any of {sum(map(len, self.files.values()))} XML files")
        ids = {name: number for number, name in reversed(list(enumerate(names)))}
        images = _Images(self.folder, self.files[split])
        gathered = Gathered()
        owners: dict[str, str] = {}
        for content in self._parse(self.files[split], reading):
            image = images.of(content.file, content.stated_name)
            name = posixpath.relpath(image, images.root) if images.root else image
            if name in owners:
                raise DataError(
                    f"{self._shown(content.file)}: is of the image {printable(name)}, as {self._shown(owners[name])} "
                    "is: remove one of them"
                )
            owners[name] = content.file
            place = gathered.add_image(name, content.size)
            for entry in content.objects:
                if entry.name not in ids:
                    where = at_line(self.folder.location(content.file), entry.line)
                    raise DataError(f"{where}: class {shown(entry.name)} is not in classes.txt: add it there")
                gathered.add_box(place, ids[entry.name], entry.corners, entry.is_difficult)
                gathered.count("boxes_difficult", entry.is_difficult)
        gathered.count("images_not_annotated", self.missing.get(split, 0) + images.count_others(owners))
        return assemble(
            gathered, categories=tuple(enumerate(names)), images_root=self.folder.location(images.root), source=source,
            follow_links=self.folder.follow_links, reading=reading,
        )  # fmt: skip

    def _class_names(self, reading: Reading) -> list[str]:
        parsed = (image for files in self.files.values() for image in self._parse(files, reading))
        return sorted({entry.name for image in parsed for entry in image.objects})

    def _parse(self, files: Sequence[str], reading: Reading) -> Iterator[VocImage]:
        new = [file for file in files if file not in self._parsed]
        contents = self.folder.contents(new, reading.progress("read the labels of"))
        for file in files:
            if file not in self._parsed:
                self._parsed[file] = read_annotation(file, self.folder.location(file), next(contents))
            yield self._parsed[file]

    def _shown(self, name: str) -> str:
        return printable(self.folder.location(name))


class _Images:
    """The images that XML files are of."""

    def __init__(self, folder: Folder, files: Sequence[str]) -> None:
        above = {posixpath.dirname(file) for file in files}
        self.root = self._root(folder, above)
        self._names = frozenset(folder.images(self.root))
        self._by_stem: dict[str, list[str]] = {}
        for name in sorted(self._names):
            self._by_stem.setdefault(stem(posixpath.relpath(name, self.root or ".")), []).append(name)
        self._above = next(iter(above)) if len(above) == 1 else ""

    @staticmethod
    def _root(folder: Folder, above: set[str]) -> str:
        """The folder of images: one with a usual name beside that of the XML files, or the same."""
        if len(above) != 1:
            return ""
        (place,) = above
        beside = posixpath.dirname(place)
        candidates = [posixpath.join(base, name) for base in (place, beside) for name in _IMAGE_FOLDERS]
        return next((name for name in candidates if folder.has(name)), place if folder.images(place) else beside)

    def beside(self, file: str) -> str | None:
        """The image with the name of an XML file."""
        found = self._by_stem.get(stem(posixpath.relpath(file, self._above or ".")), [])
        if len(found) > 1:
            raise DataError(f"{printable(file)}: may be of {few(found)}: rename or remove one of them")
        return found[0] if found else None

    def of(self, file: str, stated: str) -> str:
        """The image of an XML file: that with its name, else that which it states, else one that is missing."""
        found = self.beside(file)
        if found is not None:
            return found
        last = stated.replace("\\", "/").rpartition("/")[2]
        place = posixpath.join(self.root, last or f"{posixpath.basename(stem(file))}.jpg")
        named = self._by_stem.get(stem(last), [])
        return named[0] if place not in self._names and len(named) == 1 else place

    def count_others(self, used: Mapping[str, str]) -> int:
        """Images that no XML file is of, where the folder is the split's own."""
        if self.root in _IMAGE_FOLDERS:  # it holds the images of all splits
            return 0
        return len(self._names) - sum(posixpath.join(self.root, name) in self._names for name in used)


def find(folder: Folder) -> VocFolder | None:
    """The data set that lies in a folder in this format; None if it does not look like it."""
    lists = {
        split: name
        for split, names in SPLIT_NAMES.items()
        for name in names
        if folder.has(f"{_LISTS}/{name}.txt")
    }  # fmt: skip
    if lists or folder.has(f"{_LISTS}/trainval.txt"):
        return _of_lists(folder, lists or {"all": "trainval"})
    files = {}
    for split, names in SPLIT_NAMES.items():
        for place in [place for name in names for place in (name, f"Annotations/{name}", f"annotations/{name}")]:
            found = _xml_files(folder, place)
            if found:
                files[split] = found
                break
    if not files:
        folders = [name for name in _ANNOTATION_FOLDERS if folder.has(name)]
        found = _xml_files(folder, folders[0]) if folders else [n for n in folder.names() if n.endswith(".xml")]
        if found:
            files["all"] = found
    return VocFolder(folder, files) if files else None


def _of_lists(folder: Folder, lists: Mapping[str, str]) -> VocFolder:
    present = set(_xml_files(folder, "Annotations"))
    files, missing = {}, {}
    for split, name in lists.items():
        listed = [line.strip() for line in folder.text(f"{_LISTS}/{name}.txt").splitlines() if line.strip()]
        wanted = [_listed_file(entry, present) for entry in listed]
        files[split] = [file for file in dict.fromkeys(wanted) if file in present]
        missing[split] = len(set(wanted) - present)
        if not files[split]:
            raise DataError(
                f"{printable(folder.location(_LISTS))}/{name}.txt: none of the {len(wanted)} images that it lists has "
                f"an XML file in {printable(folder.location('Annotations'))}"
            )
    return VocFolder(folder, files, missing)


def _listed_file(entry: str, present: Collection[str]) -> str:
    """The XML file of a line: the name of an image, with or without its suffix, and maybe 1, 0 or -1 after it."""
    first = entry.rpartition(" ")[0].strip() or entry
    names = [f"Annotations/{name}.xml" for name in (entry, stem(entry), first, stem(first))]
    return next((name for name in names if name in present), names[0])


def _xml_files(folder: Folder, below: str) -> list[str]:
    if not folder.has(below):
        return []
    return [name for name in folder.files(below) if name.endswith(".xml")]
