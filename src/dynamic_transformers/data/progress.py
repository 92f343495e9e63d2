"""How far a part of the step is that takes long: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

logger = logging.getLogger("dynamic_transformers")

SECONDS = 10.0  # between two lines of a log
BAR_SECONDS = 0.5  # between two states of a bar


class Progress:
    """What is done of a total, with the speed and the time that is left; a context manager.

    A thread shows it, so that something happens to be seen however long one piece of work takes.

    Args:
        what: is done, as in "packing".
        total: how much there is to do.
        unit: of the total, in the plural.
    """

    def __init__(self, what: str, total: int, unit: str):
        self.what, self.total, self.unit = what, max(1, total), unit
        self.done = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def add(self, count: int) -> None:
        """So much more is done."""
        self.done += count

    def fraction(self) -> float:
        """Part of the total that is done; 0 where that cannot be told yet."""
        return self.done / self.total

    def figures(self, seconds: float) -> str:
        """What there is to say besides, this long after the beginning."""
        return f"{self.done / seconds:,.0f} {self.unit}/s"

    def _text(self) -> str:
        seconds, fraction = time.monotonic() - self._started, self.fraction()
        if not fraction:
            return self.figures(seconds)
        left = divmod(round(seconds * max(0.0, 1 / fraction - 1)), 60)
        return f"{self.figures(seconds)}  {100 * fraction:.0f} %  ETA {left[0]}:{left[1]:02d}"

    def _show(self) -> None:
        if not sys.stderr.isatty():
            while not self._ended.wait(SECONDS):
                logger.info("%s: %s", self.what, self._text())
            return
        if self._ended.wait(BAR_SECONDS):
            return
        columns = (TextColumn(self.what), BarColumn(), TextColumn("{task.description}"))
        with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task("", total=None)
            while not self._ended.wait(BAR_SECONDS):
                fraction = self.fraction()
                total = 1 if fraction else None  # without one, the bar pulses
                bars.update(task, completed=fraction, total=total, description=self._text())


class ReadingProgress(Progress):
    """Shards done out of all.

    Args:
        what: is done with them.
        shards, size: numbers of shards and of bytes that there are to do.
        begun: tokens that unfinished shards have so far.
    """

    def __init__(self, what: str, shards: int, size: int, begun: Callable[[], int] = lambda: 0):
        super().__init__(what, size, "bytes")
        self.shards, self.begun = shards, begun
        self.done_shards = self.tokens = 0

    def finish(self, size: int, tokens: int = 0) -> None:
        """One more shard is done."""
        self.add(size)
        self.done_shards, self.tokens = self.done_shards + 1, self.tokens + tokens

    def fraction(self) -> float:
        """Of the bytes; what unfinished shards hold is reckoned by what the finished ones came to."""
        ahead = self.begun() * self.done / self.tokens if self.tokens else 0
        return min(1.0, (self.done + ahead) / self.total)

    def figures(self, seconds: float) -> str:
        """Shards and speed."""
        tokens = self.tokens + self.begun()
        speed = f"  {tokens / seconds:,.0f} tokens/s" if tokens else ""
        return f"{self.done_shards}/{self.shards} shards{speed}"
