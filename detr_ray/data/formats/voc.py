"""Pascal VOC: an XML file for each image, and lists of images in ``ImageSets/Main`` or folders for the splits.

Boxes are taken as written: left, top, right, bottom in pixels. (Files of the original data sets, whose database is
named ``The VOC...``, count pixels from 1: 1 is taken from left and top.) ``difficult`` objects are treated as crowds:
they are not learnt, and in evaluation a detection of one is neither right nor wrong, as in VOC's own. Categories are
the lines of ``classes.txt``; without it, all names of all files in alphabetical order, numbered from 0.
"""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile

from detr_ray.data.errors import DataError, shown
from detr_ray.data.formats.assembly import Gathered, Reading, assemble
from detr_ray.data.formats.folder import Folder, stem
from detr_ray.data.formats.image_names import ImageMatcher, count_unused
from detr_ray.data.formats.values import at_line, read_class_file
from detr_ray.data.formats.voc_file import VocImage, read_annotation
from detr_ray.data.index import DatasetIndex
from detr_ray.data.known_folders import ANNOTATION_FOLDERS, KNOWN_FOLDERS, SPLIT_NAMES
from detr_ray.printable import printable

NAME = "voc"
NEEDS = "Pascal VOC: an XML file for each image, with ImageSets/Main or folders train and val"

_LISTS = "ImageSets/Main"


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
        matcher = self._matcher()
        return next(filter(None, map(matcher.find, self.files[split])), None)

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
        contents = list(self._parse(self.files[split], reading))
        matcher = self._matcher()
        images = [_image_of(content, matcher) for content in contents]
        found = set(filter(None, images))
        if not found:
            raise DataError(self._advice(contents[0], len(contents), source))
        root = _root(found)
        gathered = Gathered()
        owners: dict[str, str] = {}
        for content, image in zip(contents, images, strict=True):
            name = posixpath.relpath(image, root or ".") if image is not None else _wanted(content)
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
        gathered.count("images_not_annotated", self._count_others(split, matcher, found))
        return assemble(
            gathered, categories=tuple(enumerate(names)), images_root=self.folder.location(root), source=source,
            follow_links=self.folder.follow_links, reading=reading,
        )  # fmt: skip

    def _matcher(self) -> ImageMatcher:
        return ImageMatcher(self.folder, chain.from_iterable(self.files.values()))

    def _count_others(self, split: str, matcher: ImageMatcher, found: Collection[str]) -> int:
        """Images without annotations. Where lists say which images a split has, those that lack their XML file."""
        if self.missing:
            return self.missing.get(split, 0)
        others = chain.from_iterable(files for other, files in self.files.items() if other != split)
        return count_unused(matcher.images, found, filter(None, map(matcher.find, others)))

    def _advice(self, content: VocImage, count: int, source: str) -> str:
        """What to say where no image is found."""
        return (
            f"{source}: none of its {count} XML files has its image in {printable(self.folder.root)}: that of "
            f"{printable(content.file)} is {printable(_wanted(content))}. Put the images into JPEGImages beside "
            "Annotations, with the same folders in it, or beside their XML files"
        )

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


def _image_of(content: VocImage, matcher: ImageMatcher) -> str | None:
    """The image of an XML file: that with its name, else that which it states; None if it is missing."""
    stated = posixpath.join(posixpath.dirname(content.file), _wanted(content))
    return matcher.find(content.file) or matcher.find(stated)


def _wanted(content: VocImage) -> str:
    """The name that a file states for its image, without folders, or else the file's own."""
    return content.stated_name.replace("\\", "/").rpartition("/")[2] or f"{posixpath.basename(stem(content.file))}.jpg"


def _root(images: Iterable[str]) -> str:
    """The folder that names of images are relative to: the known folders that the paths of all of them begin with.

    Other folders do not count, so that names stay what they are when images are added in a new one.
    """
    folders = posixpath.commonpath({posixpath.dirname(image) for image in images}).split("/")
    return "/".join(takewhile(lambda folder: folder.lower() in KNOWN_FOLDERS, folders))


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
        for place in [posixpath.join(above, name) for name in names for above in ("", *ANNOTATION_FOLDERS)]:
            found = _xml_files(folder, place)
            if found:
                files[split] = found
                break
    if not files:
        by_folder = (_xml_files(folder, name) for name in ANNOTATION_FOLDERS)
        found = next(filter(None, by_folder), [name for name in folder.names() if name.lower().endswith(".xml")])
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
    return [name for name in folder.files(below) if name.lower().endswith(".xml")]
