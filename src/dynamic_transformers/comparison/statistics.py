"""Runs gathered into groups (one architecture, its seeds), with intervals and a sceptic's checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit

from dynamic_transformers.settings import ARCHITECTURES, CONTROLS

NAMES = {"standard": "Standard", "mod": "MoD", "sdt": "SDT", "stt": "STT"}
NON_CAUSAL = "non-causal upper bound"
EQUAL_WORK_TOLERANCE = 0.02
ROUTED_FRACTION_TOLERANCE = 0.2  # of the target; a wider miss changes what the FLOP column means

Run = dict[str, Any]
GroupKey = tuple[str, str | None, str | None, bool]  # architecture, selection rule, training rule, causality


@dataclass(frozen=True)
class Interval:
    """A mean over `count` seeds; `half_width` is that of its 95 % interval, None with one seed."""

    mean: float
    half_width: float | None
    count: int


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        training_rule: which selected in training; of a control its selection rule.
        label: name for people; says so when the evaluation was not causal, or the training not by `topk`.
        variant: 0 for the first group of its architecture, 1 for the next (another rule), ...
    """

    architecture: str
    selection_rule: str | None
    training_rule: str | None
    causal: bool
    variant: int
    label: str
    runs: tuple[Run, ...]

    def interval(self, key: str) -> Interval | None:
        """Interval over the seeds of a value named by its dotted path; None where no seed has it."""
        return mean_interval([lookup(run, key) for run in self.runs])


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


def group_key(run: Run) -> GroupKey:
    """What runs must share to count as seeds of one another."""
    return run["architecture"], run["eval"]["selection_rule"], run["training_rule"], run["eval"]["causal"]


def named_rules(run: Run, selection: bool) -> list[str]:
    """The rules in a run's name: its selection rule if `selection`, a training rule other than `topk`."""
    rule, training = run["eval"]["selection_rule"], run["training_rule"]
    named = [rule] if rule and (selection or rule in CONTROLS) else []
    return named if training in (None, "topk", *CONTROLS) else [*named, f"trained by {training}"]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order standard, MoD, SDT, STT; within one architecture causal rules come first."""
    members: dict[GroupKey, list[Run]] = {}
    for run in runs:
        members.setdefault(group_key(run), []).append(run)

    def place(key: GroupKey) -> tuple:
        architecture, rule, training, causal = key
        return ARCHITECTURES.index(architecture), not causal, rule or "", training != "topk", training or ""

    keys = sorted(members, key=place)
    groups = []
    for key in keys:
        architecture, rule, training, causal = key
        siblings = [sibling for sibling in keys if sibling[0] == architecture]
        named = named_rules(members[key][0], selection=len(siblings) > 1 or not causal)
        label = NAMES[architecture] + (f" ({', '.join(named)})" if named else "")
        if not causal:
            label += f" – {NON_CAUSAL}"
        seeds = tuple(sorted(members[key], key=lambda run: run["seed"]))
        groups.append(Group(architecture, rule, training, causal, siblings.index(key), label, seeds))
    return groups


def baseline_of(groups: Sequence[Group]) -> Group | None:
    """The standard model's group, to which ratios refer."""
    return next((group for group in groups if group.architecture == "standard" and group.causal), None)


def ratio_to(group: Group, baseline: Group | None, key: str, inverse: bool = False) -> Interval | None:
    """Interval of value ÷ the standard model's (`inverse`: standard's ÷ value, so a speed becomes a time).

    Each seed is held against the standard run of the same seed, one that standard lacks against the mean over
    standard's seeds. None without a standard run.
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


def separated(a: Interval, b: Interval) -> bool:
    """Whether two 95 % intervals do not overlap; never with a single seed on either side."""
    if a.half_width is None or b.half_width is None:
        return False
    return abs(a.mean - b.mean) > a.half_width + b.half_width


def flops_spread(runs: Sequence[Run]) -> float:
    """Spread of training FLOPs over runs: largest ÷ smallest − 1."""
    flops = [run["training_flops"] for run in runs]
    return max(flops) / min(flops) - 1


def percent(fraction: float) -> str:
    """A small fraction for people: `0.4 %`, `< 0.1 %`."""
    return "< 0.1 %" if 0 < fraction < 0.001 else f"{100 * fraction:.1f} %"


def equal_work(runs: Sequence[Run]) -> bool:
    """Whether the runs spent the same training FLOPs, to within 2 %."""
    return flops_spread(runs) <= EQUAL_WORK_TOLERANCE


def best_group(groups: Sequence[Group]) -> Group | None:
    """The causal group whose test loss lies below every other's, intervals apart, at equal training FLOPs.

    None when there is no such group: fewer than two causal groups, single seeds, overlap, or unequal work.
    """
    causal = [group for group in groups if group.causal]
    losses = {group.label: interval for group in causal if (interval := group.interval("eval.loss"))}
    if len(losses) < 2 or not equal_work([run for group in causal for run in group.runs]):
        return None
    best = min(causal, key=lambda group: losses[group.label].mean)
    others = [loss for label, loss in losses.items() if label != best.label]
    return best if all(separated(losses[best.label], other) for other in others) else None


def warnings(runs: Sequence[Run]) -> list[str]:
    """Everything that limits what the comparison may claim, one plain sentence each."""
    found = []
    spread = flops_spread(runs)
    if not equal_work(runs):
        found.append(
            f"Training FLOPs differ by {percent(spread)} between runs (more than "
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
    groups = group_runs(runs)
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
