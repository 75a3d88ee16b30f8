"""How often an epoch takes each image, so that rare classes, and images without objects, have their share.

Works on whole columns; knows nothing of plans, pixels or labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detr_ray.data.errors import DataError
from detr_ray.data.index import DatasetIndex
from detr_ray.data.statistics import learnt_boxes


@dataclass(frozen=True, slots=True)
class Balance:
    """How often images are repeated.

    Attributes:
        repeat_threshold: images of a class that is on a smaller share of the images are repeated (`repeat_factors`);
            0: none are.
        background: share of an epoch's samples that have no box; None: as in the data set.
        source_weights: of a merged data set: how often an epoch takes the images of each source, before the other two
            settings are applied; empty: once.
    """

    repeat_threshold: float = 0.0
    background: float | None = None
    source_weights: tuple[float, ...] = ()

    def repeats(self, index: DatasetIndex) -> np.ndarray | None:
        """How often an epoch takes each image on average, ``[I]`` float64; None: each once.

        Raises:
            DataError: ``background`` asks for images with boxes, or without, and there are none.
        """
        is_weighted = any(weight != 1 for weight in self.source_weights)
        if not self.repeat_threshold and self.background is None and not is_weighted:
            return None
        repeats = repeat_factors(index, self.repeat_threshold)
        if is_weighted and index.sources is not None:
            repeats *= np.array(self.source_weights)[index.sources.of]
        if self.background is None:
            return repeats
        image_of, _ = learnt_boxes(index)
        is_background = np.bincount(image_of, minlength=len(index)) == 0
        if not is_background.any() and self.background > 0:
            raise DataError(
                f"{index.source}: data.balance.background={self.background:g} is a share of samples without boxes, and "
                "every image has some; set it to null"
            )
        objects = float(repeats[~is_background].sum())
        if is_background.any():
            wanted = objects * self.background / (1 - self.background)
            repeats[is_background] *= wanted / float(repeats[is_background].sum())
        return repeats


def repeat_factors(index: DatasetIndex, threshold: float) -> np.ndarray:
    """Repeat factors of images (Gupta, Dollár and Girshick 2019: LVIS).

    A class that is on the share ``f`` of the images has the factor ``max(1, sqrt(threshold / f))``, an image the
    largest factor of its classes, and 1 where it has none.

    Args:
        index: the training set.
        threshold: share of the images, 0..1.

    Returns:
        ``[I]`` float64, at least 1.
    """
    image_of, category_ids = learnt_boxes(index)
    factors = np.ones(len(index))
    if len(image_of):
        classes, class_of = np.unique(category_ids, return_inverse=True)
        pairs = np.unique(np.stack([class_of, image_of]), axis=1)
        shares = np.bincount(pairs[0], minlength=len(classes)) / len(index)
        np.maximum.at(factors, pairs[1], np.sqrt(threshold / shares)[pairs[0]])
    return factors


@dataclass(frozen=True, slots=True)
class Takings:
    """How many images and samples have a class.

    Attributes:
        name: of the class.
        images: number of images with the class.
        samples: number of an epoch's samples with the class, on average.
    """

    name: str
    images: int
    samples: float

    @property
    def factor(self) -> float:
        """How often an image with the class is taken, on average."""
        return self.samples / self.images


def takings(index: DatasetIndex, repeats: np.ndarray) -> list[Takings]:
    """`Takings` of each class that has a box to learn, the most repeated class first.

    Args:
        index: the training set.
        repeats: ``[I]``, see `Balance.repeats`.
    """
    image_of, category_ids = learnt_boxes(index)
    found = []
    for category_id, name in index.categories:
        rows = np.unique(image_of[category_ids == category_id])
        if len(rows):
            found.append(Takings(name, len(rows), float(repeats[rows].sum())))
    return sorted(found, key=lambda taken: (-taken.factor, taken.name))
