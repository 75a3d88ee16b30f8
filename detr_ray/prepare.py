"""Writes generated data, and writes data sets in other formats, shards among them."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from detr_ray.cli import run_command, say
from detr_ray.config import Config, ConfigError
from detr_ray.printable import counted

if TYPE_CHECKING:
    from detr_ray.data.index import DatasetIndex

DESCRIPTION = """Draw the generated data set that data.generate describes, if it does not exist yet.

With --shards, pack the training and the validation set into Parquet shards: a few large files with images and
annotations instead of very many small ones. Training from shards gives the same results as training from the images,
and reads faster from object storage.

With --to FORMAT --out FOLDER, write the data set in another format: coco, yolo or shards. Images are copied byte for
byte; ids, names and boxes stay what they are."""

SHARD_MEGABYTES = 256


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shards", metavar="FOLDER", help="pack the splits into FOLDER/train and FOLDER/val; a path or URI"
    )
    parser.add_argument("--to", metavar="FORMAT", help="write the splits in this format: coco, yolo or shards")
    parser.add_argument("--out", metavar="FOLDER", help="the folder that --to writes; for shards a path or URI")
    parser.add_argument(
        "--shard-megabytes", metavar="MB", type=int, default=SHARD_MEGABYTES,
        help=f"start a new shard when the images of one reach this size (default {SHARD_MEGABYTES})",
    )  # fmt: skip


def _prepare(config: Config, arguments: argparse.Namespace) -> int:
    from detr_ray.addresses import check_address, resolve
    from detr_ray.engine.opened_data import open_data

    if arguments.shard_megabytes < 1:
        raise ConfigError(f"--shard-megabytes: must be at least 1 (got {arguments.shard_megabytes})")
    shards, converted = _targets(arguments)
    folder = shards or converted
    if folder is not None:
        check_address(folder)
        folder = resolve(folder)
    if config.data.generate is None and folder is None:
        say("nothing to do: data.generate is not set, and neither --shards nor --to is given")
        return 0
    if config.data.generate is not None:
        _generate(config)
    train, val = open_data(config.data, say)
    if folder is not None:
        indexes = {"train": train} if val is None else {"train": train, "val": val}
        if converted is None:
            _pack(indexes, folder, arguments.shard_megabytes)
        else:
            _convert(indexes, folder, arguments.to)
        if any(source.weight != 1 for source in config.data.sources):
            say("the weights of data.sources are not written: an epoch takes each image once")
        say(f"\nto train from the {'shards' if converted is None else 'folder'}:")
        say(f"  {train_command(config, arguments.config, folder, is_root=converted is not None)}")
    return 0


def _targets(arguments: argparse.Namespace) -> tuple[str | None, str | None]:
    """The folder for shards, and the folder for another format."""
    from detr_ray.data.formats.conversion import SHARDS, WRITTEN

    if (arguments.to is None) != (arguments.out is None):
        missing, given = ("--out FOLDER", "--to") if arguments.out is None else ("--to FORMAT", "--out")
        raise ConfigError(f"{given}: needs {missing}")
    if arguments.to is None:
        return arguments.shards, None
    if arguments.shards is not None:
        raise ConfigError("--shards: is the same as --to shards --out FOLDER: give one of them")
    if arguments.to not in WRITTEN:
        raise ConfigError(f"--to: {arguments.to!r} cannot be written; one of {', '.join(WRITTEN)}")
    return (arguments.out, None) if arguments.to == SHARDS else (None, arguments.out)


def _convert(indexes: dict[str, DatasetIndex], folder: str, name: str) -> None:
    """Writes the splits in another format."""
    from detr_ray.data.formats.conversion import convert
    from detr_ray.engine.reporting.progress import Pace

    paces = {split: Pace(f"{split}: wrote", say) for split in indexes}

    def progress(split: str, done: int, total: int, num_bytes: int) -> None:
        paces[split](done, total, f"{num_bytes / 1e6:.0f} MB")

    num_bytes = convert(indexes, folder, name, progress)
    count = sum(map(len, indexes.values()))
    say(f"wrote {count} images, {num_bytes / 1e6:.1f} MB, and their annotations: {folder}")
    if "val" not in indexes:
        say("there are no validation images: hold some out by data.split={val: 0.1}")


def _generate(config: Config) -> None:
    """Draws the generated data set, if it does not exist yet."""
    from detr_ray.data.errors import DataError
    from detr_ray.data.generated import MARKER
    from detr_ray.engine.opened_data import draw, generated_root
    from detr_ray.engine.reporting.progress import Pace, duration

    data = config.data
    assert data.generate is not None
    root = generated_root(data)
    was_there = (root / MARKER).is_file()
    started = time.perf_counter()
    try:
        draw(data, Pace("drew", say))
    except OSError as error:
        raise DataError(f"data.root: {root} cannot be written: {error}") from error
    if was_there:
        say(f"nothing to draw: {root} holds the generated data set already")
    else:
        count = data.generate.num_train + data.generate.num_val
        say(f"drew {count} images into {root} in {duration(time.perf_counter() - started)}")


def _pack(indexes: dict[str, DatasetIndex], folder: str, shard_megabytes: int) -> None:
    """Packs the splits that are not packed yet into shards."""
    from detr_ray.addresses import join
    from detr_ray.data.errors import DataError
    from detr_ray.data.packing import unpacked_splits, write_shards
    from detr_ray.engine.reporting.progress import Pace
    from detr_ray.retries import reason_of

    try:
        to_do = unpacked_splits(indexes, folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be used: {reason_of(error)}") from error
    for split, index in indexes.items():
        place = join(folder, split)
        if split not in to_do:
            say(f"{split}: nothing to do: {place} holds these {len(index)} images already")
            continue
        started = time.perf_counter()
        pace = Pace(f"{split}: packed", say)

        def progress(done: int, total: int, num_bytes: int, pace: Pace = pace) -> None:
            pace(done, total, f"{num_bytes / 1e6:.0f} MB")

        num_bytes, num_shards = write_shards(index, place, shard_megabytes=shard_megabytes, progress=progress)
        rate = len(index) / (time.perf_counter() - started)
        shards = counted(num_shards, "shard")
        size = f"{num_bytes / 1e6:.1f} MB"
        say(f"{split}: packed {len(index)} images, {size}, into {shards}, {rate:.0f} images/s: {place}")


def train_command(config: Config, config_files: Sequence[str], folder: str, is_root: bool = False) -> str:
    """The command that trains from what was written.

    Args:
        config: the configuration that it was made from.
        config_files: its files. Keys that were given on the command line are not repeated.
        folder: contains the folders ``train`` and ``val`` with the shards.
        is_root: whether it is a data set in another format instead.
    """
    from detr_ray.addresses import join

    data = config.data
    places = {name: getattr(data, name) for name in ("root", "format", "split", "generate", "train", "val")}
    # A split has one source, so all other sources are set to null.
    overrides = [f"data.{name}=null" for name, value in places.items() if value is not None]
    if data.sources:
        overrides.append("data.sources=[]")
    if is_root:
        overrides = [override for override in overrides if not override.startswith("data.root=")]
        overrides.append(f"data.root={folder}")
    else:
        overrides.append(f"data.train.shards={join(folder, 'train')}")
        if data.has_val:
            overrides.append(f"data.val.shards={join(folder, 'val')}")
    files = [part for name in config_files for part in ("--config", name)]
    return shlex.join(["python", "-m", "detr_ray.train", *files, *overrides])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m detr_ray.prepare``."""
    return run_command("prepare", DESCRIPTION, _prepare, argv, add_arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
