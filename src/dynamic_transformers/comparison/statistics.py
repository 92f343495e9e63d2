"""Runs gathered into groups (one variant at one point, its seeds), with intervals and a sceptic's checks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit

NON_CAUSAL = "non-causal upper bound"
EQUAL_WORK_TOLERANCE = 0.02
ROUTED_FRACTION_TOLERANCE = 0.2  # of the target; a wider miss changes what the FLOP column means

Run = dict[str, Any]


@dataclass(frozen=True)
class Interval:
    """A mean over `count` seeds; `half_width` is that of its 95 % interval, None with one seed."""

    mean: float
    half_width: float | None
    count: int


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed: a variant at a point of the grid.

    Attributes:
        variant: its label in the study.
        point: setting → value, without the seed.
        training_rule: which selected in training; of a control its selection rule.
        label: for people: the variant, its point where there are several, and whether it was not causal.
        place: of the variant among all, which decides its colour.
        line: of the point among all, which decides how it is drawn.
    """

    variant: str
    point: dict[str, Any]
    architecture: str
    selection_rule: str | None
    training_rule: str | None
    causal: bool
    label: str
    place: int
    line: int
    runs: tuple[Run, ...]

    @property
    def dense(self) -> bool:
        """Whether every layer computes every token."""
        return self.selection_rule is None

    def interval(self, key: str) -> Interval | None:
        """Interval over the seeds of a value named by its dotted path; None where no seed has it."""
        return mean_interval([lookup(run, key) for run in self.runs])


@dataclass(frozen=True)
class Comparison:
    """What stands beside one another.

    Attributes:
        groups: in the order in which their runs came.
        baseline: label of the variant that ratios and differences refer to; None: there are none.
    """

    groups: tuple[Group, ...]
    baseline: str | None

    @classmethod
    def of(cls, runs: Sequence[Run], baseline: str | None) -> Comparison:
        """Of the runs of a comparison.json."""
        return cls(tuple(group_runs(runs)), baseline)

    @property
    def runs(self) -> list[Run]:
        """All runs, group by group."""
        return [run for group in self.groups for run in group.runs]

    def baseline_of(self, group: Group) -> Group | None:
        """The baseline at the same point; None where there is none, and of the baseline itself."""
        found = [
            other for other in self.groups if other.variant == self.baseline and other.point == group.point
        ]
        return found[0] if found and found[0] is not group else None

    @property
    def flops_spread(self) -> float:
        """Largest training FLOPs ÷ the smallest − 1, of the point of the grid where that is most."""
        spreads = []
        for point in {group.line for group in self.groups}:
            flops = [
                run["training_flops"] for group in self.groups if group.line == point for run in group.runs
            ]
            spreads.append(max(flops) / min(flops) - 1)
        return max(spreads)

    @property
    def equal_work(self) -> bool:
        """Whether runs of one point spent the same training FLOPs, to within 2 %."""
        return self.flops_spread <= EQUAL_WORK_TOLERANCE

    def is_best(self, group: Group) -> bool:
        """Whether its test loss lies below every other causal group's of its point, intervals apart.

        Never with a single seed, by itself, or at unequal training FLOPs.
        """
        rivals = [
            other for other in self.groups if other.causal and other.line == group.line and other is not group
        ]
        loss = group.interval("eval.loss")
        if not rivals or loss is None or not group.causal or not self.equal_work:
            return False
        losses = [interval for rival in rivals if (interval := rival.interval("eval.loss"))]
        return all(loss.mean < other.mean and separated(loss, other) for other in losses)

    def is_baseline(self, group: Group) -> bool:
        """Whether ratios refer to it."""
        return group.variant == self.baseline

    def equal_cost_of(self, group: Group) -> Group | None:
        """Of a routed group the dense one at the same point whose forward FLOPs per token are nearest.

        None where there is no dense one but the baseline.
        """
        dense = [other for other in self.groups if other.dense and other.point == group.point]
        if group.dense or all(self.is_baseline(other) for other in dense):
            return None
        return min(dense, key=lambda other: abs(math.log(cost_ratio(group, other))))


def cost_ratio(group: Group, other: Group) -> float:
    """Forward FLOPs per token ÷ those of the other."""
    ratio = ratio_to(group, other, "efficiency.forward_flops_per_token")
    assert ratio is not None
    return ratio.mean


def lookup(run: Run, key: str) -> Any:
    """Value at a dotted path (`eval.loss`) of a run; None where the path ends earlier in a null."""
    value: Any = run
    for part in key.split("."):
        if value is None:
            return None
        value = value[part]
    return value


