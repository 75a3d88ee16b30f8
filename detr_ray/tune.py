"""Searches settings: many trainings, of which each is a trial."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from detr_ray.cli import EXIT_FAILED, EXIT_INTERRUPTED, run_command, say
from detr_ray.config import Config, ConfigError
from detr_ray.progress_bar import ProgressBar

DESCRIPTION = """Search settings: `tune.space` says which, and each trial is a whole training.

Recipes are in configs/tune/. A search that was interrupted goes on with --resume and tune.name=NAME: trials that are
over are not run again, the others go on from their last checkpoints. --confirm N trains the best configuration and the
unchanged one with N seeds each, and says whether the difference is more than noise."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="go on with the existing search tune.name")
    parser.add_argument(
        "--confirm", metavar="N", type=int, default=0,
        help="after the search, train the best and the unchanged configuration with N other seeds each",
    )  # fmt: skip


def _check(config: Config) -> None:
    config.check_training()
    if not config.tune.space:
        raise ConfigError(
            "tune.space: is empty: give what to search, as in tune.space={optim.lr: {loguniform: [1e-5, 1e-3]}}, or "
            "begin with a recipe of configs/tune/"
        )


def _check_seeds(seeds: int) -> None:
    """Refuses numbers of seeds that cannot be compared, and says at once if they are too few to tell anything."""
    if seeds == 0:
        return
    from detr_ray.search.confirmation import MOST_SEEDS, reservation

    if seeds < 0 or seeds == 1:
        raise ConfigError(f"--confirm: must be 2 or more seeds, not {seeds}: one has no spread")
    if seeds > MOST_SEEDS:
        raise ConfigError(f"--confirm: must be at most {MOST_SEEDS} seeds, not {seeds}")
    if problem := reservation(seeds):
        say(f"WARNING: --confirm {seeds} cannot tell a difference from noise: {problem}")


def _tune(config: Config, arguments: argparse.Namespace) -> int:
    _check_seeds(arguments.confirm)
    from detr_ray.runtime.search.results import summary
    from detr_ray.runtime.search.search import run_search

    with ProgressBar("trial") as bar:
        bar.begin(config.tune.trials)
        result = run_search(config, bar.say, resume=arguments.resume, on_progress=bar.update)
    say(summary(result, arguments.config, arguments.overrides))
    if result.status == "stopped":
        return EXIT_INTERRUPTED
    if result.best is None:
        return EXIT_FAILED
    if arguments.confirm:
        from detr_ray.runtime.search.confirm import Stopped, confirm

        try:
            with ProgressBar("training") as bar:
                bar.begin(2 * arguments.confirm)
                found = confirm(config, result, arguments.confirm, bar.say, bar.update)
        except Stopped as stopped:
            say(f"stopped in {stopped}; the same command with --resume tune.name={result.name} goes on")
            return EXIT_INTERRUPTED
        say("\n" + "\n".join(found.lines(config.tune.metric)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m detr_ray.tune``."""
    return run_command("tune", DESCRIPTION, _tune, argv, add_arguments=_arguments, check=_check)


if __name__ == "__main__":
    sys.exit(main())
