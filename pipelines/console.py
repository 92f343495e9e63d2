"""A readable console: everything that KFP's local runner prints is kept, what a person wants is shown."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import TextIOBase
from pathlib import Path
from typing import TextIO

ANSI = re.compile(r"\x1b\[\d+m")
STEP_LINE = re.compile(r"\d\d:\d\d:\d\d ")  # what our steps log
TASK_LINE = re.compile(r"- (?:INFO|ERROR) - (?:Executing task|Task \S+ finished) .*")
FAILURE_LINE = re.compile(r"([\w.]+Error\b.*|Traceback|- ERROR -)")


class ConsoleFilter(TextIOBase):
    """Writes all lines to a log and the telling ones to a terminal."""

    def __init__(self, log: TextIO, terminal: TextIO):
        self.log, self.terminal, self.pending = log, terminal, ""

    def write(self, text: str) -> int:
        """Take some text; whole lines are passed on."""
        self.log.write(ANSI.sub("", text))
        self.pending += text
        *lines, self.pending = self.pending.split("\n")
        for line in lines:
            plain = ANSI.sub("", line).strip()
            if task := TASK_LINE.search(plain):
                self.show(f"── {task[0].removeprefix('- INFO - ')}")
            elif STEP_LINE.match(plain) or FAILURE_LINE.match(plain):
                self.show(f"   {plain}")
        return len(text)

    def show(self, line: str) -> None:
        """Put a line on the terminal; not by `print`, which the runner replaces by one that indents."""
        self.terminal.write(f"{line}\n")
        self.terminal.flush()

    def flush(self) -> None:
        """Pass on what is buffered."""
        self.log.flush()


@contextmanager
def quiet_console(log_file: Path) -> Iterator[None]:
    """Within the body, standard output goes through a `ConsoleFilter`; the whole text is in `log_file`."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    # TextIOBase's stubs are no TextIO, though it does what redirect_stdout needs.
    with log_file.open("w") as log, redirect_stdout(ConsoleFilter(log, sys.stdout)):  # type: ignore[type-var]
        logging.captureWarnings(True)
        yield