def mean_interval(values: Sequence[float | None]) -> Interval | None:
    """Mean and 95 % interval (Student t, n − 1 degrees of freedom) of the values that are there."""
    present = [value for value in values if value is not None]
    count = len(present)
    if count == 0:
        return None
    mean = math.fsum(present) / count
    if count == 1:
        return Interval(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in present) / (count - 1)
    return Interval(mean, float(stdtrit(count - 1, 0.975)) * math.sqrt(variance / count), count)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order in which their first runs stand."""
    members: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        members.setdefault((run["variant"], json.dumps(run["point"], sort_keys=True)), []).append(run)
    variants = list(dict.fromkeys(variant for variant, _ in members))
    points = list(dict.fromkeys(point for _, point in members))
    groups = []
    for (variant, point), of_group in members.items():
        first = of_group[0]
        evaluation = first["eval"]
        place = point_text(first["point"])
        label = f"{variant}, {place}" if place and len(points) > 1 else variant
        groups.append(
            Group(
                variant=variant,
                point=first["point"],
                architecture=first["architecture"],
                selection_rule=evaluation["selection_rule"],
                training_rule=first["training_rule"],
                causal=evaluation["causal"],
                label=label if evaluation["causal"] else f"{label} – {NON_CAUSAL}",
                place=variants.index(variant),
                line=points.index(point),
                runs=tuple(sorted(of_group, key=lambda run: run["seed"])),
            )
        )
    return groups


def point_text(point: dict[str, Any]) -> str:
    """A point of the grid for people: `max_flops 1e+13`."""
    return ", ".join(
        f"{key.rpartition('.')[2]} {f'{value:g}' if isinstance(value, float) else value}"
        for key, value in point.items()
    )


def ratio_to(group: Group, baseline: Group | None, key: str, inverse: bool = False) -> Interval | None:
    """Interval of value ÷ the baseline's (`inverse`: baseline's ÷ value, so a speed becomes a time).

    Each seed is held against the baseline's run of the same seed, one that it lacks against the mean over the
    baseline's seeds. None without a baseline.
    """
    if baseline is None or (mean := baseline.interval(key)) is None:
        return None
    by_seed = {run["seed"]: lookup(run, key) for run in baseline.runs}
    ratios = []
    for run in group.runs:
        value, reference = lookup(run, key), by_seed.get(run["seed"])
        reference = mean.mean if reference is None else reference
        ratios.append(None if value is None else reference / value if inverse else value / reference)
    return mean_interval(ratios)


def difference_to(group: Group, baseline: Group, value: Callable[[Run], float | None]) -> Interval | None:
    """Interval of value − the baseline's, paired over seeds; None where they share none."""
    by_seed = {run["seed"]: value(run) for run in baseline.runs}
    pairs = [(value(run), by_seed.get(run["seed"])) for run in group.runs]
    return mean_interval([ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None])


def separated(a: Interval, b: Interval) -> bool:
    """Whether two 95 % intervals do not overlap; never with a single seed on either side."""
    if a.half_width is None or b.half_width is None:
        return False
    return abs(a.mean - b.mean) > a.half_width + b.half_width


def percent(fraction: float) -> str:
    """A small fraction for people: `0.4 %`, `< 0.1 %`."""
    return "< 0.1 %" if 0 < fraction < 0.001 else f"{100 * fraction:.1f} %"


def warnings(comparison: Comparison) -> list[str]:
    """Everything that limits what the comparison may claim, one plain sentence each."""
    found, runs, groups = [], comparison.runs, comparison.groups
    if not comparison.equal_work:
        found.append(
            f"Training FLOPs differ by {percent(comparison.flops_spread)} between runs (more than "
            f"{100 * EQUAL_WORK_TOLERANCE:.0f} %): this is not an isoFLOP comparison."
        )
    if len({run["reference"]["test_sha256"] for run in runs}) > 1:
        found.append(
            "The runs were not all tested on the same split: differences of loss include differences of data."
        )
    if len(precisions := sorted({run["eval"]["dtype"] for run in runs})) > 1:
        found.append(
            f"The runs were evaluated in different precisions ({', '.join(precisions)}), which changes "
            "losses, speeds and KV bytes."
        )
    if len({run["reference"]["tokenizer_sha256"] for run in runs}) > 1:
        found.append("The runs have different tokenizers: compare bits per byte, not losses per token.")
    data: dict[int, set[str]] = {}
    for run in runs:
        data.setdefault(run["seed"], set()).add(run["reference"]["data_digest"])
    if any(len(digests) > 1 for digests in data.values()):
        found.append(
            "Runs of the same seed were trained on different data: differences of loss include those of data."
        )
    if single := [group.label for group in groups if len(group.runs) == 1]:
        who = "" if len(single) == len(groups) else f" ({', '.join(single)})"
        found.append(f"1 seed{who}: differences are not significant by themselves.")
    if upper := [group.label for group in groups if not group.causal]:
        found.append(
            f"{'; '.join(upper)}: the selection rule looks at later tokens, so no model that generates "
            "text can reach this loss; it is never counted as best."
        )
    found.extend(_missed_targets(groups))
    return found


def _missed_targets(groups: Sequence[Group]) -> list[str]:
    found = []
    for group in groups:
        missed = [
            (abs(fraction["eval"] / fraction["target"] - 1), layer, fraction)
            for run in group.runs
            for layer, fraction in run["efficiency"]["routed_fraction"].items()
            if fraction["target"] and fraction["eval"] is not None
        ]
        if missed and max(missed, key=lambda miss: miss[0])[0] > ROUTED_FRACTION_TOLERANCE:
            _, layer, fraction = max(missed, key=lambda miss: miss[0])
            found.append(
                f"{group.label} misses its routing target: layer {layer} routes {fraction['eval']:.3f} "
                f"of the tokens in evaluation, target {fraction['target']:.3f}."
            )
    return found
