"""Reading checkpoint files, from disk, from buckets and from the net, as data and never as code.

Nothing but tensors, plain containers and an ``argparse.Namespace`` (which the original's training checkpoints carry)
is read. Knows files, hashes and servers; knows nothing of the model that the weights are for.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import logging
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import torch
from torch import Tensor

from detr_ray.locations import LocationError, read_buffer

logger = logging.getLogger(__name__)

DOWNLOAD_TIMEOUT_S = 60.0
"""How long a server may stay silent."""

_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[A-Za-z.]+$")
_FORBIDDEN_OBJECT = re.compile(r"GLOBAL ([\w.]+)")
_NAMES_SHOWN = 6


class WeightsError(ValueError):
    """Weights that cannot be had or do not fit; the message names the file and what to do."""


def shorten_names(names: Sequence[str]) -> str:
    """Names in one line; more than a few are grouped by their first word and shown by what each group shares."""
    if len(names) <= _NAMES_SHOWN:
        return ", ".join(names)
    groups: dict[str, list[list[str]]] = {}
    for name in names:
        words = name.split(".")
        groups.setdefault(words[0], []).append(words)
    return ", ".join(
        ".".join(group[0]) if len(group) == 1 else f"{'.'.join(_shared_start(group))}.* ({len(group)})"
        for group in groups.values()
    )


def _shared_start(lists: Sequence[Sequence[str]]) -> list[str]:
    """The words that all lists start with."""
    columns = zip(*lists, strict=False)
    return [words[0] for words in takewhile(lambda words: len(set(words)) == 1, columns)]


def read_checkpoint(source: str) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, of this project's format, of the original's, or a bare state dict.

    Args:
        source: a path, the address of an object (``s3://``, ``gs://``, any pyarrow file system), or a ``file://``,
            ``http://`` or ``https://`` URL. A URL's content must have the SHA-256 that
            its file name starts to spell (``NAME-<8 or more hex digits>.pth``); such files are kept in the torch hub
            folder for the next time. Without such a name the content is taken as it comes, with a warning.

    Returns:
        What the file holds; ``"model"`` is the state dict, ``"class_names"`` the names of the classifier's rows
        without no-object, or None where the file does not say.

    Raises:
        WeightsError: the file cannot be had, is damaged, or holds more than data.
    """
    scheme = urlsplit(source).scheme if "://" in source else ""
    if scheme in ("http", "https"):
        content = _fetched(source)
    elif scheme == "file":
        path = Path(urllib.request.url2pathname(urlsplit(source).path))
        content = _unpickled(path, source)
        _refuse_other_hash(source, path)
    elif scheme:
        content = _stored(source)
    else:
        content = _unpickled(Path(source).expanduser(), source)

    if not isinstance(content, dict):
        raise WeightsError(f"{source} holds a {type(content).__name__}, not a dictionary of weights")
    checkpoint = content if isinstance(content.get("model"), Mapping) else {"model": content}
    for part in ("model", "ema"):
        state = checkpoint.get(part) or {}
        if not isinstance(state, Mapping):
            raise WeightsError(f"{source} holds no state dict under {part!r}, but a {type(state).__name__}")
        strangers = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
        if strangers:
            raise WeightsError(f"{source} holds no state dict of tensors: {shorten_names(strangers)} is something else")
    label_map = checkpoint.get("label_map")
    return {**checkpoint, "class_names": None if label_map is None else list(label_map["names"])}


def _stored(location: str) -> Any:
    """Content of an object on a remote file system."""
    try:
        data = read_buffer(location)
    except (OSError, LocationError) as error:
        raise WeightsError(str(error)) from error
    return _unpickled(data, location)


def _unpickled(place: Path | pa.Buffer, source: str) -> Any:
    """Content of a torch file, or of its bytes, read without running anything of it."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            file = pa.BufferReader(place) if isinstance(place, pa.Buffer) else place
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"there is no file {source}") from None
    except IsADirectoryError:
        raise WeightsError(f"{source} is a folder; name the file in it") from None
    except OSError as error:
        raise WeightsError(f"{source} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file fails in any way that its bytes lead to
        forbidden = _FORBIDDEN_OBJECT.search(str(error))
        if forbidden is None:
            size = place.size if isinstance(place, pa.Buffer) else place.stat().st_size
            raise WeightsError(f"{source} is damaged or no torch file ({size} bytes)") from error
        raise WeightsError(
            f"{source} holds Python objects beside its tensors ({forbidden.group(1)}), and reading them would run "
            "code. Where it was made, save the weights alone: torch.save({'model': model.state_dict()}, path)"
        ) from error


def _refuse_other_hash(source: str, path: Path) -> None:
    """Raises where a file's SHA-256 does not start as the name at the end of ``source`` says."""
    expected = _HASH_IN_NAME.search(urlsplit(source).path)
    if expected is None:
        logger.warning("%s carries no hash in its name: its content was not checked", source)
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected.group(1)):
        raise WeightsError(
            f"{source} is not what its name says: the content's SHA-256 starts with "
            f"{found[: len(expected.group(1))]}, not {expected.group(1)}"
        )


def _fetched(url: str) -> Any:
    """Content of the file behind an http(s) URL; from the torch hub folder where it lies there unharmed."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    kept = folder / Path(urlsplit(url).path).name
    named_by_hash = _HASH_IN_NAME.search(kept.name) is not None
    if named_by_hash and kept.is_file():
        try:
            _refuse_other_hash(url, kept)
        except WeightsError as error:
            logger.warning("the copy of %s in %s is damaged and is fetched again: %s", url, folder, error)
        else:
            return _unpickled(kept, url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        raise WeightsError(f"{url} has no place to go ({error}): set TORCH_HOME to a folder to keep it in") from error
    with scratch:
        arrived = Path(scratch.name) / "weights"
        _download(url, arrived)
        _refuse_other_hash(url, arrived)
        if not named_by_hash:
            return _unpickled(arrived, url)
        arrived.replace(kept)
    return _unpickled(kept, url)


def _download(url: str, path: Path) -> None:
    """Writes what a URL gives into a file; a silent server, a refusal and a broken connection are errors."""
    request = urllib.request.Request(url, headers={"User-Agent": "detr_ray"})
    try:
        with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT_S) as response, path.open("wb") as file:
            while block := response.read(1 << 20):
                file.write(block)
            announced = response.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        raise WeightsError(f"{url}: the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise WeightsError(
            f"{url} cannot be fetched ({error}); where there is no way out, fetch it elsewhere and give its path"
        ) from error
    if announced is not None and path.stat().st_size != int(announced):
        raise WeightsError(f"{url} broke off after {path.stat().st_size} of {announced} bytes: try again")
