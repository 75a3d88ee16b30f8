"""The ``data.yaml`` of a data set in YOLO's format."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import yaml

from detr_ray.addresses import is_uri
from detr_ray.data.errors import DataError, few, shown
from detr_ray.data.formats.folder import Folder
from detr_ray.data.formats.values import check_class_names
from detr_ray.data.known_folders import SPLIT_NAMES
from detr_ray.printable import printable

_USUAL_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_ADVICE = {
    key: f". If the set has no validation images, take the line {key} out and set data.split={{val: 0.1}}"
    for key in SPLIT_NAMES["val"]
}


@dataclass(frozen=True)
class DataFile:
    """What a ``data.yaml`` says.

    Attributes:
        names: the classes by number.
        sources: split (``train``, ``val``) -> folders of images or text files that list images, below the folder.
        has_keypoints: whether rows have keypoints after the box.
    """

    names: tuple[str, ...]
    sources: Mapping[str, Sequence[str]]
    has_keypoints: bool


def find_data_file(folder: Folder) -> str | None:
    """Name of the ``data.yaml``, or of the only other YAML file with ``names`` in it.

    Raises:
        DataError: there are several others.
    """
    usual = [name for name in _USUAL_NAMES if name in folder.names()]
    if usual:
        return usual[0]
    others = [
        name
        for name in folder.names()
        if name.endswith((".yaml", ".yml")) and "names" in _read(folder, name, needed=False)
    ]
    if len(others) > 1:
        raise DataError(f"{printable(folder.root)}: several files list classes ({few(others)}): keep one of them")
    return others[0] if others else None


def read_data_file(folder: Folder, name: str) -> DataFile:
    """Reads a ``data.yaml``.

    Raises:
        DataError: it is not one; says what to do.
    """
    location = folder.location(name)
    content = _read(folder, name, needed=True)
    if "names" not in content:
        raise DataError(f"{printable(location)}: no 'names': list the classes there, names: [cat, dog]")
    names = check_class_names(_names(content["names"], location), location)
    count = content.get("nc")
    if isinstance(count, str) and count != str(len(names)):
        raise DataError(
            f"{printable(location)}: nc is {shown(count, quoted=False)}, but 'names' lists {len(names)}: correct one"
        )
    base = _base(folder, content.get("path"))
    sources: dict[str, dict[str, str]] = {}
    for split, keys in SPLIT_NAMES.items():
        key = next((key for key in keys if content.get(key) not in (None, "", "null", "~")), None)
        if key is not None:
            given = content[key] if isinstance(content[key], list) else [content[key]]
            sources[split] = {place: _source(folder, base, place, f"{printable(location)}: {key}") for place in given}
    _refuse_same(folder, sources, location)
    return DataFile(names, {split: list(found.values()) for split, found in sources.items()}, "kpt_shape" in content)


def _refuse_same(folder: Folder, sources: Mapping[str, Mapping[str, str]], location: str) -> None:
    """Refuses different paths for training and validation that are only found as one folder, by dropping their first
    folders: the model would be trained on the validation images.
    """
    for train, val in product(sources.get("train", {}).items(), sources.get("val", {}).items()):
        is_dropped = any(not f"/{found}".endswith(f"/{_below(folder, given)}") for given, found in (train, val))
        if train[0] != val[0] and is_dropped and _is_same_or_below(train[1], val[1]):
            raise DataError(
                f"{printable(location)}: train is {shown(train[0])} and val is {shown(val[0])}, of which there is only "
                f"{printable(folder.location(min(train[1], val[1])))}, which would be both: write where the images of "
                "each lie, relative to data.root"
            )


def _is_same_or_below(first: str, second: str) -> bool:
    shorter, longer = sorted((first, second), key=len)
    return not shorter or f"{longer}/".startswith(f"{shorter}/")


def _read(folder: Folder, name: str, needed: bool) -> dict[str, Any]:
    location = folder.location(name)
    try:
        # Everything stays text: YAML would make truth values of classes that are called yes, no, on and off.
        content = yaml.load(folder.text(name), yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        if not needed:
            return {}
        raise DataError(f"{printable(location)}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if isinstance(content, dict):
        return content
    if not needed:
        return {}
    raise DataError(f"{printable(location)}: not a data.yaml: no keys such as 'names' and 'train' in it")


def _names(given: Any, location: str) -> list[str]:
    """The classes by number, from a list or from numbers with names."""
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        return given
    if isinstance(given, dict) and all(isinstance(name, str) for name in given.values()):
        numbers = sorted(given, key=lambda number: (len(number), number))
        if numbers == [str(number) for number in range(len(numbers))]:
            return [given[number] for number in numbers]
        raise DataError(
            f"{printable(location)}: the classes in 'names' are numbered {few(numbers)}: number them 0, 1, 2, ..."
        )
    raise DataError(f"{printable(location)}: 'names' is neither a list of names nor numbers with names")


def _base(folder: Folder, path: Any) -> str:
    """The folder that the splits are relative to, below the data set's: that of ``path`` if it is there."""
    if not isinstance(path, str) or is_uri(path):
        return ""
    plain = _below(folder, path)
    return plain if plain and folder.has(plain) else ""


def _source(folder: Folder, base: str, place: Any, key: str) -> str:
    """A folder of images, or a list of them, below the data set's folder.

    Some tools write ``../train/images`` for ``train/images``, and some files name folders of the machine on which they
    were written. So a path is also looked for without its first folders.
    """
    if not isinstance(place, str):
        raise DataError(f"{key} is neither a folder nor a list of folders")
    parts = _below(folder, place).split("/")
    candidates = [
        posixpath.join(above, *parts[start:]) for start in range(len(parts)) for above in dict.fromkeys((base, ""))
    ]
    found = next((name for name in candidates if folder.has(name)), None)
    if found is None:
        raise DataError(
            f"{key} is {shown(place)}, and there is no {printable(folder.location(candidates[0]))}: paths are relative "
            "to data.root, and everything has to lie in it" + _ADVICE.get(key.rpartition(" ")[2], "")
        )
    return found.rstrip("/")


def _below(folder: Folder, path: str) -> str:
    """A path relative to the data set's folder if it is below that, without ``.`` and ``..`` at its beginning."""
    path = path.replace("\\", "/").removeprefix(folder.root.rstrip("/") + "/")
    plain = posixpath.normpath(path).lstrip("/")
    while plain.startswith("../") or plain == "..":
        plain = plain[3:]
    return "" if plain == "." else plain
