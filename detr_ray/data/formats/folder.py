"""The folder of a data set, for the readers of formats: names, images and text files, local or in a bucket.

Each folder is listed once, when a reader first asks for it. Hidden files are left out: they are what file managers and
archives leave (``.DS_Store``, ``._a.jpg``, ``__MACOSX``).
"""

from __future__ import annotations

import codecs
import io
import os
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pyarrow import fs

from detr_ray.addresses import LocationError, is_remote, is_uri, join, resolve
from detr_ray.callbacks import Progress
from detr_ray.data.errors import DataError, UnlistedError
from detr_ray.data.image_places import refuse_link_outside
from detr_ray.locations import at, list_files, list_names, read_bytes
from detr_ray.printable import is_encodable, printable
from detr_ray.retries import reason_of

IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".mpo", ".ppm", ".pgm", ".dib",
    ".avif", ".jp2",
})  # fmt: skip
_OF_SYSTEMS = frozenset({"__MACOSX", "lost+found"})
"""Folders of archives and disks, which hold no data; the second cannot be listed by users."""
_LOCAL_THREADS = 8
_REMOTE_THREADS = 64
_GROUP_FILES = 512
_BEGINNING = 1 << 20
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_TO_FIRST_LINE = re.compile(rb"(?:\xef\xbb\xbf)?\s*[^\r\n]*")


