"""What a job's nodes printed, as torchrun writes it to the volume, where it outlives them.

torchrun's `--log-dir <logs>/node-<rank> --tee 3` makes, each time that a node starts, a folder
`none_…/attempt_0/<process>/` with `stdout.log` and `stderr.log`, and `error.json` of an exception.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

logger = logging.getLogger("dynamic_transformers")

LAST_LINES = 30
SHOWN = 3  # processes: where one fails, all others soon do


class NodeLogs:
    """Shows what ends the processes that write to a folder of logs, from now on."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shown = self._exceptions()

    def show_exceptions(self) -> None:
        """Log the exceptions that have ended processes since the last call, the first ones first."""
        new = self._exceptions() - self.shown
        self.shown |= new
        for path in sorted(new, key=lambda path: path.stat().st_mtime)[:SHOWN]:
            self._show(path.parent, exception(path))

    def show_end(self) -> None:
        """Log why the nodes have ended: exceptions, else the last lines of those that printed last."""
        before = len(self.shown)
        self.show_exceptions()
        if len(self.shown) > before:
            return
        # A process that was killed has no last word of its own.
        outputs = [path for path in self.folder.glob("node-*/*/attempt_*/*/std*.log") if path.stat().st_size]
        if not outputs:
            logger.warning("no node has printed anything to %s", self.folder)
        for path in sorted(outputs, key=lambda path: path.stat().st_mtime)[-SHOWN:]:
            self._show(path.parent, path.read_text(errors="replace"))

    def _exceptions(self) -> set[Path]:
        return set(self.folder.glob("node-*/*/attempt_*/*/error.json"))

    def _show(self, process: Path, text: str) -> None:
        node = process.relative_to(self.folder).parts[0]
        lines = "\n".join(text.splitlines()[-LAST_LINES:])
        logger.info("last lines of %s, process %s (all of them: %s):\n%s", node, process.name, process, lines)


def exception(path: Path) -> str:
    """The traceback in an `error.json`."""
    try:
        return json.loads(path.read_text())["message"]["extraInfo"]["py_callstack"]
    except (ValueError, KeyError, TypeError):
        return path.read_text(errors="replace")  # half-written
