"""Finds the images that an annotation file names or belongs to, and counts those that nothing annotates."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import PurePosixPath

from detr_ray.data.errors import DataError, few
from detr_ray.data.formats.folder import Folder, is_image, stem
from detr_ray.data.known_folders import ANNOTATION_FOLDERS, IMAGE_FOLDERS
from detr_ray.printable import printable

_JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
_DRIVE = re.compile(r"^[A-Za-z]:/")


class ImageFinder:
    r"""Finds images by their names.

    A name is looked for below each of the folders; where it begins with other folders (``/home/me/set/a.jpg``,
    ``C:\set\a.jpg``), these are dropped one by one. If there is no such image, the one is taken whose name differs in
    its suffix alone, which some tables leave out, or write in other letters (``.JPG``, ``.jpeg``). ``a.png`` is not
    taken for ``a.jpg``: it may be a mask.

    Args:
        folder: the data set's.
        bases: folders below it, in the order in which they are tried.
    """

    def __init__(self, folder: Folder, bases: Sequence[str]) -> None:
        self._bases = list(dict.fromkeys(bases))
        self._files = frozenset(folder.images())
        self._by_stem: dict[str, list[str]] = {}
        for file in self._files:
            self._by_stem.setdefault(stem(file), []).append(file)
        self._root = folder.root.rstrip("/") + "/"

    def find(self, name: str) -> str | None:
        """Path of the image below the data set's folder; None if it is not there."""
        found = self.find_below(name)
        return None if found is None else posixpath.join(*found)

    def find_below(self, name: str) -> tuple[str, str] | None:
        """The folder that contains the image, and its path below that folder; None if it is not found."""
        parts = self.plain(name).split("/")
        places = [(base, "/".join(parts[start:])) for start in range(len(parts)) for base in self._bases]
        found = next((place for place in places if posixpath.join(*place) in self._files), None)
        return found or next(filter(None, (self._with_suffix(*place) for place in places)), None)

    def _with_suffix(self, base: str, rest: str) -> tuple[str, str] | None:
        """The one image that is called so but for how its suffix is written; None if there is none, or several."""
        files = self._by_stem.get(posixpath.join(base, stem(rest) if is_image(rest) else rest), [])
        if is_image(rest):
            files = [file for file in files if _image_kind(file) == _image_kind(rest)]
        return (base, posixpath.relpath(files[0], base or ".")) if len(files) == 1 else None

    def plain(self, name: str) -> str:
        """A name with ``/`` between its parts, relative to the data set's folder if it is below that."""
        if name.startswith(self._root):
            return name[len(self._root) :]
        if name not in self._files:
            name = _DRIVE.sub("", name.replace("\\", "/"))
        plain = posixpath.normpath(name.partition("://")[2] or name).lstrip("/")
        while plain.startswith("../"):
            plain = plain[3:]
        return plain


class ImageMatcher:
    """Finds the image that a file of annotations belongs to: that of the same name in the same or a parallel folder.

    Names of folders that only say that they hold images, or annotations, are not compared: ``Annotations/b/1.xml``
    belongs to ``JPEGImages/b/1.jpg``. One of the two may lie in further folders: if there is no such image,
    ``JPEGImages/1.jpg`` is taken, and never ``JPEGImages/c/1.jpg``.

    Args:
        folder: the data set's.
        files: all annotation files below it.

    Attributes:
        images: those that are looked at: in a folder of images, or beside an annotation file; all images, where there
            are none in such places.
    """

    def __init__(self, folder: Folder, files: Iterable[str]) -> None:
        beside = {posixpath.dirname(file) for file in files}
        images = folder.images()
        usual = [name for name in images if posixpath.dirname(name) in beside or _kind(name) < len(IMAGE_FOLDERS)]
        self.images = usual or images
        self._by_parts: dict[tuple[str, ...], list[str]] = {}
        for name in self.images:
            self._by_parts.setdefault(_compared(name), []).append(name)

    def find(self, file: str) -> str | None:
        """The image of a file; None if there is none.

        Raises:
            DataError: several images fit equally.
        """
        parts = _compared(file)
        fits: dict[tuple[int, int], list[str]] = {}
        # Looked up rather than compared one by one: frames of thousands of videos have the same names.
        shorter = (parts[start:] for start in range(1, len(parts)))
        for others in [parts] if parts in self._by_parts else [*shorter, *self._longer.get(parts, [])]:
            for name in self._by_parts.get(others, []):
                fits.setdefault((abs(len(parts) - len(others)), _kind(name)), []).append(name)
        found = fits[min(fits)] if fits else []
        if len(found) > 1:
            raise DataError(f"{printable(file)}: may be of {few(sorted(found))}: rename or remove one of them")
        return found[0] if found else None

    @cached_property
    def _longer(self) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
        """The parts of the images' names by what they end with."""
        found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for parts in self._by_parts:
            for start in range(1, len(parts)):
                found.setdefault(parts[start:], []).append(parts)
        return found


def _image_kind(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    return ".jpg" if suffix in _JPEG_SUFFIXES else suffix


def _compared(name: str) -> tuple[str, ...]:
    """The parts of a name that a file has in common with its image."""
    *above, last = stem(name).split("/")
    return *(part for part in above if part not in ANNOTATION_FOLDERS and part not in IMAGE_FOLDERS), last


def _kind(name: str) -> int:
    """In which kind of folder of images one lies; the number of kinds if in none."""
    above = PurePosixPath(name).parts[:-1]
    return min((IMAGE_FOLDERS.index(part) for part in above if part in IMAGE_FOLDERS), default=len(IMAGE_FOLDERS))


def count_unused(images: Iterable[str], used: Collection[str], used_elsewhere: Iterable[str]) -> int:
    """How many images of a split's folder nothing annotates; 0 if the folder has images of other splits too.

    Args:
        images: paths below the data set's folder.
        used: those that the split's annotations are of.
        used_elsewhere: those that the annotations of other splits are of.
    """
    own = posixpath.commonpath({posixpath.dirname(name) for name in used}) if used else ""
    if any(_is_below(name, own) for name in used_elsewhere):
        return 0
    return sum(_is_below(name, own) and name not in used for name in images)


def _is_below(name: str, folder: str) -> bool:
    return not folder or name.startswith(f"{folder}/")
