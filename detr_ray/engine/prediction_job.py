"""Prepares a prediction from a configuration and the names of images, and writes the parts of its results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

from detr_ray.callbacks import Say
from detr_ray.config import Config, ConfigError, flatten
from detr_ray.data.errors import DataError
from detr_ray.data.formats.bare_images import open_bare_images
from detr_ray.engine.reporting.progress import Pace
from detr_ray.engine.stream.batches import load_ahead
from detr_ray.engine.stream.planned_data import refuse_positions_out_of_reach
from detr_ray.engine.validation.evaluation_job import evaluation_config
from detr_ray.prediction import LoadedModel
from detr_ray.prediction.job import BatchFindings, BatchPredictor, PredictionJob
from detr_ray.prediction.results import ResultFolder
from detr_ray.prediction.thresholds import Threshold, label_thresholds

_PREFETCH = 2
_WHERE_TRAINING_BEGINS = ("init_from", "backbone_weights")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a user wants predicted.

    Attributes:
        images: see `open_bare_images`.
        root: see `open_bare_images`.
        threshold: lowest score that is kept.
        top_k: most objects an image; None for ``eval.max_detections``.
        part_images: images of a part.
    """

    images: Sequence[str]
    root: str | None
    threshold: Threshold
    top_k: int | None
    part_images: int


def prepare_prediction(model: LoadedModel, given: Config, wanted: Wanted, say: Say) -> PredictionJob:
    """Finds the images and plans their batches.

    Sizes, precision and numbers of detections that are not given are those that the model was evaluated with.

    Args:
        model: the model.
        given: the user's configuration.
        wanted: what is to be predicted.
        say: shows the user a line.

    Raises:
        ConfigError: given and stored values contradict each other, another model is described than this one, or the
            images are too large for it.
        DataError: there are no images.
        ThresholdError: the threshold is not valid.
    """
    _refuse_other_model(given, model)
    settings, lines = evaluation_config(given, model.config, model.source, with_data=False)
    for line in lines:
        say(line.replace("scored with", "predicting with", 1))
    config = model.config.model_copy(update={"eval": settings.eval, "train": settings.train, "data": settings.data})
    label_thresholds(wanted.threshold, model.label_map, model.facts.scores, model.source)
    found = open_bare_images(wanted.images, wanted.root, given.data.follow_links, Pace("read the sizes of", say))
    for line in found.unreadable:
        say(f"WARNING: image left out: {line}")
    if not len(found.index):
        raise DataError(f"none of the {len(found.unreadable)} images can be read: {found.unreadable[0]}")
    refuse_positions_out_of_reach(config, config.model, None, found.index)
    top_k = settings.eval.max_detections if wanted.top_k is None else wanted.top_k
    return PredictionJob(
        index=found.index,
        saved=dataclasses.replace(model.saved, config=config),
        facts=model.facts,
        threshold=wanted.threshold,
        top_k=top_k,
        part_images=wanted.part_images,
        unreadable=found.unreadable,
    )


def _refuse_other_model(given: Config, model: LoadedModel) -> None:
    """Refuses values of the section ``model`` that are not the model's: they would change nothing."""
    if model.config is given:  # weights of another program, which the configuration describes
        return
    theirs, source = flatten(model.config), model.source
    for key, value in flatten(given).items():
        section, _, name = key.partition(".")
        if section != "model" or name not in given.model.model_fields_set or name in _WHERE_TRAINING_BEGINS:
            continue
        if value != theirs[key]:
            raise ConfigError(f"{key}={value}: changes nothing: {source} was trained with {key}={theirs[key]}")


def predict_here(
    job: PredictionJob, model: LoadedModel, numbers: Iterable[int], device: str | None
) -> Iterator[BatchFindings]:
    """Finds objects on batches of a job in this process; a thread makes the next batches meanwhile.

    Args:
        job: the job.
        model: its model.
        numbers: of its batches.
        device: where to work; None for the GPU, if there is one.
    """
    predict = BatchPredictor(job, device, model)
    for batch in load_ahead(job.loader().load, [job.batches[number] for number in numbers], _PREFETCH):
        yield predict(batch)


def write_parts(
    job: PredictionJob,
    folder: ResultFolder,
    parts: Sequence[int],
    predict: Callable[[Sequence[int]], Iterable[BatchFindings]],
    say: Say,
) -> None:
    """Computes parts of a job and writes each as soon as it is complete.

    Args:
        job: the job.
        folder: takes the parts.
        parts: numbers of those that are still to be done.
        predict: gives what was found on batches, from their numbers, in their order.
        say: shows the user a line: progress, and images that cannot be read.

    Raises:
        OSError: a part could not be written.
    """
    numbers = [number for part in parts for number in job.parts[part]]
    total, done = sum(len(job.batches[number]) for number in numbers), 0
    pace = Pace("predicted", say)
    found = iter(predict(numbers))
    for part in parts:
        findings = []
        for number in job.parts[part]:
            findings.append(next(found))
            for line in findings[-1].bad_images.values():
                say(f"WARNING: image left out: {line}")
            done += len(job.batches[number])
            pace(done, total)
        folder.write_part(part, findings)
