"""What all commands share: configuration from the command line, help, error messages and exit codes.

Imports neither torch nor Ray, so that help and error messages appear within a second. Exit codes: 0 success, 1 the run
failed, 2 the configuration or the data cannot be used, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn, TextIO

from detr_ray.config import Config, ConfigError, load_config
from detr_ray.config.reference import WIDTH, reference_text
from detr_ray.credentials import without_credentials
from detr_ray.printable import printable_lines

EXIT_FAILED = 1
EXIT_UNUSABLE = 2
EXIT_INTERRUPTED = 130

_USER_ERRORS = (
    ("detr_ray.data.errors", "DataError", EXIT_UNUSABLE),
    ("detr_ray.model.state_dicts", "WeightsError", EXIT_UNUSABLE),
    ("detr_ray.engine.errors", "RunFailed", EXIT_FAILED),
    ("detr_ray.tracking.registry", "RegistryUnavailable", EXIT_FAILED),
    ("detr_ray.tracking.registry", "RegistryError", EXIT_UNUSABLE),
    ("detr_ray.engine.errors", "CheckpointError", EXIT_FAILED),
    ("detr_ray.exporting.errors", "ExportError", EXIT_FAILED),
    ("detr_ray.runtime.session", "RayNotStarted", EXIT_FAILED),
)

_OVERRIDE = re.compile(r"(--)?[A-Za-z_]\w*(\.\w+)+=|[A-Za-z_]\w*=\{")
_BARE_KEY = re.compile(r"[a-z_]+=")
_KEY = re.compile(r"(--)?[a-z]\w*(\.\w+)+")

_WHICH_STORE = ("tracking.uri", "run.storage")
"""Keys that say in which MLflow store an address such as ``models:/detr@champion`` is looked up."""

_USAGE_NOTE = """\
keys:
  Defaults, then every --config FILE in its order, then key=value: later values win. Values are
  YAML: null, true, 0.5, 1e-4, [1, 2]. --key=value is the same as key=value.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=WIDTH)


