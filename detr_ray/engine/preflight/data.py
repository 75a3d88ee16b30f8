"""Preflight of the data: faults in annotations, labels, numbers of boxes, and every image."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from detr_ray.callbacks import Progress
from detr_ray.config import Config, ConfigError
from detr_ray.data.errors import DataError
from detr_ray.data.index import PROBLEMS, DatasetIndex
from detr_ray.data.inspection import Inspection, common_cause, find_missing_storage, inspect_images, is_other_folder
from detr_ray.data.label_map import LabelMap
from detr_ray.data.statistics import BoxStatistics, count_boxes, find_misreadings
from detr_ray.engine.checkpoints.run_directory import read_record
from detr_ray.engine.errors import CheckpointError
from detr_ray.engine.job import choose_label_space, label_map_for
from detr_ray.engine.opened_data import ConfiguredData, draw, generated_root
from detr_ray.engine.preflight.findings import Level, Report
from detr_ray.engine.preflight.writing import TIMEOUT_S, try_storage, within
from detr_ray.engine.reporting.progress import duration

DATA, LABELS, IMAGES = "data", "labels", "images"
FEW_BOXES = 10
"""Classes with fewer training boxes are reported."""

# Faults by which boxes are lost or names are mixed up. The others were corrected without loss.
_LOSSES = (
    "boxes_not_finite", "boxes_outside", "boxes_without_area", "category_names_repeated", "rows_repeated",
    "labels_without_image", "images_not_annotated", "images_without_size",
    "files_repeated",
)  # fmt: skip


def check_generated(config: Config, report: Report) -> bool:
    """Checks the folder of a generated data set. Returns whether there is data to check."""
    data = config.data
    if data.generate is None:
        return True
    root = generated_root(data)
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        count = data.generate.num_train + data.generate.num_val
        try:
            try_storage(str(root))
        except OSError as error:
            report.add("error", DATA, f"data.root: {root} cannot be written: {error}", "choose another data.root")
            return False
        report.add(
            "ok", DATA, f"{root} does not exist yet: {count} images are drawn into it when training starts",
            "to check them, draw them first: the prepare command with the same configuration",
        )  # fmt: skip
        return False
    try:
        draw(data)
    except DataError as error:
        report.add("error", DATA, str(error))
    return True


def open_splits(config: Config, report: Report, pace: Callable[[str], Progress]) -> dict[str, DatasetIndex]:
    """Opens the configured splits. A split that cannot be opened is reported and left out."""
    configured, opened = ConfiguredData(config.data), {}
    for split in ("train", "val"):
        if config.data.root is None and config.data.places(split) is None and not config.data.is_of_sources(split):
            if split == "val":
                report.add(
                    "warning", DATA, "val: no validation data is given, so no AP is computed and no checkpoint is best",
                    "set data.val.annotations and data.val.images, or data.split={val: 0.1}",
                )  # fmt: skip
            continue
        try:
            opened[split] = index = configured.open(split, _of_split(split, pace))
        except DataError as error:
            report.add("error", DATA, f"{split}: {error}")
            continue
        if config.data.max_images is not None:
            opened[split] = index = index.first(config.data.max_images)
        _check_quirks(split, index, report)
        for misreading in find_misreadings(index):
            level: Level = "error" if misreading.ruins else "warning"
            report.add(level, DATA, f"{split}: {misreading.message}", misreading.advice)
    if len(opened) == 2 and opened["train"].fingerprint == opened["val"].fingerprint:
        report.add(
            "warning", DATA, "train and val are the same data: the AP says nothing about other images",
            "fine for a trial; for a detector, validate on images that it does not train on",
        )  # fmt: skip
    return opened


def _of_split(split: str, pace: Callable[[str], Progress]) -> Callable[[str], Progress]:
    return lambda what: pace(f"{split}: {what}")


def _check_quirks(split: str, index: DatasetIndex, report: Report) -> None:
    notes = [f"{count} {PROBLEMS[kind]}" for kind, count in index.problems.items() if kind not in _LOSSES]
    losses = [f"{count} {PROBLEMS[kind]}" for kind, count in index.problems.items() if kind in _LOSSES]
    report.add(
        "ok", DATA,
        f"{split}: {len(index)} images, {len(index.category_ids)} annotations, {len(index.categories)} categories "
        f"({index.source})" + (f"; {'; '.join(notes)}" if notes else ""),
    )  # fmt: skip
    if losses:
        report.add("warning", DATA, f"{split}: {'; '.join(losses)}", "correct the annotations if these are not meant")
    report.splits[split] = {
        "source": index.source,
        "fingerprint": index.fingerprint,
        "images": len(index),
        "annotations": len(index.category_ids),
        "categories": len(index.categories),
        "problems": dict(index.problems),
    }


def check_labels(
    config: Config, opened: dict[str, DatasetIndex], is_official: Callable[[], bool], report: Report
) -> LabelMap | None:
    """The labels that training would use; None if they cannot be determined.

    Args:
        config: the configuration.
        opened: split -> index.
        is_official: whether the first weights use COCO's label space.
        report: findings are added to it.
    """
    if "train" not in opened:
        return None
    train, val = opened["train"], opened.get("val")
    try:
        record = within(TIMEOUT_S, lambda: read_record(config.run.name, config.run.storage))
        # May read the last checkpoint of the run from the storage.
        space = within(TIMEOUT_S, lambda: choose_label_space(config, train, is_official, record))
        label_map = label_map_for(space, train, val)
    except (DataError, ConfigError, CheckpointError, OSError) as error:
        report.add("error", LABELS, str(error))
        return None
    if config.data.label_space == "auto":
        space = f"{space} (auto)"
    used = len(label_map.categories)
    unused = label_map.num_classes - used
    report.add(
        "ok", LABELS,
        f"{label_map.num_classes} classes, {space}" + (f"; {unused} of them stand for no category" if unused else ""),
    )  # fmt: skip
    return label_map


def check_boxes(config: Config, opened: dict[str, DatasetIndex], report: Report) -> dict[str, BoxStatistics]:
    """Compares the numbers of boxes with the model's queries, and the classes of both splits with each other."""
    counted = {split: count_boxes(index) for split, index in opened.items()}
    for split, boxes in counted.items():
        _check_counts(config, split, boxes, report)
        names = dict(opened[split].categories)
        report.splits[split] |= {
            "boxes": int(boxes.per_image.sum()),
            "boxes_per_image": {
                "mean": round(float(boxes.per_image.mean()), 3),
                "p99": boxes.percentile(99),
                "max": boxes.most,
            },
            "images_without_boxes": boxes.num_empty_images,
            "boxes_per_category": [
                {"id": category_id, "name": names[category_id], "boxes": count}
                for category_id, count in boxes.per_category.items()
            ],
        }
    if "train" in counted:
        val = (opened["val"].categories, counted["val"]) if "val" in counted else None
        _check_classes(opened["train"].categories, counted["train"], val, report)
    return counted


