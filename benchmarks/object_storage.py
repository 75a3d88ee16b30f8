"""What reading from object storage costs: the same planned batches from a folder, from S3 images and from S3 shards.

    python -m benchmarks.object_storage

Reads, decodes, augments and pads the batches of one epoch in this process, as one data task does, in turns. The S3
server is a real one, of Python, on this machine: it takes a share of the same cores, and answers after a pause that
stands for the distance to a bucket. Only the ratios between the rows mean something.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from detr_ray.data.formats import open_split
from detr_ray.data.formats.shards import read_shard_index
from detr_ray.data.images import ImageReader
from detr_ray.data.index import DatasetIndex
from detr_ray.data.label_map import LabelMap
from detr_ray.data.loader import BatchLoader
from detr_ray.data.packing import write_shards
from detr_ray.data.planner import Planner
from tests.defaults import draw_shapes, size_policy
from tests.s3_server import S3Server

AUGMENT = size_policy(scales=(224, 256, 288), max_size=480, crop_scales=(200, 224), crop_min=160, crop_max=224)


class OneByOne(ImageReader):
    """Reads an image when it is asked for, and none before."""

    def read_many(self, images: Sequence[int]) -> list[Callable[[], bytes]]:
        """See `ImageReader.read_many`."""
        return [functools.partial(self.read, i) for i in images]


def images_per_second(index: DatasetIndex, batch_size: int, reader: type[ImageReader] = ImageReader) -> float:
    """One epoch of planned batches; a new reader each time, as a new process would have."""
    planner = Planner(
        index.heights, index.widths, index.image_ids, seed=0, global_batch_size=batch_size, size_policy=AUGMENT
    )
    loader = BatchLoader(index, LabelMap.contiguous(index.categories), reader(index))
    started = time.perf_counter()
    for _ in loader.load_each(planner.global_batch(step) for step in range(planner.steps_per_epoch)):
        pass
    return planner.steps_per_epoch * batch_size / (time.perf_counter() - started)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--latency-ms", type=float, default=10.0, help="pause before each answer of the server")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, S3Server() as server:
        os.environ.update(server.environment)
        root = Path(scratch) / "set"
        draw_shapes(root, num_train=arguments.images, num_val=1, seed=0, image_size=(256, 384))
        local = open_split(str(root), None, "train")
        bucket = server.new_bucket()
        uri = server.upload(root, f"{bucket}/set")
        write_shards(local, f"s3://{bucket}/shards", shard_megabytes=1)
        in_bucket, in_shards = open_split(uri, None, "train"), read_shard_index(f"s3://{bucket}/shards")
        kinds: dict[str, tuple[DatasetIndex, type[ImageReader]]] = {
            "local folder": (local, ImageReader),
            "S3 images, one by one": (in_bucket, OneByOne),
            "S3 images": (in_bucket, ImageReader),
            "S3 shards": (in_shards, ImageReader),
        }
        server.set_faults(latency_s=arguments.latency_ms / 1000)
        rates: dict[str, list[float]] = {name: [] for name in kinds}
        requests = {}
        for _ in range(arguments.rounds):
            for name, (index, reader) in kinds.items():
                server.forget()
                rates[name].append(images_per_second(index, arguments.batch_size, reader))
                requests[name] = sum(server.counts().values()) / len(index)
        print(
            f"{arguments.images} images, batches of {arguments.batch_size}, {arguments.latency_ms:g} ms an answer, ",
            end="",
        )
        print(f"{os.cpu_count()} cores shared with the server, median of {arguments.rounds}\n")
        print(f"{'':24}{'images/s':>10}{'of local':>10}{'requests an image':>20}")
        base = statistics.median(rates["local folder"])
        for name, values in rates.items():
            rate = statistics.median(values)
            print(f"{name:24}{rate:>10.0f}{rate / base:>10.2f}{requests[name]:>20.2f}")


if __name__ == "__main__":
    main()
