"""What routed models computed: of the test split, of each domain and task, and while they were timed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dynamic_transformers.comparison.statistics import (
    ROUTED_FRACTION_TOLERANCE,
    Group,
    Interval,
    Run,
    mean_interval,
)

MARK = "†"  # beside a speed that was not measured at the fraction of the test split
FIGURES = ("routed_fraction", "routed_fraction_sd", "forward_flops_per_token")  # beside a task's scores
WORK = {"prefill": "prefill", "decode": "decoding"}


def timed_fraction(run: Run, work: str) -> float | None:
    """Fraction of the tokens timed in `prefill` or `decode` that routed layers computed, mean over layers."""
    layers = (run["efficiency"]["timed_routed_fraction"] or {}).get(work)
    return statistics.fmean(layers.values()) if layers else None


def off_fraction(run: Run, work: str) -> bool:
    """Whether the timed forwards did other work than the test split makes the model do.

    They computed all or none of the tokens in routed layers, or more than 20 % more or fewer than of the
    split. A capacity of 1 asks for all.
    """
    timed = timed_fraction(run, work)
    if timed is None:
        return False
    if timed in (0, 1):
        return not all(layer["target"] == timed for layer in run["efficiency"]["routed_fraction"].values())
    usual = run["efficiency"]["mean_routed_fraction"]["mean"]
    return abs(timed - usual) > ROUTED_FRACTION_TOLERANCE * usual


def marked(cell: str, group: Group, work: str) -> str:
    """A speed's cell, with a mark where a run of the group was timed at another fraction."""
    return f"{cell} {MARK}" if any(off_fraction(run, work) for run in group.runs) else cell


def timing_warnings(groups: Sequence[Group]) -> list[str]:
    """A sentence for each speed that is marked: the run that is furthest off."""
    found = []
    for group in groups:
        for work, name in WORK.items():
            off = [
                (timed, run["efficiency"]["mean_routed_fraction"]["mean"])
                for run in group.runs
                if off_fraction(run, work) and (timed := timed_fraction(run, work)) is not None
            ]
            if off:
                timed, usual = max(off, key=lambda pair: abs(pair[0] - pair[1]))
                found.append(
                    f"{MARK} {group.label}: timed {name} computed {timed:.3f} of the tokens in routed "
                    f"layers, the test split {usual:.3f}: this is not the model's speed on the test split."
                )
    return found


@dataclass(frozen=True)
class Computed:
    """What a group of runs computed of one text, mean over seeds.

    Attributes:
        fraction: of the tokens, mean over routed layers; None where nothing is routed.
        sd: its standard deviation over rows.
        flops: per token of a forward; None where no run has read the text.
    """

    fraction: Interval | None
    sd: float | None
    flops: Interval | None


def computed_texts(groups: Sequence[Group]) -> dict[str, list[Computed]]:
    """The test split, each of its domains, each task → what each group computed of it."""
    of_groups = [[_texts(run) for run in group.runs] for group in groups]
    names = dict.fromkeys(name for runs in of_groups for texts in runs for name in texts)
    return {name: [_computed([texts.get(name) for texts in runs]) for runs in of_groups] for name in names}


def _texts(run: Run) -> dict[str, tuple[float | None, float | None, float]]:
    """Text → mean fraction, standard deviation, FLOPs per token."""
    efficiency = run["efficiency"]
    realised = {"test split": (efficiency["mean_routed_fraction"], efficiency["forward_flops_per_token"])}
    for name, domain in run["eval"]["domains"].items():
        realised[f"test split: {name}"] = domain["fraction"], domain["forward_flops_per_token"]
    texts = {
        name: (fraction and fraction["mean"], fraction and fraction["sd"], flops)
        for name, (fraction, flops) in realised.items()
    }
    return texts | {
        task: tuple(figures.get(key) for key in FIGURES)
        for task, figures in run["bench"].items()
        if "forward_flops_per_token" in figures
    }


def _computed(runs: Sequence[tuple[float | None, float | None, float] | None]) -> Computed:
    fractions, deviations, flops = zip(*(run or (None, None, None) for run in runs), strict=True)
    deviation = mean_interval(deviations)
    return Computed(mean_interval(fractions), deviation and deviation.mean, mean_interval(flops))
