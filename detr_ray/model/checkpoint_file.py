"""Reads checkpoint files from disks, buckets and web servers, as data and never as code.

Torch files and safetensors files are told apart by their content. Of torch files nothing but tensors, plain containers
and an ``argparse.Namespace`` (which the original's training checkpoints carry) is read. Knows files, hashes and
servers; knows nothing of the model that the weights are for.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import safetensors.torch
import torch

from detr_ray.addresses import LocationError, is_uri, local_path
from detr_ray.locations import read_buffer
from detr_ray.model.state_dicts import OWN_FORMAT, DamagedFileError, WeightsError, find_states
from detr_ray.retries import reason_of

logger = logging.getLogger(__name__)

DOWNLOAD_TIMEOUT_S = 60.0
"""Time limit in seconds for a server that sends nothing."""

_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[A-Za-z.]+$")
_FORBIDDEN_OBJECT = re.compile(r"GLOBAL ([\w.]+)")
_LARGEST_HEADER = 100_000_000
"""Largest header in bytes that the safetensors library accepts."""


def read_checkpoint(source: str, sha256: str | None = None) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU: this project's format, the original's, other trainers', or a bare state dict.

    Args:
        source: a path, the address of an object (``s3://``, ``gs://``, any pyarrow file system), or a ``file://``,
            ``http://`` or ``https://`` URL. A URL's content must have the SHA-256 that
            its file name starts to spell (``NAME-<8 or more hex digits>.pth``); such files are kept in the torch hub
            folder for the next time. Without such a name the content is taken as it comes, with a warning.
        sha256: recorded hash of a path's or object's content; other content is refused unread.

    Returns:
        What the file holds; ``"model"`` is the state dict, ``"ema"`` that of averaged weights or None,
        ``"class_names"`` the names of the classifier's rows without no-object, or None where the file does not say.
        ``"label_map"`` and ``"config"`` are there in files of this project only.

    Raises:
        WeightsError: the file cannot be fetched, is damaged, has another hash, or contains more than data.
    """
    path = local_path(source)
    if source.lower().startswith(("http://", "https://")):
        content = _fetched(source)
    elif path is None:
        content = _stored(source, sha256)
    else:
        if sha256 is not None:
            _refuse_changed(source, path, sha256)
        content = _loaded(path, source)
        if is_uri(source):
            _refuse_other_hash(source, path)

    model, averaged = find_states(content, source)
    beside = {key: value for key, value in content.items() if key not in ("label_map", "config")}
    checkpoint = {**beside, "model": model, "ema": averaged, "class_names": None}
    if content.get("format") != OWN_FORMAT:
        return checkpoint
    label_map, config = content.get("label_map"), content.get("config")
    names = label_map.get("names") if isinstance(label_map, Mapping) else None
    ids = label_map.get("category_ids") if isinstance(label_map, Mapping) else None
    if not (isinstance(names, list) and isinstance(ids, list) and isinstance(config, Mapping)):
        raise DamagedFileError(f"{source} is damaged: it lacks its label map or its configuration")
    return {**checkpoint, "class_names": list(names), "label_map": label_map, "config": config}


def _stored(location: str, sha256: str | None) -> Any:
    """Content of an object on a remote file system."""
    try:
        data = read_buffer(location)
    except (OSError, LocationError) as error:
        raise WeightsError(str(error)) from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise changed(location)
    return _loaded(data, location)


def _refuse_changed(source: str, path: Path, sha256: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise WeightsError(f"there is no file {source}") from None
    except OSError as error:
        raise WeightsError(f"{source} cannot be read: {error.strerror or error}") from error
    if found != sha256:
        raise changed(source)


def changed(source: str) -> DamagedFileError:
    """The error for a file whose hash differs from the one recorded when it was written."""
    return DamagedFileError(
        f"{source} is not what was written: its SHA-256 is another than the one recorded beside it. It is damaged or "
        "was changed; take another checkpoint, or copy it again"
    )


def _loaded(place: Path | pa.Buffer, source: str) -> Any:
    """Content of a torch file or a safetensors file, or of its bytes, read without running code from it."""
    kind, size = "torch", 0
    try:
        size, start = _beginning(place)
        if _is_safetensors(start, source):
            kind = "safetensors"
            return safetensors.torch.load(place.read_bytes() if isinstance(place, Path) else place.to_pybytes())
        # torch gets an open file: from a name it would guess the format.
        opened = place.open("rb") if isinstance(place, Path) else pa.BufferReader(place)
        with opened as file, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"there is no file {source}") from None
    except IsADirectoryError:
        raise WeightsError(f"{source} is a folder; name the file in it") from None
    except OSError as error:
        raise WeightsError(f"{source} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can raise any exception
        forbidden = _FORBIDDEN_OBJECT.search(str(error))
        if kind == "safetensors" or forbidden is None:
            reason = f": {reason_of(error)}" if kind == "safetensors" else ""
            raise DamagedFileError(f"{source} is damaged or no {kind} file ({size} bytes){reason}") from error
        raise WeightsError(
            f"{source} holds Python objects beside its tensors ({forbidden.group(1)}), and reading them would run "
            "code. Where it was made, save the weights alone: torch.save({'model': model.state_dict()}, path)"
        ) from error


def _beginning(place: Path | pa.Buffer) -> tuple[int, bytes]:
    """Size of a file or of its bytes, and the first few of them."""
    if not isinstance(place, Path):
        return place.size, place.slice(0, min(9, place.size)).to_pybytes()
    with place.open("rb") as file:
        return place.stat().st_size, file.read(9)


def _is_safetensors(start: bytes, source: str) -> bool:
    """Whether a file begins like a safetensors file, which may be damaged: length of the header, then the header."""
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _LARGEST_HEADER:
        return True
    is_torch = start.startswith((b"PK", b"\x80"))  # zip, or a pickle
    return not is_torch and urlsplit(source).path.lower().endswith(".safetensors")


def _refuse_other_hash(source: str, path: Path) -> None:
    """Raises if a file's SHA-256 does not begin with the digits in the file name of ``source``."""
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
    """Content of the file at an http(s) URL; from the torch hub folder if an undamaged copy is there."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    kept = folder / Path(urlsplit(url).path).name
    named_by_hash = _HASH_IN_NAME.search(kept.name) is not None
    if named_by_hash and kept.is_file():
        try:
            _refuse_other_hash(url, kept)
        except WeightsError as error:
            logger.warning("the copy of %s in %s is damaged and is fetched again: %s", url, folder, error)
        else:
            return _loaded(kept, url)
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
            return _loaded(arrived, url)
        arrived.replace(kept)
    return _loaded(kept, url)


def _download(url: str, path: Path) -> None:
    """Downloads a URL into a file; a server that sends nothing, a refusal and a broken connection are errors."""
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
