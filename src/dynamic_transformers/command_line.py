"""How every command ends: its exit code, and a user's mistake in one line."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dynamic_transformers.constraints import constraints_of, hints_of, violation
from dynamic_transformers.models.plugin import read_plugin
from dynamic_transformers.reading import read
from dynamic_transformers.settings import UserError

FAILURE, MISTAKE, INTERRUPTED = 1, 2, 130
# What no program can help: the disk is full, over its quota, read-only or broken, a mount has gone, or files
# may not be so large. Libraries that have errors of their own pass the system's words on.
MACHINE = [
    os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG)
]


def path(text: str) -> Path:
    """A path of the command line; a shell leaves the ~ of `--option=~/x` to us."""
    return Path(text).expanduser()


def names(text: str) -> list[str]:
    """Names of the command line, by commas."""
    return [name for part in text.split(",") if (name := part.strip())]


def add_plugin_argument(parser: argparse.ArgumentParser) -> None:
    """`--plugin`, which makes an own architecture known: code beside weights is never run unasked."""

    def read_flag(text: str) -> dict[str, str]:
        try:
            return read_plugin(path(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    parser.add_argument(
        "--plugin",
        type=read_flag,
        metavar="FILE",
        help="of an own architecture, whose code is run; an export has a copy beside the weights",
    )


def flag_of(settings: type, name: str) -> Callable[[str], Any]:
    """What argparse reads a flag with that stands for a setting: of its type, within its range."""
    hint = hints_of(settings)[name]

    def read_flag(text: str) -> Any:
        try:
            value = read(hint, text, (name,))
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        if refusal := violation(name, value, constraints_of(hint)):
            raise argparse.ArgumentTypeError(refusal)
        return value

    return read_flag


def run_command(
    command: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
) -> None:
    """Parse the arguments (default: the command line's) and run `command`.

    A `UserError` becomes one line and exit code 2, an interrupt one line and 130, and what the machine is to
    blame for one line and 1.
    """
    print_on_any_terminal()
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_intermixed_args(arguments)
    try:
        sys.exit(command(args) or 0)
    except UserError as error:
        if args.debug:
            raise
        fail(" ".join(str(error).split("\n")), MISTAKE)
    except KeyboardInterrupt:
        if args.debug:
            raise
        fail("interrupted", INTERRUPTED)
    except Exception as error:
        line = machine_failure(error)
        if args.debug or line is None:
            raise
        fail(line, FAILURE)


def machine_failure(error: BaseException | None) -> str | None:
    """One line for an error of disks and folders; None for any other, whose traceback is needed."""
    while error is not None:
        if isinstance(error, FileNotFoundError) and error.filename:
            file = os.fsdecode(error.filename)
            if not Path(file).parent.exists():
                return f"{file}: its folder was moved or removed while the command ran"
        for line in str(error).splitlines():
            if any(words in line for words in MACHINE):
                return f"{line}; what was finished stays, and the same command goes on from there"
        error = error.__cause__ or error.__context__
    return None


def fail(line: str, code: int) -> None:
    """End the process with a line on standard error."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(code)


def print_on_any_terminal() -> None:
    """Let a character that the terminal's encoding lacks become another one, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