def _check_counts(config: Config, split: str, boxes: BoxStatistics, report: Report) -> None:
    queries, detections, num_images = config.model.num_queries, config.eval.max_detections, len(boxes.per_image)
    report.add(
        "ok", LABELS,
        f"{split}: {boxes.per_image.mean():.1f} boxes an image, at most {boxes.percentile(99)} on 99 % of the images, "
        f"{boxes.most} on the fullest; {boxes.num_empty_images} images have none",
    )  # fmt: skip
    if not boxes.per_image.any():
        level: Level = "error" if split == "train" else "warning"
        report.add(level, LABELS, f"{split}: there is not one box to learn from or to find")
    elif boxes.num_empty_images > num_images // 2:
        report.add(
            "warning", LABELS,
            f"{split}: {boxes.num_empty_images} of {num_images} images have no box",
            "if they are only not annotated, take them out: training would teach that there is nothing on them",
        )  # fmt: skip
    if split == "train" and boxes.images_above(queries):
        report.add(
            "warning", LABELS,
            f"train: {boxes.images_above(queries)} of {num_images} images have more boxes than "
            f"model.num_queries={queries} (at most {boxes.most}): the model cannot learn them all",
            f"set model.num_queries to more than {boxes.most}",
        )  # fmt: skip
    if split == "val":
        key, limit = ("eval.max_detections", detections) if detections < queries else ("model.num_queries", queries)
        if boxes.images_above(limit):
            report.add(
                "warning", LABELS,
                f"val: {boxes.images_above(limit)} of {num_images} images have more boxes than {key}={limit} (at most "
                f"{boxes.most}): they cannot all be found",
                f"raise {key}",
            )  # fmt: skip


