"""What watches a run: log, display, evaluation, checkpoints. None of them changes what is trained."""

from __future__ import annotations

import datetime
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dynamic_transformers.training.budget import Progress
from dynamic_transformers.training.heldout import HeldoutResult
from dynamic_transformers.training.step import StepResult

logger = logging.getLogger("dynamic_transformers")

LONG = 600  # seconds after which a run also logs what it takes of the machine

Write = Callable[[Progress, dict[str, float]], None]


@dataclass
class Moment:
    """A step that has ended.

    Attributes:
        seconds: that it took.
        tokens: that it read, over all ranks.
        total: steps of the run.
        last: the run ends here.
        interrupted: a signal ends the run here; it goes on some other time.
        due: a clock asks for a checkpoint.
        line: what the log has written of it.
    """

    progress: Progress
    result: StepResult
    seconds: float
    tokens: int
    total: int
    last: bool
    interrupted: bool
    due: bool
    line: dict[str, float] | None = None

    def every(self, interval: int) -> bool:
        """Whether something that is done each `interval` steps (0: never), and at the end, is due."""
        return self.last or (interval > 0 and self.progress.step % interval == 0)


class Observer:
    """Is told of each step, on every rank."""

    def after_step(self, moment: Moment) -> None:
        """A step has ended."""
        raise NotImplementedError


class Log(Observer):
    """Means of the losses and the speed since the last line, and the routing of the last step.

    Args:
        write: takes what is logged.
        every: steps of a line.
    """

    def __init__(self, write: Write, every: int):
        self.write, self.every = write, every
        self.started = time.monotonic()

    def after_step(self, moment: Moment) -> None:
        """Add to the sums; write a line when it is due."""
        progress, result, sums = moment.progress, moment.result, moment.progress.unlogged
        add_up(sums, {"tokens": moment.tokens, "seconds": moment.seconds})
        if result.updated:
            add_up(sums, {"steps": 1, **result.losses})
        if not moment.every(self.every):
            return
        speed = sums.pop("tokens") / sums.pop("seconds")
        steps = sums.pop("steps", 0)
        line = {name: value / steps for name, value in sums.items()}
        line |= {"train/tokens_per_second": speed, "train/learning_rate": result.learning_rate}
        if progress.skipped:
            line["train/skipped_steps"] = progress.skipped
        for layer, measured in result.routing.items() if result.updated else ():
            line |= {f"routing/layer_{layer}/{key}": value for key, value in measured.items()}
        if time.monotonic() - self.started > LONG:
            line |= machine_figures()
        sums.clear()
        self.write(progress, line)
        moment.line = line


def machine_figures() -> dict[str, float]:
    """How busy this machine is, in percent, by the names that MLflow has for it."""
    figures = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),  # since the last call
        "system/system_memory_usage_percentage": psutil.virtual_memory().percent,
    }
    for device in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        free, total = torch.cuda.mem_get_info(device)
        figures[f"system/gpu_{device}_memory_usage_percentage"] = 100 * (1 - free / total)
    return figures


class Display(Observer):
    """Each line of the log for a person: a live bar on a terminal, plain lines elsewhere."""

    def __init__(self, name: str, first_step: int):
        self.name, self.first_step, self.started = name, first_step, time.perf_counter()
        self.bar: Bar | None = None
        if sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
            )
            self.bar = Bar(*columns, console=Console())
            self.bar.start()
            self.task = self.bar.add_task(name, total=1, figures="")

    def after_step(self, moment: Moment) -> None:
        """Show step, loss, tokens/s and the time that is left."""
        if moment.line is None:
            return
        step, total, skipped = moment.progress.step, moment.total, moment.progress.skipped
        loss, speed = moment.line.get("train/loss", math.nan), moment.line["train/tokens_per_second"]
        figures = f"loss {loss:.3f}  {speed:,.0f} tokens/s" + (
            f"  {skipped} steps skipped" if skipped else ""
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=step, total=total, figures=figures)
            return
        pace = (time.perf_counter() - self.started) / max(1, step - self.first_step)
        left = datetime.timedelta(seconds=round(pace * (total - step)))
        logger.info("%s step %d/%d  %s  ETA %s", self.name, step, total, figures, left)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()


