"""Parses the bytes of a JSON file; of what is not JSON, says what it is and what to do with it.

UTF-8 with and without a byte order mark, UTF-16 and UTF-32 are read, as JSON allows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from detr_ray.data.errors import DataError

# First bytes of what is found in place of a JSON file -> what it is, and what to do.
_OTHER_FORMATS = (
    (b"\x1f\x8b", "a file compressed with gzip: unpack it first (gunzip)"),
    (b"PK\x03\x04", "a ZIP archive: unpack it first (unzip)"),
    (b"PK\x05\x06", "a ZIP archive, an empty one"),
    (b"BZh", "a file compressed with bzip2: unpack it first (bunzip2)"),
    (b"\xfd7zXZ\x00", "a file compressed with xz: unpack it first (unxz)"),
    (b"\x28\xb5\x2f\xfd", "a file compressed with zstd: unpack it first (unzstd)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"PAR1", "a Parquet file: for a folder of shards set data.train.shards (or data.val.shards) instead"),
    (b"\x89HDF", "an HDF5 file, not JSON"),
    (b"\x80\x04\x95", "a Python pickle, which is not read: write it as JSON"),
    (b"\xff\xd8\xff", "a JPEG image, not JSON"),
    (b"\x89PNG", "a PNG image, not JSON"),
    (b"%PDF", "a PDF, not JSON"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself: fetch it (git lfs pull)"),
)
_MARKUP = (
    (b"<!doctype html", "a web page, not the annotations: what a download gives that needs a login; fetch it again"),
    (b"<html", "a web page, not the annotations: what a download gives that needs a login; fetch it again"),
    (b"<", "XML or a web page, not COCO's JSON: convert the annotations, or fetch the right file"),
)
_CUT_OFF = "Was the file copied completely?"


def parse_json(location: str, raw: bytes, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Parses the content of a file.

    Args:
        location: the file, for messages.
        raw: its content.
        object_hook: see `json.loads`.

    Raises:
        DataError: it is not JSON; says what it is as far as can be told, and what to do.
    """
    _refuse_other_formats(location, raw)
    try:
        return json.loads(raw, object_hook=object_hook)
    except UnicodeDecodeError as error:
        raise _not_text(location, raw, error) from error
    except json.JSONDecodeError as error:
        # A file that was cut off ends inside of something; what is broken elsewhere was not copied wrongly.
        text = error.doc.rstrip()
        whole = text.endswith(("}", "]")) and error.pos < len(text)
        where = f"broken JSON ({len(raw)} bytes): {error}"
        raise DataError(f"{location}: {where}" + ("" if whole else f". {_CUT_OFF}")) from error
    except RecursionError as error:
        raise DataError(f"{location}: not COCO's JSON: its lists are nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{location}: cannot be parsed: {error}") from error


def _refuse_other_formats(location: str, raw: bytes) -> None:
    start = raw[:1000].lstrip()
    if not start and not raw.strip():
        what = "is empty" if not raw else "holds nothing but blanks"
        raise DataError(f"{location}: the annotation file {what}. {_CUT_OFF}")
    if not raw.strip(b"\0"):
        raise DataError(f"{location}: the annotation file holds {len(raw)} zero bytes and nothing else. {_CUT_OFF}")
    for magic, what in _OTHER_FORMATS:
        if raw.startswith(magic):
            raise DataError(f"{location}: this is {what}")
    for magic, what in _MARKUP:
        if start.removeprefix(b"\xef\xbb\xbf").lower().startswith(magic):
            raise DataError(f"{location}: this is {what}")


def _not_text(location: str, raw: bytes, error: UnicodeDecodeError) -> DataError:
    if error.reason in ("unexpected end of data", "truncated data"):
        return DataError(f"{location}: broken JSON ({len(raw)} bytes): it ends inside of a character. {_CUT_OFF}")
    byte, line = raw[error.start], raw.count(b"\n", 0, error.start) + 1
    return DataError(
        f"{location}: not {error.encoding.upper()} text: byte 0x{byte:02x} at place {error.start} (line {line}). JSON "
        "is UTF-8: convert the file, for example by iconv -f CP1252 -t UTF-8, or from whatever encoding it was written "
        "in"
    )