def _check_classes(
    categories: tuple[tuple[int, str], ...],
    train: BoxStatistics,
    val: tuple[tuple[tuple[int, str], ...], BoxStatistics] | None,
    report: Report,
) -> None:
    without = [name for category_id, name in categories if train.per_category[category_id] == 0]
    few = [
        f"{name}: {count}"
        for category_id, name in categories
        if 0 < (count := train.per_category[category_id]) < FEW_BOXES
    ]
    if val is not None:
        val_categories, val_boxes = val
        unlearnt = [
            f"{name}: {val_boxes.per_category[category_id]}"
            for category_id, name in val_categories
            if val_boxes.per_category[category_id] and not train.per_category.get(category_id)
        ]
        if unlearnt:
            report.add(
                "warning", LABELS,
                f"{len(unlearnt)} of {len(val_categories)} classes have boxes in val and none in train",
                "their AP will be 0, and it counts in the mean", unlearnt,
            )  # fmt: skip
    if without:
        report.add(
            "warning", LABELS, f"{len(without)} of {len(categories)} classes have no training box",
            "remove them from both annotation files if they are not wanted", without,
        )  # fmt: skip
    alike = _names_alike([name for _, name in categories])
    if alike:
        report.add(
            "warning", LABELS, f"{len(alike)} classes have names that differ from another's in blanks or case alone",
            "where the same is meant, write the name alike in all annotations: they are learnt as different classes",
            alike,
        )  # fmt: skip
    if few:
        report.add(
            "warning", LABELS, f"{len(few)} of {len(categories)} classes have fewer than {FEW_BOXES} training boxes",
            "expect nothing of them", few,
        )  # fmt: skip


def _names_alike(names: list[str]) -> list[str]:
    """Names that differ from another one in nothing but blanks and case."""
    forms = Counter(_plain(name) for name in dict.fromkeys(names))
    return [name for name in dict.fromkeys(names) if forms[_plain(name)] > 1]


def _plain(name: str) -> str:
    return "".join(name.split()).casefold()


def check_images(
    config: Config,
    split: str,
    index: DatasetIndex,
    decode: bool,
    report: Report,
    pace: Callable[[str], Progress],
) -> None:
    """Checks every image of a split, or as many as can be reached."""
    report.splits[split] |= {"images_seen": 0, "decoded": decode, "bad_images": []}
    try:
        missing = within(TIMEOUT_S, lambda: find_missing_storage(index))
    except (DataError, OSError) as error:
        report.add("error", IMAGES, f"{split}: the images' storage does not answer: {error}")
        return
    if missing and index.shards is None:
        report.add("error", IMAGES, f"{split}: {missing[-1]}", f"set {config.data.place_of(split)}")
        return
    if missing and index.shards is not None:
        report.add(
            "error", IMAGES,
            f"{split}: {len(missing)} of {len(index.shards.files)} shards cannot be used; their images are passed over",
            "copy them again from where they were written, or write them again", list(missing.values()),
        )  # fmt: skip
    started = time.perf_counter()
    progress = pace(f"{split}: {'decoded' if decode else 'read the headers of'}")
    seen = inspect_images(index, decode=decode, without_shards=frozenset(missing), progress=progress)
    _add_bad(config, split, index, seen, report)
    seconds = time.perf_counter() - started
    num_good = seen.num_seen - len(seen.bad)
    if num_good:
        report.add(
            "ok", IMAGES,
            f"{split}: {num_good} of {len(index)} images {'decode' if decode else 'have a readable header'} and have "
            f"the annotated size ({_listed(seen)}), in {duration(seconds)}",
        )  # fmt: skip
    if seen.turned_unseen:
        report.add(
            "warning", IMAGES,
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
        report.add("error", IMAGES, f"{split}: {seen.broken_off}", "check the storage first")
    if not seen.bad:
        return
    level: Level = "error"
    advice = "replace these files, or take their images out of the annotation file"
    if config.data.on_bad_image == "raise":
        advice += "; data.on_bad_image=skip " + (
            "trains without them" if split == "train" else "counts them as images without detections"
        )
    elif split == "train" and (count := len(seen.bad) + index.images_left_out) > config.data.max_bad_images:
        advice += f"; or set data.max_bad_images to {count}"
    else:
        level = "warning"
    names = [f"{bad.file}: {bad.reason}" for bad in seen.bad]
    cause = common_cause(seen.bad, len(index))
    if cause:
        advice = cause
    elif is_other_folder(seen.bad, len(index)):
        advice = f"none of the images is usable: is the folder right ({config.data.place_of(split)})?"
    message = f"{split}: {len(seen.bad)} of {len(index)} images cannot be used"
    report.add(level, IMAGES, message, advice, names)


def _listed(seen: Inspection) -> str:
    parts = [_counts(seen.formats), _counts(Counter({m: n for m, n in seen.modes.items() if m != "RGB"}))]
    if seen.num_turned:
        parts.append(f"{seen.num_turned} turned by EXIF")
    if seen.num_unreadable_exif:
        parts.append(f"{seen.num_unreadable_exif} with EXIF that can't be read, taken as stored")
    return "; ".join(part for part in parts if part)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())
