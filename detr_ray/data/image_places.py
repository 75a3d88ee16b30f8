"""Where an image's file lies: a name of the annotation file below the folder of images, and never outside of it.

Annotation files come from others. With a name such as ``/etc/passwd`` or ``../../key``, or a link in the folder, any
file of the machine could be read, and be packed into shards byte for byte.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from detr_ray.addresses import is_uri
from detr_ray.data.image_headers import ImageError
from detr_ray.printable import printable

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


class MisnamedError(ImageError):
    """An image whose file is not where its name says, but elsewhere in the folder.

    Args:
        message: names the file and the reason.
        found: what the file is called.
        advice: what to do about all names of this kind.
    """

    def __init__(self, message: str, found: str, advice: str) -> None:
        super().__init__(f"{message}, but {printable(found)} is there: {advice}")
        self.advice = advice


def name_below(root: str, file_name: str) -> str:
    """The path of an image below the folder of images.

    Args:
        root: the folder; an absolute path or a URI.
        file_name: as the annotation file has it. An absolute path is taken where it leads into the folder.

    Raises:
        ImageError: it does not lie inside of the folder.
    """
    path = PurePosixPath(file_name)
    if path.is_absolute() and not is_uri(root):
        for folder in (root, os.path.realpath(root)):
            if path.is_relative_to(folder):
                path = path.relative_to(folder)
                file_name = str(path)
                break
    if path.parts and not path.is_absolute() and ".." not in path.parts and "\0" not in file_name:
        return file_name
    outside = f"'{printable(file_name)}' in the folder {root}: a file name has to lie inside of the images' folder"
    found = _found_elsewhere(root, file_name)
    if found is None:
        raise ImageError(outside)
    raise MisnamedError(outside, *found)


def refuse_link_outside(root: str, name: str, what: str) -> None:
    """Refuses a local file if a link in the folder of images leads out of the folder.

    Args:
        root: the folder, which may be a link itself.
        name: path of the file below it.
        what: what to call the file.

    Raises:
        ImageError: it lies elsewhere.
    """
    path = root
    for part in PurePosixPath(name).parts:
        path = f"{path}/{part}"
        if Path(path).is_symlink():  # following links takes several times as long, so only if there is one
            break
    else:
        return
    folder = os.path.realpath(root)
    if not Path(os.path.realpath(f"{root}/{name}")).is_relative_to(folder):
        raise ImageError(
            f"{what}: a link that leads out of the images' folder; if that is meant, set data.follow_links=true"
        )


def missing(root: str, name: str, what: str, reason: str) -> ImageError:
    """The error for a file that is not there; says where it is if its name was written in another way.

    Args:
        root: the folder.
        name: path of the file below it.
        what: what to call the file.
        reason: what opening it gave.
    """
    found = _found_elsewhere(root, name)
    if found is None:
        return ImageError(f"{what}: {reason}")
    return MisnamedError(f"{what}: {reason}", *found)


def _found_elsewhere(root: str, file_name: str) -> tuple[str, str] | None:
    """The name under which the file is found, and what to do about such names; None if not found or remote."""
    if is_uri(root) or "\0" in file_name:
        return None
    for candidate, advice in _other_names(file_name):
        parts = PurePosixPath(candidate).parts
        if candidate and candidate != file_name and parts and parts[0] != "/" and ".." not in parts:
            try:
                if Path(root, candidate).is_file():
                    return candidate, advice
            except ValueError:  # a character that this machine's file names can't have
                continue
    return None


def _other_names(file_name: str) -> Iterator[tuple[str, str]]:
    """Other names that a file may have, and what to do about each kind."""
    slashed = file_name.replace("\\", "/")
    yield slashed, "these are Windows paths: write / for \\ in 'file_name'"
    yield unquote(file_name), "these names are URL-encoded: decode 'file_name' (a blank for %20)"
    for form in ("NFC", "NFD"):
        yield (
            unicodedata.normalize(form, file_name),
            f"accents are written in another way in the files' names: bring 'file_name' to Unicode's form {form}",
        )
    path = PurePosixPath(slashed)
    for suffix in {path.suffix.lower(), path.suffix.upper()}:
        yield str(path.with_suffix(suffix)) if path.suffix else "", "the extension is written in other letters there"
    for extension in _EXTENSIONS:
        yield file_name + extension, "'file_name' lacks the extension"
    parts = [part for part in path.parts if part != "/"]
    for start in range(1, len(parts)):
        for name in ("/".join(parts[start:]), unquote("/".join(parts[start:]))):
            yield name, "'file_name' begins with other folders: leave in it what lies below the images' folder"
