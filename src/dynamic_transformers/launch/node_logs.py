"""What a job's nodes printed, as torchrun writes it to the volume, where it outlives them.

torchrun's `--log-dir <logs>/node-<rank> --tee 3` makes, each time that a node starts, a folder
`none_…/attempt_0/<process>/` with `stdout.log` and `stderr.log`, and `error.json` of an exception. On a
network volume a file may be gone, or stale, when it is read: then there is less to show.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from dynamic_transformers.settings import UserError

logger = logging.getLogger("dynamic_transformers")

LAST_LINES, LAST_BYTES = 30, 64 * 1024  # of an output, whichever is less
SHOWN = 3  # processes: where one fails, all others soon do


class NodeLogs:
    """Shows what ends the processes that write to a folder of logs, from now on."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shown = set(self._files("error.json"))
        self.read = set(self.shown)

    def mistake(self) -> str:
        """The user's mistake that has ended a process since the last call; '' if there was none."""
        for path in self._files("error.json"):
            if path not in self.read and (message := exception(path).get("message")):
                self.read.add(path)
                name, _, text = message.partition(": ")
                if name == UserError.__name__:  # not a subclass: a folder that is in use will be free
                    return text
        return ""

    def show_exceptions(self) -> None:
        """Log the exceptions that have ended processes since the last call, the first ones first."""
        new = [path for path in self._files("error.json") if path not in self.shown]
        self.shown |= set(new)
        for path in new[:SHOWN]:
            self._show(path.parent, exception(path).get("extraInfo", {}).get("py_callstack") or tail(path))

    def show_end(self) -> None:
        """Log why the nodes have ended: exceptions, else the last lines of those that printed last."""
        before = len(self.shown)
        self.show_exceptions()
        if len(self.shown) > before:
            return
        # A process that was killed has no last word of its own.
        outputs = self._files("std*.log")
        if not outputs:
            logger.warning("no node has printed anything to %s", self.folder)
        for path in outputs[-SHOWN:]:
            self._show(path.parent, tail(path))

    def _files(self, pattern: str) -> list[Path]:
        """The processes' files of such names that hold something, the oldest first."""
        found = []
        for folder, _, names in os.walk(self.folder):  # which passes over folders that cannot be read
            for path in (Path(folder, name) for name in fnmatch.filter(names, pattern)):
                with suppress(OSError):
                    status = path.stat()
                    found += [(status.st_mtime, path)] if status.st_size else []
        return [path for _, path in sorted(found)]

    def _show(self, process: Path, text: str) -> None:
        node = process.relative_to(self.folder).parts[0]
        lines = "\n".join(text.splitlines()[-LAST_LINES:])
        logger.info("last lines of %s, process %s (all of them: %s):\n%s", node, process.name, process, lines)


def exception(path: Path) -> dict[str, Any]:
    """The `message` of an `error.json`, which has `message` and `extraInfo`; {}: half-written, or gone."""
    try:
        message = json.loads(path.read_text())["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return message if isinstance(message, dict) else {}


def tail(path: Path) -> str:
    """The end of a file, LAST_BYTES of it; '' if it cannot be read."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_BYTES))
        return file.read().decode(errors="replace")
    return ""
