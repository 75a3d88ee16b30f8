"""Exports a model into a file that runs without this package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import PurePosixPath

from detr_ray.cli import refuse_idle_keys, run_command, say, usage
from detr_ray.config import Config, ConfigError

DESCRIPTION = """Export a model into a file that runs without this package. MODEL is a run's folder, a
checkpoint, models:/NAME@ALIAS, a published file or its URL.

--to onnx: batches of normalised images of any size with their padding mask, in ONNX. --to onnx-image: one plain image
of any size, in ONNX, with resizing, normalisation and pixel boxes inside. --to torch: as onnx, as an archive of
torch.export. --to published: the weights alone, under the names of the published files, for the code that these came
with. The file is kept only if it gives what the model gives, which is tried at two batch sizes and shapes."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = usage("MODEL --to FORMAT --out FILE")
    parser.add_argument("source", metavar="MODEL", nargs="?", help="the model; see above")
    parser.add_argument("--to", metavar="FORMAT", help="onnx, onnx-image, torch or published")
    parser.add_argument("--out", metavar="FILE", help="the file to write; a path or URI")


def _export(config: Config, arguments: argparse.Namespace) -> int:
    if not arguments.source:
        raise ConfigError("MODEL is missing: python -m detr_ray.export MODEL --to FORMAT --out FILE")
    if not arguments.out:
        raise ConfigError("--out: is missing; name the file to write")

    from detr_ray.addresses import name_of
    from detr_ray.engine.preflight.writing import check_outputs, write_output
    from detr_ray.exporting import FORMATS, ExportError, export
    from detr_ray.exporting.onnx_file import check_packages
    from detr_ray.exporting.source import ExportSource
    from detr_ray.retries import reason_of

    if arguments.to not in FORMATS:
        given = "is missing" if arguments.to is None else f"{arguments.to!r} is no format"
        raise ConfigError(f"--to: {given}; one of {', '.join(FORMATS)}")
    kind = FORMATS[arguments.to]
    ending = PurePosixPath(name_of(arguments.out)).suffix
    if ending not in ("", kind.suffix):
        raise ConfigError(f"--out: {arguments.out} ends in {ending}; files of --to {arguments.to} end in {kind.suffix}")
    if kind.needs_onnx:
        check_packages(f"--to {arguments.to}")
    check_outputs({"--out": arguments.out})

    from detr_ray.model_sources import load_model

    model = load_model(arguments.source, config, say=say)
    refuse_idle_keys(arguments, model.config is config)
    source = ExportSource.of(model)
    written = 0

    def keep(content: bytes) -> None:
        nonlocal written
        try:
            write_output(arguments.out, content)
        except OSError as error:
            raise ExportError(f"--out: {arguments.out} could not be written: {reason_of(error)}") from error
        written = len(content)

    agreement = export(source, arguments.to, keep)
    say(
        f"agrees with the model: differs by {agreement.difference:.1e} at most, of a probability or of a box in 0..1 "
        f"(kept up to {agreement.tolerance:g}); tried {agreement.tried}"
    )
    say(f"wrote {arguments.out}, {written / 1e6:.1f} MB")
    say(f"to use it: {kind.usage}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m detr_ray.export``."""
    return run_command("export", DESCRIPTION, _export, argv, add_arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
