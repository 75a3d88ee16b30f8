"""Serves a model over HTTP with Ray Serve."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from detr_ray.cli import count, refuse_idle_keys, run_command, say, usage
from detr_ray.config import Config, ConfigError

DESCRIPTION = """Serve a model over HTTP with Ray Serve, until Ctrl-C. MODEL is a run's folder, a checkpoint,
models:/NAME@ALIAS, a published file or its URL.

GET / is a page to drop an image on, GET /health says that it runs, POST /predict takes an image file, or JSON:
{"image": "<base64>" or ["<base64>", ...], "threshold": 0.5, "top_k": 10}. Images of several requests go through the
model as one batch. Replicas run on the cluster that RAY_ADDRESS names, or on this machine; with a GPU each, where there
are as many."""

_PACKAGES = ("starlette", "uvicorn", "aiohttp", "grpc_reflection")
"""What Ray Serve needs beside Ray."""


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 65535 (got {text})")
    return int(text)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = usage("MODEL")
    parser.add_argument("source", metavar="MODEL", nargs="?", help="the model; see above")
    parser.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)"
    )
    parser.add_argument("--port", metavar="N", type=_port, default=8000, help="port to listen on (default 8000)")
    parser.add_argument("--replicas", metavar="N", type=count, default=1, help="processes with the model (default 1)")
    parser.add_argument(
        "--max-replicas", metavar="N", type=count, help="start up to so many while requests wait (default: --replicas)"
    )
    parser.add_argument(
        "--cpus-per-replica", metavar="N", type=count, default=1, help="cores of each replica (default 1)"
    )
    parser.add_argument(
        "--max-batch", metavar="N", type=count, default=8,
        help="images that go through the model at once; 1 for no batching (default 8)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-wait-ms", metavar="MS", type=count, default=10,
        help="how long an image waits for others to share its batch (default 10)",
    )  # fmt: skip
    parser.add_argument(
        "--max-request-mb", metavar="MB", type=count, default=32, help="longest request that is taken (default 32)"
    )
    parser.add_argument(
        "--max-megapixels",
        metavar="N",
        type=count,
        default=50,
        help="largest image that is taken (default 50); those of a request together may have four times as many",
    )


def _serve(config: Config, arguments: argparse.Namespace) -> int:
    if not arguments.source:
        raise ConfigError("MODEL is missing: python -m detr_ray.serve MODEL")
    most = arguments.max_replicas or arguments.replicas
    if most < arguments.replicas:
        raise ConfigError(f"--max-replicas: {most} is less than --replicas ({arguments.replicas})")
    _check_packages()

    from detr_ray.prediction.requests import Limits
    from detr_ray.runtime.cluster_address import cluster_address
    from detr_ray.runtime.cores import usable_cores
    from detr_ray.runtime.serving.loading import loader
    from detr_ray.runtime.serving.settings import (
        Batching,
        ServiceSettings,
        refuse_more_cores,
        refuse_taken_port,
    )

    settings = ServiceSettings(
        host=arguments.host,
        port=arguments.port,
        replicas=arguments.replicas,
        max_replicas=most,
        cpus=arguments.cpus_per_replica,
        batching=Batching(arguments.max_batch, arguments.batch_wait_ms / 1000),
        limits=Limits(arguments.max_request_mb << 20, arguments.max_megapixels * 1_000_000),
    )
    refuse_taken_port(settings.host, settings.port)
    if cluster_address() is None:
        refuse_more_cores(settings, usable_cores())
    # Loaded here, too, so that a model that cannot be had is refused in seconds.
    load = loader(arguments.source, config)
    model = load()
    refuse_idle_keys(arguments, model.config is config)
    say(f"{model.source}: {len(model.label_map.categories)} categories")

    from detr_ray.runtime.serving.service import run_service

    run_service(load, settings, say)
    return 0


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"serve: needs {', '.join(missing)}: pip install 'detr_ray[serve]'")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m detr_ray.serve``."""
    return run_command("serve", DESCRIPTION, _serve, argv, add_arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