class Evaluation(Observer):
    """Held-out loss on the validation split; at the end of a run after its calibration, by whoever calls it.

    Args:
        measure: evaluates the model as it is.
        write: takes what is logged.
        every: steps between two; 0: none before the end.
    """

    def __init__(self, measure: Callable[[], HeldoutResult], write: Write, every: int):
        self.measure, self.write, self.every = measure, write, every

    def after_step(self, moment: Moment) -> None:
        """Evaluate when it is due; a run that is interrupted does so when it goes on."""
        if moment.every(self.every) and not moment.last and not moment.interrupted:
            self.evaluate(moment.progress)

    def is_owed(self, progress: Progress, total: int) -> bool:
        """Whether the evaluation of the last step has not been made, though the run goes on after it."""
        due = 0 < progress.step < total and self.every > 0 and progress.step % self.every == 0
        return due and progress.evaluation.get("step") != progress.step

    def evaluate(self, progress: Progress) -> None:
        """Evaluate, and write a line."""
        result = self.measure()
        metrics = {"eval/loss": result.loss, "eval/bits_per_byte": result.bits_per_byte}
        for layer, fraction in result.routed_fraction.items():
            metrics[f"routing/layer_{layer}/eval_fraction"] = fraction
            metrics[f"routing/layer_{layer}/gate_mean"] = result.gate_mean[layer]
            metrics[f"routing/layer_{layer}/gate_std"] = result.gate_std[layer]
        progress.evaluation = {"step": progress.step, "loss": result.loss}
        self.write(progress, metrics)
        logger.info("validation loss %.4f nats/token, %.4f bits/byte", result.loss, result.bits_per_byte)


class Checkpoints(Observer):
    """Saves the state by steps, by time, and where the run ends or is interrupted.

    While steps go without an update no interval saves: a checkpoint that is there is a good one.

    Args:
        save: writes a checkpoint, on every rank.
        every: steps between two; 0: by time alone.
        minutes: between two; 0: by steps alone.
    """

    def __init__(self, save: Callable[[], None], every: int, minutes: float):
        self.save, self.every, self.seconds = save, every, 60 * minutes
        self.saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether so much time has passed, by this rank's clock."""
        return 0 < self.seconds <= time.monotonic() - self.saved

    def after_step(self, moment: Moment) -> None:
        """Save when it is due."""
        regular = (moment.due or moment.every(self.every)) and not moment.progress.skipped_in_a_row
        if regular or moment.last or moment.interrupted:
            self.save()
            self.saved = time.monotonic()


@dataclass
class Observers(Observer):
    """All observers of a run; on ranks other than 0 nothing is displayed."""

    log: Log
    display: Display | None
    evaluation: Evaluation
    checkpoints: Checkpoints

    @property
    def due(self) -> bool:
        """Whether this rank's clock asks for a checkpoint."""
        return self.checkpoints.due

    def after_step(self, moment: Moment) -> None:
        """Tell them in their order. Checkpoints come last: they hold that a step was logged and evaluated."""
        for observer in (self.log, self.display, self.evaluation, self.checkpoints):
            if observer is not None:
                observer.after_step(moment)

    def catch_up(self, progress: Progress, total: int) -> None:
        """Make the evaluation that an interruption has left out."""
        if self.evaluation.is_owed(progress, total):
            self.evaluation.evaluate(progress)
            self.checkpoints.save()

    def close(self) -> None:
        """The loop has ended, however."""
        if self.display is not None:
            self.display.close()


def add_up(sums: dict[str, float], values: Mapping[str, float]) -> None:
    """Add each value to the sum of its name."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value
