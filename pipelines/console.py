"""A readable console: everything that KFP's local runner prints is kept, what a person wants is shown."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import TextIOBase
from pathlib import Path
from typing import TextIO

ANSI = re.compile(r"\x1b\[\d+m")
STEP_LINE = re.compile(r"\d\d:\d\d:\d\d ")  # what our steps log
TASK_LINE = re.compile(r"- (?:INFO|ERROR) - (?:Executing task|Task \S+ finished) .*")
FAILURE_LINE = re.compile(r"([\w.]+Error\b.*|Traceback|- ERROR -)")


class ConsoleFilter(TextIOBase):
    """Writes all lines to a log and the telling ones to a terminal.

    Once `stopped` says so, only what steps log is telling: tasks fail since they were asked to end.
    """

    def __init__(self, log: TextIO, terminal: TextIO, stopped: Callable[[], bool] = lambda: False):
        self.log, self.terminal, self.stopped, self.pending = log, terminal, stopped, ""

    def write(self, text: str) -> int:
        """Take some text; whole lines are passed on."""
        self.log.write(ANSI.sub("", text))
        self.pending += text
        *lines, self.pending = self.pending.split("\n")
        for line in lines:
            plain = ANSI.sub("", line).strip()
            stopped = self.stopped()
            if task := TASK_LINE.search(plain):
                if not stopped:
                    self.show(f"── {task[0].removeprefix('- INFO - ')}")
            elif STEP_LINE.match(plain) or (FAILURE_LINE.match(plain) and not stopped):
                self.show(f"   {plain}")
        return len(text)

    def show(self, line: str) -> None:
        """Put a line on the terminal; not by `print`, which the runner replaces by one that indents."""
        encoding = self.terminal.encoding or "utf-8"  # not every terminal's has every character
        self.terminal.write(f"{line}\n".encode(encoding, "replace").decode(encoding))
        self.terminal.flush()

    def flush(self) -> None:
        """Pass on what is buffered."""
        self.log.flush()


@contextmanager
def quiet_console(log_file: Path, stopped: Callable[[], bool]) -> Iterator[None]:
    """Within the body, standard output goes through a `ConsoleFilter`; all of it is added to `log_file`."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    # TextIOBase's stubs are no TextIO, though it does what redirect_stdout needs.
    console = ConsoleFilter(log_file.open("a", encoding="utf-8"), sys.stdout, stopped)
    with console.log, redirect_stdout(console):  # type: ignore[type-var]
        logging.captureWarnings(True)
        yield
