"""What a person sees while a run trains: a live bar on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import sys
import time

import datasets
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger("dynamic_transformers")


def configure_logging() -> None:
    """Plain lines with a time on standard output, no bars in logs; called once by each command."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


class TrainingDisplay:
    """Progress of one run; silent on ranks other than 0."""

    def __init__(self, name: str, first_step: int, enabled: bool):
        self.name, self.enabled = name, enabled
        self.first_step, self.started = first_step, time.perf_counter()
        self.bar: Progress | None = None
        if enabled and sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=Console())
            self.bar.start()
            self.task = self.bar.add_task(name, total=1, figures="")

    def update(self, step: int, total_steps: int, tokens_per_second: float, loss: float) -> None:
        """Show step, loss, tokens/s and the time that is left."""
        if not self.enabled:
            return
        figures = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, total=total_steps, figures=figures)
            return
        pace = (time.perf_counter() - self.started) / max(1, step - self.first_step)
        left = time.strftime("%H:%M:%S", time.gmtime(pace * (total_steps - step)))
        logger.info("%s step %d/%d  %s  ETA %s", self.name, step, total_steps, figures, left)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()