class Folder:
    """A folder, listed lazily.

    Args:
        root: path or URI.
        follow_links: whether links in it may lead out of it.

    Attributes:
        root: the same, absolute.
        follow_links: as given.
    """

    def __init__(self, root: str, follow_links: bool = False) -> None:
        self.root = resolve(root)
        self.follow_links = follow_links
        self._names: dict[str, dict[str, None]] = {}
        self._files: dict[str, tuple[str, ...]] = {}
        self._texts: dict[str, str] = {}
        self._first_lines: dict[str, str] = {}

    def location(self, name: str) -> str:
        """Path or URI of what lies at ``name`` below the folder; the folder itself for an empty name."""
        return join(self.root, name) if name else self.root

    def names(self, below: str = "") -> Collection[str]:
        """Sorted names of files and folders directly in a folder below; none where there is no such folder.

        Raises:
            DataError: it cannot be listed.
        """
        if below not in self._names:
            self._names[below] = dict.fromkeys(sorted(filter(_is_visible, self._list_names(below))))
        return self._names[below]

    def has(self, name: str) -> bool:
        """Whether a file or folder of this name lies below the folder."""
        above, _, last = name.rpartition("/")
        return not name or last in self.names(above)

    def files(self, below: str = "") -> tuple[str, ...]:
        """All files below a folder, sorted, as paths below the root.

        Raises:
            DataError: it, or a folder in it, cannot be listed.
        """
        if below not in self._files:
            whole = self._files.get("")
            if whole is not None:
                self._files[below] = tuple(name for name in whole if name.startswith(f"{below}/"))
            else:
                self._files[below] = tuple(sorted(self._list_files(below)))
        return self._files[below]

    def images(self, below: str = "") -> list[str]:
        """All image files below a folder, as paths below the root."""
        return [name for name in self.files(below) if is_image(name)]

    def text(self, name: str) -> str:
        """The content of a text file, kept for the next call.

        Raises:
            DataError: it is not there, cannot be read, or is not text.
        """
        if name not in self._texts:
            self._texts[name] = self._read_text(name)
        return self._texts[name]

    def first_line(self, name: str) -> str:
        """The first line of a text file, which may be large, that is not blank; see `text`."""
        if name not in self._first_lines:
            self._first_lines[name] = self._read_first_line(name)
        return self._first_lines[name]

    def _read_first_line(self, name: str) -> str:
        raw = read_beginning(self.location(name))
        if any(raw.startswith(mark) for mark, encoding in _BYTE_ORDER_MARKS if encoding != "utf-8-sig"):
            return first_line_of(self.text(name))
        beginning = _TO_FIRST_LINE.match(raw)
        assert beginning is not None, "the pattern also matches empty text"
        return first_line_of(decode_text(self.location(name), beginning[0]))

    def texts(self, names: Sequence[str], progress: Progress | None = None) -> Iterator[str]:
        """The contents of many text files, read in threads, in their order; see `text` and `contents`."""
        for name, raw in zip(names, self.contents(names, progress), strict=True):
            yield decode_text(self.location(name), raw)

    def contents(self, names: Sequence[str], progress: Progress | None = None) -> Iterator[bytes]:
        """The bytes of many files, read in threads, in their order; see `content`.

        Args:
            names: of the files.
            progress: called with (files read, files in all) from time to time.
        """
        threads = _REMOTE_THREADS if is_remote(self.root) else _LOCAL_THREADS
        with ThreadPoolExecutor(threads, thread_name_prefix="labels") as pool:
            for done, content in enumerate(pool.map(self.content, names), 1):
                if progress is not None and (done % _GROUP_FILES == 0 or done == len(names)):
                    progress(done, len(names))
                yield content

    def _read_text(self, name: str) -> str:
        return decode_text(self.location(name), self.content(name))

    def content(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            DataError: it is not there or cannot be read, a link leads out of the folder, or its name is not UTF-8.
        """
        location = self.location(name)
        refuse_other_encoding(location)
        try:
            if not is_uri(self.root) and not self.follow_links:
                refuse_link_outside(self.root, name, printable(location))
            return read_bytes(location)
        except FileNotFoundError as error:
            raise DataError(f"{printable(location)}: no such file") from error
        except OSError as error:
            raise DataError(f"{printable(location)}: cannot be read: {reason_of(error)}") from error
        except LocationError as error:
            raise DataError(str(error)) from error

    def _list_names(self, below: str) -> list[str]:
        location = self.location(below)
        try:
            return list_names(location) if is_uri(location) else [path.name for path in Path(location).iterdir()]
        except (OSError, LocationError) as error:
            _refuse_unlisted(location, error)
            return []

    def _list_files(self, below: str) -> Iterator[str]:
        location = self.location(below)
        if is_uri(location):
            yield from (posixpath.join(below, name) for name in _stored_files(location))
            return
        seen = set()
        # Links to folders are followed here and refused where a file is read, by a message that says why.
        for path, folders, files in os.walk(location, onerror=_refuse_unwalked, followlinks=True):
            folders[:] = [name for name in folders if _is_visible(name)]
            real = os.path.realpath(path)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            above = posixpath.join(below, os.path.relpath(path, location)) if path != location else below
            yield from (posixpath.join(above, name) for name in files if _is_visible(name))


def read_beginning(location: str) -> bytes:
    """The first mebibyte of a file.

    Raises:
        DataError: it cannot be read, or its name is not UTF-8.
    """
    refuse_other_encoding(location)

    def read(file_system: fs.FileSystem, path: str) -> bytes:
        with file_system.open_input_stream(path) as file:
            return file.read(_BEGINNING)

    try:
        return at(location, read)
    except (OSError, LocationError) as error:
        raise DataError(f"{printable(location)}: {reason_of(error)}") from error


def refuse_other_encoding(location: str, names: Iterable[str] = ()) -> None:
    """Refuses files whose name is not UTF-8, as archives from Windows may have: neither Arrow nor JSON can hold it.

    Args:
        location: of a file or folder.
        names: files below that folder.

    Raises:
        DataError: one has such a name.
    """
    if is_encodable(location):
        odd = next((name for name in names if not is_encodable(name)), None)
        if odd is None:
            return
        location = join(location, odd)
    raise DataError(
        f"{printable(location)}: its name is not UTF-8: rename it, or all by "
        "convmv -r --notest -f CP1252 -t UTF-8 FOLDER"
    )


def is_image(name: str) -> bool:
    """Whether a file is an image, by its name."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def stem(name: str) -> str:
    """A path without its last suffix."""
    above, slash, last = name.rpartition("/")
    return above + slash + (last.rpartition(".")[0] or last)


def first_line_of(text: str) -> str:
    """The first line that is not blank, without its end; empty if there is none."""
    return next((line.rstrip("\r\n") for line in io.StringIO(text, newline="") if line.strip()), "")


def decode_text(location: str, raw: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises:
        DataError: it is in another encoding; names the line.
    """
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{printable(location)}, line {line}: not {encoding.upper()} text (byte 0x{raw[error.start]:02x}): convert "
            "the file to UTF-8, for example by iconv -f CP1252 -t UTF-8"
        ) from error


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name not in _OF_SYSTEMS


def _stored_files(location: str) -> list[str]:
    """Names of the visible files below a folder in a bucket."""
    try:
        found = [file.name for file in list_files(location)]
    except (OSError, LocationError) as error:
        _refuse_unlisted(location, error)
        return []
    return [name for name in found if all(map(_is_visible, name.split("/")))]


def _refuse_unwalked(error: OSError) -> None:
    _refuse_unlisted(str(error.filename), error)


def _refuse_unlisted(location: str, error: OSError | LocationError) -> None:
    """Refuses a folder that is there and cannot be listed: its images would be missing without a word.

    Raises:
        UnlistedError: the error is not that there is no such folder.
        DataError: no folder can have this location.
    """
    if isinstance(error, LocationError):
        raise DataError(str(error)) from error
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise UnlistedError(f"{printable(location)}: cannot be listed: {reason_of(error)}") from error


@dataclass(frozen=True)
class SplitTables:
    """A data set in tables that each hold a split.

    Attributes:
        folder: its folder.
        tables: split -> name of its table.
    """

    folder: Folder
    tables: Mapping[str, str]

    @property
    def splits(self) -> tuple[str, ...]:
        """Which of ``train``, ``val`` and ``all`` there are."""
        return tuple(self.tables)
