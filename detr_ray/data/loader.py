"""From planned samples to a padded batch: read, decode, augment, pad. Plain functions of the plan, without Ray.

Also turns a batch into an Arrow table of one row and back without copying the pixels, because tables are what data
pipelines move between processes. Knows nothing of the order of batches, of workers or of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import pyarrow as pa

from detr_ray.data.decoding import decode_image, reduction
from detr_ray.data.image_headers import ImageError
from detr_ray.data.images import ImageReader
from detr_ray.data.index import DatasetIndex
from detr_ray.data.label_map import LabelMap
from detr_ray.data.sample import Instances, Picture, SamplePlan
from detr_ray.structures import PaddedBatch

# The columns of a table, without the pixels and the messages about bad images: type of the elements, and shape of the
# entry of one image or box.
_COLUMNS: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
    "sizes": (np.int32, (2,)),
    "orig_sizes": (np.int32, (2,)),
    "image_ids": (np.int64, ()),
    "positions": (np.int64, ()),
    "labels": (np.int64, ()),
    "boxes_cxcywh": (np.float32, (4,)),
    "counts": (np.int64, ()),
    "bad_image_ids": (np.int64, ()),
}


def padded_size(samples: Sequence[SamplePlan], multiple: int) -> tuple[int, int]:
    """Height and width of the batch of some samples: those of the largest, rounded up to a multiple of some pixels."""
    height, width = (-(-max(sample.size[side] for sample in samples) // multiple) * multiple for side in (0, 1))
    return height, width


class BatchLoader:
    """Makes padded batches of planned samples.

    Args:
        index: the data set's images and boxes.
        label_map: turns its category ids into labels; has to know all of them.
        reader: reads its images; the index's own by default.
        reduce: large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size if that is still at least this many times the
            wanted size; None: never.
        pad_multiple: batches are as high and wide as a multiple of so many pixels.
    """

    def __init__(
        self,
        index: DatasetIndex,
        label_map: LabelMap,
        reader: ImageReader | None = None,
        reduce: float | None = None,
        pad_multiple: int = 1,
    ) -> None:
        self.index = index
        self.label_map = label_map
        self.reduce = reduce
        self.pad_multiple = pad_multiple
        self.reader = ImageReader(index) if reader is None else reader

    def load(self, samples: Sequence[SamplePlan]) -> PaddedBatch:
        """Reads, decodes, augments and pads the samples of one micro-batch, in their order.

        A sample becomes a black image of the planned size without boxes if one of its images cannot be used. Each image
        that cannot be used gets a line in ``bad_images``, under its own id.

        Raises:
            ValueError: no samples.
            DataError: the storage failed, or an annotation's category is not in the label map.
        """
        return self._assemble(samples, self._begin(samples))

    def load_each(self, batches: Iterable[Sequence[SamplePlan]]) -> Iterator[PaddedBatch]:
        """Loads micro-batches one after the other, as `load` does; what is remote is read one batch ahead.

        So a batch is fetched while the previous one is decoded, and at most two are in memory.
        """
        ahead: tuple[Sequence[SamplePlan], list[Callable[[], bytes]]] | None = None
        for samples in batches:
            begun = samples, self._begin(samples)
            if ahead is not None:
                yield self._assemble(*ahead)
            ahead = begun
        if ahead is not None:
            yield self._assemble(*ahead)

    def _begin(self, samples: Sequence[SamplePlan]) -> list[Callable[[], bytes]]:
        if not samples:
            raise ValueError("a batch is made of at least one sample")
        return self.reader.read_many([image for sample in samples for image in sample.images])

    def _assemble(self, samples: Sequence[SamplePlan], reads: Sequence[Callable[[], bytes]]) -> PaddedBatch:
        """The batch of the samples whose images are being read."""
        height, width = padded_size(samples, self.pad_multiple)
        # Channels last, as decoders leave pixels and as convolutions take them: rows are copied whole.
        pixels = np.empty((len(samples), height, width, 3), np.uint8)
        loaded: list[Instances] = []
        bad_images: list[str] = []
        bad_image_ids: list[int] = []
        pending = iter(reads)
        for padded, sample in zip(pixels, samples, strict=True):
            own_reads = iter(list(islice(pending, len(sample.images))))
            height, width = sample.size
            bad: dict[int, str] = {}
            picture = self._load(sample, own_reads, bad)
            if picture is None:
                bad_images += bad.values()
                bad_image_ids += bad
                padded.fill(0)
                loaded.append(Instances(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), sample.size))
                continue
            padded[:height, :width] = picture.pixels.numpy()
            padded[:height, width:] = 0
            padded[height:] = 0
            loaded.append(picture.instances)
        return PaddedBatch(
            images=pixels.transpose(0, 3, 1, 2),
            sizes=np.array([sample.size for sample in samples], np.int32),
            orig_sizes=np.array([self._stored_size(sample.index) for sample in samples], np.int32),
            image_ids=np.array([sample.image_id for sample in samples], np.int64),
            positions=np.array([sample.position for sample in samples], np.int64),
            labels=np.concatenate([instances.labels for instances in loaded]),
            boxes_cxcywh=np.concatenate([instances.boxes_cxcywh() for instances in loaded]),
            counts=np.array([len(instances.labels) for instances in loaded], np.int64),
            bad_images=bad_images,
            bad_image_ids=np.array(bad_image_ids, np.int64),
        )

    def _stored_size(self, i: int) -> tuple[int, int]:
        return int(self.index.heights[i]), int(self.index.widths[i])

    def _load(self, sample: SamplePlan, reads: Iterator[Callable[[], bytes]], bad: dict[int, str]) -> Picture | None:
        """The picture of a sample, made from its image and those of its partners.

        Args:
            sample: the plan.
            reads: functions that give the bytes of its images, in order; all of them are called.
            bad: gets the images that cannot be used: what is wrong, by image id.

        Returns:
            The picture; None if any of its images cannot be used.
        """
        stored = self._stored_size(sample.index)
        reduced = 1 if self.reduce is None else reduction(stored, sample.first_size(stored), self.reduce)
        pixels = None
        try:
            pixels = decode_image(next(reads)(), self.reader.name(sample.index), stored, reduced)
        except ImageError as error:
            bad[sample.image_id] = str(error)
        partners = [self._load(partner, reads, bad) for partner in sample.partners]
        usable = [partner for partner in partners if partner is not None]
        if pixels is None or len(usable) < len(partners):
            return None
        instances = self.index.training_instances(sample.index, self.label_map)
        return sample.apply(Picture(pixels.permute(1, 2, 0), instances), usable)


def to_table(batch: PaddedBatch) -> pa.Table:
    """A table of one row that holds the batch: ``images`` as one binary value, the rest as flat lists.

    The bytes of the pixels have the order BHWC. They are not copied if they have this order in memory already, as those
    of `BatchLoader` do.
    """
    images = np.ascontiguousarray(batch.images.transpose(0, 2, 3, 1))
    buffer = pa.py_buffer(images.reshape(-1))
    offsets = pa.py_buffer(np.array([0, images.nbytes], np.int64))
    columns: dict[str, pa.Array] = {
        "images": pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, buffer]),
        "images_shape": _one_list(np.array(images.shape, np.int64)),
    }
    for name, (dtype, _) in _COLUMNS.items():
        columns[name] = _one_list(np.ascontiguousarray(getattr(batch, name), dtype).reshape(-1))
    columns["bad_images"] = pa.array([batch.bad_images], pa.list_(pa.string()))
    return pa.table(columns)


def from_table(table: pa.Table) -> PaddedBatch:
    """The batch that a table of one row holds.

    Returns:
        A batch whose arrays are views of the table's memory: nothing is copied, and they must not be written to.
    """
    if table.num_rows != 1:
        raise ValueError(f"a batch is a table of one row, got one of {table.num_rows}")
    row = {name: next(chunk for chunk in table[name].chunks if len(chunk)) for name in table.column_names}
    arrays = {
        name: row[name][0].values.to_numpy(zero_copy_only=True).reshape(-1, *shape)
        for name, (_, shape) in _COLUMNS.items()
    }
    return PaddedBatch(
        images=_bytes_of(row["images"]).reshape(row["images_shape"][0].as_py()).transpose(0, 3, 1, 2),
        bad_images=row["bad_images"][0].as_py(),
        **arrays,
    )


def _bytes_of(column: pa.LargeBinaryArray) -> np.ndarray:
    """The first value of a binary column as uint8, without a copy (converting it to a scalar would copy it)."""
    _, offsets, data = column.buffers()
    start, end = np.frombuffer(offsets, np.int64)[column.offset : column.offset + 2]
    return np.frombuffer(data, np.uint8, count=end - start, offset=start)


def _one_list(values: np.ndarray) -> pa.Array:
    """A list column of one row."""
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), pa.array(values))
