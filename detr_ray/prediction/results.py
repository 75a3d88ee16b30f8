"""The folder of a prediction's results.

    prediction.json      what was predicted, with which settings; ``complete`` is false until all below is there
    parts/               one Parquet file for each part, written atomically; existing ones are kept
    results.json         COCO's results            predictions.parquet, predictions.csv      the same as tables
    bad_images.txt       a line for each image that could not be read
    pictures/            images with their boxes; the record has the lowest score that is drawn

The user chooses which of these are written.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from pyarrow.fs import FileType

from detr_ray.addresses import join, resolve
from detr_ray.config import ConfigError
from detr_ray.data.errors import DataError
from detr_ray.evaluation import DetectionTable
from detr_ray.locations import delete_folder, file_info, list_names, make_folder, read_buffer, read_bytes, write_bytes
from detr_ray.prediction.job import BatchFindings, PredictionJob
from detr_ray.retries import reason_of

RECORD = "prediction.json"
_FORMAT = "detr_ray prediction"
_PART = re.compile(r"part-(\d{6})\.parquet")
_METADATA = b"detr_ray"
_COLUMNS = (
    ("image_id", pa.int64()), ("file_name", pa.string()), ("category_id", pa.int64()), ("category", pa.string()),
    ("score", pa.float32()), ("left", pa.float32()), ("top", pa.float32()), ("width", pa.float32()),
    ("height", pa.float32()),
)  # fmt: skip
_HASHED = {
    "images": "other images, or images of other names or sizes",
    "model": "other weights or labels",
    "thresholds": "other thresholds of categories",
}
"""Settings of a job that are hashes -> what it means that they differ."""
SCHEMA = pa.schema(_COLUMNS)
"""Columns of the tables: a row for each detection, boxes in pixels of the image."""


class ResultFolder:
    """The results of one job.

    Args:
        location: path or URI of the folder.
        job: the job.
    """

    def __init__(self, location: str, job: PredictionJob) -> None:
        self.location = resolve(location)
        self._job = job
        assert job.saved.label_map is not None
        self._names = dict(job.saved.label_map.categories)
        self._picture_score: float | None = None

    def open(self) -> list[int]:
        """Creates the folder, or finds the missing parts of an existing one.

        Returns:
            The numbers of the missing parts.

        Raises:
            ConfigError: the folder has other content or the results of another job; or it cannot be used.
        """
        try:
            found = self._read_record()
            if found is None:
                make_folder(join(self.location, "parts"))
            else:
                self._picture_score = found.get("picture_score")
            self._write_record({"complete": False})
            done = {int(match[1]) for name in list_names(self._part("")) if (match := _PART.fullmatch(name))}
        except OSError as error:
            raise ConfigError(f"--out: {self.location} cannot be used: {reason_of(error)}") from error
        return [part for part in range(len(self._job.parts)) if part not in done]

    def _part(self, name: str) -> str:
        return join(self.location, "parts", name) if name else join(self.location, "parts")

    def _read_record(self) -> dict[str, Any] | None:
        place = join(self.location, RECORD)
        if file_info(self.location).type == FileType.File:
            raise ConfigError(f"--out: {self.location} is a file; name a folder")
        if file_info(place).type != FileType.File:
            strangers = [name for name in list_names(self.location) if name != "parts" and not name.endswith(".tmp")]
            if strangers:
                raise ConfigError(f"--out: {self.location} holds something else ({strangers[0]}); name a new folder")
            return None
        try:
            record = json.loads(read_bytes(place))
            before = dict(record["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--out: {place} is no record of a prediction: {error}; name a new folder") from error
        now = json.loads(json.dumps(self._job.settings))
        differing = [_difference(key, before.get(key), now[key]) for key in now if before.get(key) != now[key]]
        if differing:
            raise ConfigError(
                f"--out: {self.location} holds the results of another prediction ({'; '.join(differing)}). Name a new "
                "folder, or delete this one"
            )
        return record

    def _write_record(self, more: Mapping[str, Any]) -> None:
        record = {
            "format": _FORMAT,
            **more,
            "model": self._job.saved.source,
            "step": self._job.saved.step,
            "images": len(self._job.index) + len(self._job.unreadable),
            "settings": self._job.settings,
            "picture_score": self._picture_score,
        }
        write_bytes(join(self.location, RECORD), (json.dumps(record, indent=1) + "\n").encode())

    def write_part(self, part: int, findings: Sequence[BatchFindings]) -> None:
        """Writes the results of a part, atomically.

        Args:
            part: its number.
            findings: of each of its batches.

        Raises:
            OSError: it could not be written.
        """
        bad = {image_id: line for one in findings for image_id, line in one.bad_images.items()}
        table = self.table(DetectionTable.concat(one.detections for one in findings).sorted())
        table = table.replace_schema_metadata({_METADATA: json.dumps({"bad_images": bad})})
        write_bytes(self._part(f"part-{part:06d}.parquet"), _parquet(table))

    def table(self, found: DetectionTable) -> pa.Table:
        """Detections with the names of images and categories."""
        rows = np.searchsorted(self._job.index.image_ids, found.image_ids)
        left, top, width, height = np.ascontiguousarray(found.boxes_xywh_px.T)
        columns = [
            pa.array(found.image_ids),
            self._job.index.file_names.take(pa.array(rows)),
            pa.array(found.category_ids),
            pa.array([self._names[category_id] for category_id in found.category_ids.tolist()], pa.string()),
            *map(pa.array, (found.scores, left, top, width, height)),
        ]
        return pa.table(columns, schema=SCHEMA)

    def _read_parts(self) -> Iterator[pa.Table]:
        for part in range(len(self._job.parts)):
            place = self._part(f"part-{part:06d}.parquet")
            try:
                yield pq.read_table(pa.BufferReader(read_buffer(place)))
            except pa.ArrowInvalid as error:
                raise DataError(f"{place} is damaged: {error}. Delete it; the same command makes it anew") from error

    @property
    def pictures(self) -> str:
        """The folder of the pictures."""
        return join(self.location, "pictures")

    def _begin_pictures(self, least_score: float) -> None:
        """Removes pictures that were drawn with another lowest score."""
        if self._picture_score != least_score:
            delete_folder(self.pictures)
            self._picture_score = least_score
            self._write_record({"complete": False})

    def finish(
        self, formats: Sequence[str], picture_score: float, draw: Callable[[DetectionTable], None]
    ) -> tuple[DetectionTable, list[str]]:
        """Combines the parts, writes the chosen formats, and notes that the results are complete.

        Args:
            formats: of ``coco``, ``parquet``, ``csv`` and ``pictures``.
            picture_score: lowest score of detections that are drawn.
            draw: draws the pictures of all images that have none; called if pictures are chosen.

        Returns:
            The detections, and a line for each image that could not be read.

        Raises:
            DataError: a part is damaged.
            OSError: something could not be written.
        """
        tables, bad = [SCHEMA.empty_table()], list(self._job.unreadable)
        for table in self._read_parts():
            about = json.loads(table.schema.metadata[_METADATA])
            bad += [line for _, line in sorted(about["bad_images"].items(), key=lambda item: int(item[0]))]
            tables.append(table.replace_schema_metadata(None))
        whole = pa.concat_tables(tables).sort_by([("image_id", "ascending"), ("score", "descending")])
        found = to_detections(whole)
        contents: dict[str, tuple[str, Callable[[], bytes]]] = {
            "coco": ("results.json", found.coco_results_json),
            "parquet": ("predictions.parquet", lambda: _parquet(whole)),
            "csv": ("predictions.csv", lambda: _csv(whole)),
        }
        for name in formats:
            if name in contents:
                file, content = contents[name]
                write_bytes(join(self.location, file), content())
        if "pictures" in formats:
            self._begin_pictures(picture_score)
            draw(found)
        write_bytes(join(self.location, "bad_images.txt"), "".join(f"{line}\n" for line in bad).encode())
        self._write_record({"complete": True, "detections": len(found), "bad_images": len(bad)})
        return found, bad


def _difference(key: str, before: Any, now: Any) -> str:
    """What differs between two predictions, in words where the values are hashes."""
    return f"{key}: {_HASHED[key]}" if key in _HASHED else f"{key}: {before!r}, now {now!r}"


def to_detections(table: pa.Table) -> DetectionTable:
    """The rows of a table as detections."""
    columns = {name: table[name].to_numpy() for name in ("image_id", "category_id", "score")}
    boxes = np.stack([table[name].to_numpy() for name in ("left", "top", "width", "height")], axis=1)
    return DetectionTable(columns["image_id"], columns["category_id"], boxes, columns["score"])


def _parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    return file.getvalue()


def _csv(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pyarrow.csv.write_csv(table, file)
    return file.getvalue()
