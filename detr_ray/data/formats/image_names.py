"""Finds the images that an annotation file names, also where it was written on another machine."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence

from detr_ray.data.formats.folder import Folder

_DRIVE = re.compile(r"^[A-Za-z]:/")


class ImageFinder:
    r"""Finds images by their names.

    A name is looked for below each of the folders; where it begins with other folders (``/home/me/set/a.jpg``,
    ``C:\set\a.jpg``), these are dropped one by one.

    Args:
        folder: the data set's.
        bases: folders below it, in the order in which they are tried.
    """

    def __init__(self, folder: Folder, bases: Sequence[str]) -> None:
        self._bases = list(dict.fromkeys(bases))
        self._files = frozenset(folder.images())
        self._root = folder.root.rstrip("/") + "/"

    def find(self, name: str) -> str | None:
        """Path of the image below the data set's folder; None if it is not there."""
        found = self.find_below(name)
        return None if found is None else posixpath.join(*found)

    def find_below(self, name: str) -> tuple[str, str] | None:
        """The folder that contains the image, and its path below that folder; None if it is not found."""
        parts = self.plain(name).split("/")
        for start in range(len(parts)):
            rest = "/".join(parts[start:])
            for base in self._bases:
                if posixpath.join(base, rest) in self._files:
                    return base, rest
        return None

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