def run_command(
    name: str,
    description: str,
    main: Callable[[Config, argparse.Namespace], int],
    argv: Sequence[str] | None = None,
    add_arguments: Callable[[argparse.ArgumentParser], object] | None = None,
    check: Callable[[Config], object] | None = None,
) -> int:
    """Runs a command: reads the configuration from the command line, calls ``main``, and prints errors for users.

    Args:
        name: the command's module in ``detr_ray``, for example ``train``.
        description: text for the command's help.
        main: the command; gets the configuration and the parsed arguments (``overrides`` are those of the
            configuration), returns the exit code. It should import heavy packages in its body.
        argv: arguments; None: those of the process.
        add_arguments: adds further arguments of the command.
        check: raises `ConfigError` if the command needs values that the configuration does not have, for example
            ``Config.check_training``. Called before ``main``, but not for ``--print-config``.

    Returns:
        The exit code.
    """
    _escape_unknown_characters()
    given = sys.argv[1:] if argv is None else argv
    try:
        parser = _parser(name, description, add_arguments)
        if "-h" in given or "--help" in given:
            parser.epilog = f"{_USAGE_NOTE}\n{reference_text()}"
            return _show(parser.format_help())
        config, arguments = _read(parser, given)
        if arguments.print_config:
            return _show(config.to_yaml())
        if check is not None:
            check(config)
        return main(config, arguments)
    except ConfigError as error:
        return _fail(error.errors, EXIT_UNUSABLE)
    except KeyboardInterrupt:
        return _fail(["stopped"], EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader closed the pipe (`... --help | head`). Without this, Python prints an error when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        return _fail([str(error)], code)


def say(line: str, stream: TextIO | None = None) -> None:
    """Prints a line (by default to standard output) and flushes it; control characters are escaped."""
    stream = stream or sys.stdout
    stream.write(printable_lines(line) + "\n")
    stream.flush()


def count(text: str) -> int:
    """The type of options that take a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1 (got {text})")
    return int(text)


def share(text: str) -> float:
    """The type of options that take a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1 (got {text})")
    return value


def write_result(option: str, location: str, content: Callable[[], bytes], what: str) -> bool:
    """Writes a file that an option names, and says so; an error is reported, so that other files are still written.

    Args:
        option: its name.
        location: path or URI.
        content: gives the file's bytes.
        what: a word for the file.

    Returns:
        Whether it was written.
    """
    from detr_ray.data.errors import DataError
    from detr_ray.engine.preflight.writing import write_output
    from detr_ray.retries import reason_of

    try:
        write_output(location, content())
    except (OSError, DataError) as error:
        sys.stderr.write(f"error: {option}: {location} could not be written: {reason_of(error)}\n")
        return False
    say(f"{what:<13}{location}")
    return True


def refuse_idle_keys(arguments: argparse.Namespace, is_used: bool) -> None:
    """Refuses keys of the configuration that would have no effect, because the model has its own values.

    Args:
        arguments: of a command whose ``source`` is a model.
        is_used: whether the configuration describes the model.

    Raises:
        ConfigError: there are such keys.
    """
    from detr_ray.addresses import MLFLOW_SCHEMES

    given = [*arguments.config, *arguments.overrides]
    if arguments.source.startswith(MLFLOW_SCHEMES):  # some say which registry
        given = [item for item in arguments.overrides if item.removeprefix("--").split("=")[0] not in _WHICH_STORE]
    if given and not is_used:
        raise ConfigError(f"{given[0]}: changes nothing: {arguments.source} says itself what it was trained with")


def with_model(config: Config, model: str | None) -> Config:
    """The configuration with the model that the command line names, if it names one, as ``eval.checkpoint``.

    Raises:
        ConfigError: it looks like a key without its section.
    """
    if model is None:
        return config
    if _BARE_KEY.match(model) and not Path(model).exists():
        raise ConfigError(f"{model}: neither a model nor a key with its section, such as train.epochs=3")
    return config.model_copy(update={"eval": config.eval.model_copy(update={"checkpoint": model})})


def _escape_unknown_characters() -> None:
    """Lets output escape characters that the terminal's encoding does not have, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # other streams belong to a host program, such as a notebook
            stream.reconfigure(errors="backslashreplace")


def usage(arguments: str = "") -> str:
    """The usage line of a command with these arguments of its own."""
    return f"%(prog)s {arguments}{' ' if arguments else ''}[--config FILE]... [options] [key=value]..."


def _parser(
    name: str, description: str, add_arguments: Callable[[argparse.ArgumentParser], object] | None
) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"python -m detr_ray.{name}", description=description, formatter_class=_Help, add_help=False,
        allow_abbrev=False, usage=usage(),
    )  # fmt: skip
    parser.add_argument("-h", "--help", action="store_true", help="show this help, with all keys")
    parser.add_argument(
        "--config", metavar="FILE", action="append", default=[],
        help="YAML file, on a disk or in a bucket; may be repeated",
    )  # fmt: skip
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    if add_arguments is not None:
        add_arguments(parser)
    return parser


def _read(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """The configuration and the parsed arguments; raises one `ConfigError` with all faults of both."""
    _refuse_cut_values(argv)
    arguments, rest = parser.parse_known_args([item for item in argv if not _OVERRIDE.match(item)])
    errors = _not_understood(parser, [item for item in rest if "=" not in item], argv)
    # `rest` may also contain section=mapping, or a key without its section: as an override it gets a better error.
    # Later overrides win, so their order must not change.
    overrides = [item for item in argv if _OVERRIDE.match(item) or (item in rest and "=" in item)]
    try:
        config = load_config(arguments.config, overrides, _read_config_file)
    except ConfigError as error:
        raise ConfigError([*errors, *error.errors]) from None
    if errors:
        raise ConfigError(errors)
    arguments.overrides = overrides
    return config, arguments


def _refuse_cut_values(argv: Sequence[str]) -> None:
    """Refuses a value in braces that a shell has cut at its blanks.

    Raises:
        ConfigError: there is one.
    """
    for place, item in enumerate(argv):
        if not _OVERRIDE.match(item) or _is_balanced(item):
            continue
        whole = item
        for more in argv[place + 1 :]:
            whole = f"{whole} {more}"
            if _is_balanced(whole):
                raise ConfigError(
                    f"{item} is cut off at a blank, where the shell divides it: put it in quotes: '{whole}'"
                )


def _is_balanced(text: str) -> bool:
    return all(text.count(begin) == text.count(end) for begin, end in ("{}", "[]"))


def _not_understood(parser: argparse.ArgumentParser, items: Sequence[str], argv: Sequence[str]) -> list[str]:
    """A line for each of ``items`` of ``argv``, which are neither options nor keys; none for an unknown one's value."""
    options = re.findall(r"(?<!\S)--[a-z][a-z-]*", parser.format_help())
    errors, place = [], 0
    while place < len(items):
        item, place = items[place], place + 1
        value = ""
        after = items[place] if place < len(items) else "-"
        if item.startswith("--") and not after.startswith("-") and (item, after) in pairwise(argv):
            value, place = after, place + 1
        near = difflib.get_close_matches(item, options, n=1) if item.startswith("--") else []
        hint = f"did you mean {near[0]}?" if near else "see --help"
        if item.endswith((".yaml", ".yml")):
            hint = f"write --config {item}"
        elif _KEY.fullmatch(item) and item.removeprefix("--").split(".")[0] in Config.model_fields:
            hint = f"write {item.removeprefix('--')}={value or 'VALUE'}"
        errors.append(f"'{item}' is neither an option nor key=value; {hint}")
    return errors


def _read_config_file(location: str) -> bytes:
    """The content of a configuration file at a path or an address."""
    from detr_ray.addresses import is_uri

    if not is_uri(location):
        return Path(location).read_bytes()
    from detr_ray.locations import read_bytes  # and pyarrow, which takes time that most commands need not spend

    return read_bytes(location)


def _show(text: str) -> int:
    sys.stdout.write(text)
    sys.stdout.flush()
    return 0


def _exit_code(error: Exception) -> int | None:
    """Exit code of an error that is meant for users; None for a bug of the program."""
    for module, name, code in _USER_ERRORS:
        # The class of an error was imported before, so the module need not be imported here.
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(error, kind):
            return code
    return None


def _fail(messages: Sequence[str], code: int) -> int:
    sys.stdout.flush()
    for message in messages:
        sys.stderr.write(f"error: {printable_lines(without_credentials(message))}\n")
    return code
