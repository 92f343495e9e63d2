"""The one training loop, for all architectures, on one process or many."""

from __future__ import annotations

import time

from dynamic_transformers.interruption import Interruption
from dynamic_transformers.training.budget import Horizon, Progress
from dynamic_transformers.training.observers import Moment, Observers
from dynamic_transformers.training.step import OptimizerStep, StepResult


class DivergedError(ArithmeticError):
    """Too many steps in a row had a loss or a gradient that was not finite."""


def fit(
    progress: Progress,
    step: OptimizerStep,
    horizon: Horizon,
    observers: Observers,
    interruption: Interruption,
    max_skipped: int,
) -> bool:
    """Train to the end of the budget.

    Args:
        progress: the work done so far; counted on.
        interruption: a signal to any rank ends the loop on all of them, after the same step.
        max_skipped: steps in a row that may go without an update.

    Returns:
        Whether the budget is spent; else a signal has ended it.

    Raises:
        DivergedError: more than `max_skipped` did.
    """
    interrupted = False
    total = horizon.total_steps(progress)
    while progress.step < total and not interrupted:
        start = time.perf_counter()
        result = step(
            progress.step,
            horizon.schedule_steps(progress),
            lambda: [interruption.number is not None, observers.due],
        )
        seconds = time.perf_counter() - start
        interrupted, due = result.wishes
        count(progress, result, seconds, horizon)
        if progress.skipped_in_a_row > max_skipped:
            raise DivergedError(diagnosis(progress, result))
        total = horizon.total_steps(progress)
        moment = Moment(
            progress, result, seconds, horizon.step_tokens, total, progress.step >= total, interrupted, due
        )
        observers.after_step(moment)
    return not interrupted


def count(progress: Progress, result: StepResult, seconds: float, horizon: Horizon) -> None:
    """Add one step's work; a step without an update is work, too."""
    computed = {layer: measured["computed"] for layer, measured in result.routing.items()}
    progress.step += 1
    progress.tokens += horizon.step_tokens
    progress.flops += horizon.step_flops(computed)
    progress.seconds += seconds
    progress.skipped += not result.updated
    progress.skipped_in_a_row = 0 if result.updated else progress.skipped_in_a_row + 1
    for layer, measured in result.routing.items():
        before = progress.selected_tokens.get(str(layer), 0.0)
        progress.selected_tokens[str(layer)] = before + measured["fraction"] * horizon.step_tokens


def diagnosis(progress: Progress, result: StepResult) -> str:
    """Which losses are not finite, and since when."""
    wrong = ", ".join(f"{name}={value}" for name, value in result.losses.items() if value - value != 0)
    return (
        f"training diverged: {progress.skipped_in_a_row} steps in a row up to step {progress.step} were not "
        f"finite ({wrong}); lower training.optimizer.lr"
    )
