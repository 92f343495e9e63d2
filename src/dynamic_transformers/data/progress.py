"""How far the tokenization is: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger("dynamic_transformers")

SECONDS = 10  # between two lines of a log


class ReadingProgress:
    """Shards done out of all, with tokens/s and the time that is left; a context manager.

    Args:
        shards, size: numbers of shards and of bytes that there are to do.
    """

    def __init__(self, shards: int, size: int):
        self.shards, self.size = shards, max(1, size)
        self.done = self.bytes = self.tokens = 0
        self.started = self.told = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            columns = (TextColumn("tokenizing"), BarColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, TimeRemainingColumn())
            self.task = self.bar.add_task("", total=self.size)

    def __enter__(self) -> ReadingProgress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def add(self, size: int, tokens: int) -> None:
        """One more shard is done."""
        self.done, self.bytes, self.tokens = self.done + 1, self.bytes + size, self.tokens + tokens
        now = time.monotonic()
        speed = self.tokens / max(1e-9, now - self.started)
        figures = f"{self.done}/{self.shards} shards  {speed:,.0f} tokens/s"
        if self.bar:
            self.bar.update(self.task, completed=self.bytes, description=figures)
        elif now - self.told >= SECONDS:
            self.told = now
            left = (now - self.started) * (self.size - self.bytes) / max(1, self.bytes)
            minutes, seconds = divmod(round(left), 60)
            percent = 100 * self.bytes / self.size
            logger.info("tokenizing: %s  %.0f %%  ETA %d:%02d", figures, percent, minutes, seconds)
