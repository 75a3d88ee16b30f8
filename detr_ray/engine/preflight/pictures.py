"""Preflight of the images: each one exists, is readable, and has the annotated size."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from detr_ray.config import Config
from detr_ray.data.errors import DataError
from detr_ray.data.index import DatasetIndex
from detr_ray.data.inspection import Inspection, common_cause, find_missing_storage, inspect_images, is_other_folder
from detr_ray.engine.preflight.findings import Level, Report
from detr_ray.engine.preflight.storage import TIMEOUT_S, within
from detr_ray.engine.reporting.progress import Pace, duration

AREA = "images"


def check_images(
    config: Config, split: str, index: DatasetIndex, decode: bool, report: Report, say: Callable[[str], None]
) -> None:
    """Checks every image of a split, or as many as can be reached."""
    report.splits[split] |= {"images_seen": 0, "decoded": decode, "bad_images": []}
    try:
        missing = within(TIMEOUT_S, lambda: find_missing_storage(index))
    except (DataError, OSError) as error:
        report.add("error", AREA, f"{split}: the images' storage does not answer: {error}")
        return
    if missing and index.shards is None:
        report.add("error", AREA, f"{split}: {missing[-1]}", f"set data.{split}.images, or data.root")
        return
    if missing and index.shards is not None:
        report.add(
            "error", AREA,
            f"{split}: {len(missing)} of {len(index.shards.files)} shards cannot be used; their images are passed over",
            "copy them again from where they were written, or write them again", list(missing.values()),
        )  # fmt: skip
    started = time.perf_counter()
    progress = Pace(f"  {split}: {'decoded' if decode else 'read the headers of'}", say)
    seen = inspect_images(index, decode=decode, without_shards=frozenset(missing), progress=progress)
    _add_bad(config, split, index, seen, report)
    seconds = time.perf_counter() - started
    num_good = seen.num_seen - len(seen.bad)
    if num_good:
        report.add(
            "ok", AREA,
            f"{split}: {num_good} of {len(index)} images {'decode' if decode else 'have a readable header'} and have "
            f"the annotated size ({_listed(seen)}), in {duration(seconds)}",
        )  # fmt: skip
    if seen.turned_unseen:
        report.add(
            "warning", AREA,
            f"{split}: {len(seen.turned_unseen)} of {len(index)} images have an EXIF orientation that their size does "
            "not show",
            "training turns them upright: check whether their boxes fit then", seen.turned_unseen,
        )  # fmt: skip
    report.splits[split] |= {
        "images_seen": seen.num_seen,
        "formats": dict(seen.formats),
        "modes": dict(seen.modes),
        "images_turned": seen.num_turned,
        "bad_images": [{"image_id": bad.image_id, "file": bad.file, "reason": bad.reason} for bad in seen.bad],
    }


def _add_bad(config: Config, split: str, index: DatasetIndex, seen: Inspection, report: Report) -> None:
    if seen.broken_off:
        report.add("error", AREA, f"{split}: {seen.broken_off}", "check the storage first")
    if not seen.bad:
        return
    level: Level = "error"
    advice = "replace these files, or take their images out of the annotation file"
    if config.data.on_bad_image == "raise":
        advice += "; data.on_bad_image=skip " + (
            "trains without them" if split == "train" else "counts them as images without detections"
        )
    elif split == "train" and len(seen.bad) > config.data.max_bad_images:
        advice += f"; or set data.max_bad_images to {len(seen.bad)}"
    else:
        level = "warning"
    names = [f"{bad.file}: {bad.reason}" for bad in seen.bad]
    cause = common_cause(seen.bad, len(index))
    if cause:
        advice = cause
    elif is_other_folder(seen.bad, len(index)):
        advice = f"none of the images is usable: is data.{split}.images (or data.root) the right place?"
    message = f"{split}: {len(seen.bad)} of {len(index)} images cannot be used"
    report.add(level, AREA, message, advice, names)


def _listed(seen: Inspection) -> str:
    parts = [_counts(seen.formats), _counts(Counter({m: n for m, n in seen.modes.items() if m != "RGB"}))]
    if seen.num_turned:
        parts.append(f"{seen.num_turned} turned by EXIF")
    if seen.num_unreadable_exif:
        parts.append(f"{seen.num_unreadable_exif} with EXIF that can't be read, taken as stored")
    return "; ".join(part for part in parts if part)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())
