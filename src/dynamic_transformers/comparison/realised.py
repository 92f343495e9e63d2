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


def off_fraction(run: Run, work: str) -> tuple[float, str] | None:
    """How far the timed forwards were from the work that the test split makes the model do, and in what.

    They computed more than 20 % more or fewer tokens in the mean over layers, or a layer computed all or none
    of them, though not of the split. A capacity of 1 asks for all. None where neither is so.
    """
    timed = timed_fraction(run, work)
    if timed is None:
        return None
    usual = run["efficiency"]["mean_routed_fraction"]["mean"]
    if abs(timed - usual) > ROUTED_FRACTION_TOLERANCE * usual:
        return abs(timed - usual), f"{timed:.3f} of the tokens in routed layers, the test split {usual:.3f}"
    split = run["efficiency"]["routed_fraction"]
    layers = [
        (abs(fraction - of_split), layer, fraction, of_split)
        for layer, fraction in run["efficiency"]["timed_routed_fraction"][work].items()
        if fraction in (0, 1)
        and (of_split := split[layer]["eval"]) is not None
        and fraction not in (of_split, split[layer]["target"])
    ]
    if not layers:
        return None
    distance, layer, fraction, of_split = max(layers)
    which = "all" if fraction else "none"
    return distance, f"{which} of the tokens in routed layer {layer}, the test split {of_split:.3g}"


def marked(cell: str, group: Group, work: str) -> str:
    """A speed's cell, with a mark where a run of the group was timed at another fraction."""
    return f"{cell} {MARK}" if any(off_fraction(run, work) for run in group.runs) else cell


def timing_warnings(groups: Sequence[Group]) -> list[str]:
    """A sentence for each speed that is marked: the run that is furthest off."""
    sentences = []
    for group in groups:
        for work, name in WORK.items():
            if off := [found for run in group.runs if (found := off_fraction(run, work))]:
                sentences.append(
                    f"{MARK} {group.label}: timed {name} computed {max(off)[1]}: this is not the model's "
                    "speed on the test split."
                )
    return sentences


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
