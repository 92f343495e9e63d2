"""How every command ends: its exit code, and a user's mistake in one line."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dynamic_transformers.settings import UserError

FAILURE, MISTAKE, INTERRUPTED = 1, 2, 130
# What no program can help: the disk is full, over its quota, read-only or broken, or a mount has gone.
MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}


def path(text: str) -> Path:
    """A path of the command line; a shell leaves the ~ of `--option=~/x` to us."""
    return Path(text).expanduser()


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


def machine_failure(error: Exception) -> str | None:
    """One line for an error of disks and folders; None for any other, whose traceback is needed.

    safetensors tells the system's errors in the text of its own.
    """
    if isinstance(error, OSError):
        number, file = error.errno, error.filename
        if isinstance(error, FileNotFoundError) and file and not Path(os.fsdecode(file)).parent.exists():
            return f"{os.fsdecode(file)}: its folder was moved or removed while the command ran"
    elif type(error).__name__ == "SafetensorError":
        found = re.search(r"\(os error (\d+)\)", str(error))
        number, file = int(found[1]) if found else None, None
    else:
        return None
    if number not in MACHINE:
        return None
    where = f"{os.fsdecode(file)}: " if file else ""
    return f"{where}{os.strerror(number)}; what was finished stays, and the same command goes on from there"


def fail(line: str, code: int) -> None:
    """End the process with a line on standard error."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(code)


def print_on_any_terminal() -> None:
    """Let a character that the terminal's encoding lacks become another one, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
