"""report.html: one file that a reader can open anywhere, print and check."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynamic_transformers.comparison.plots import SMOOTHING
from dynamic_transformers.comparison.realised import MARK
from dynamic_transformers.comparison.statistics import (
    EQUAL_WORK_TOLERANCE,
    NON_CAUSAL,
    ROUTED_FRACTION_TOLERANCE,
    Comparison,
    Group,
    Run,
    cost_ratio,
    difference_to,
    mean_interval,
    percent,
    point_text,
)
from dynamic_transformers.comparison.tables import (
    ABSENT,
    AT_CHANCE,
    CHANCE,
    bench_table,
    main_table,
    realised_table,
    with_interval,
)
from dynamic_transformers.data.preview import TEMPLATES, Preview
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.settings import CONTROLS
from dynamic_transformers.templates import template

TEMPLATE_DIR = Path(__file__).parent
EQUAL_COST = 1.15  # most that forward FLOPs of models of equal cost differ by, as a factor
TRAINING = {
    "topk": "topk, which is not causal",
    "threshold": "topk at first, then threshold, which is causal",
    **{rule: f"{rule}, as in evaluation" for rule in CONTROLS},
}


def render_report(
    comparison: Comparison,
    manifests: Sequence[dict[str, Any]],
    plots: dict[str, Path],
    routing: dict[str, Path],
    data: Sequence[tuple[Sequence[str], Preview]],
    title: str,
    study: Path | None = None,
) -> str:
    """HTML of the report.

    Args:
        comparison: checked runs, in the order of the table.
        manifests: the evaluation's manifest of each run, in that order.
        plots: SVG files by name; they are embedded.
        routing: PNG of the routing of a text, by run.
        data: what runs were trained on, with the names of these runs.
        title: heading.
        study: file with the whole configuration, if it is known.
    """
    groups, runs = comparison.groups, comparison.runs
    bench_headers, bench_rows = bench_table(comparison)
    realised_headers, realised_rows = realised_table(comparison)
    return template("report.html.j2", TEMPLATE_DIR, TEMPLATES).render(
        title=title,
        summary=summary(comparison),
        table=main_table(comparison),
        bench_headers=bench_headers,
        bench_rows=bench_rows,
        realised_headers=realised_headers,
        realised_rows=realised_rows,
        mark=MARK,
        prompts=_prompts(groups),
        plots={name: _data_uri(path) for name, path in plots.items()},
        routing={name: _data_uri(path) for name, path in routing.items()},
        data=data,
        smoothing=SMOOTHING,
        chance=", ".join(sorted({f"{level:.2f}" for level in CHANCE.values()})),
        at_chance=AT_CHANCE,
        training=_training(groups),
        rules=[_rule(group) for group in groups],
        training_notes=_training_notes(groups),
        baseline=comparison.baseline,
        non_causal=NON_CAUSAL,
        tolerance=f"{100 * EQUAL_WORK_TOLERANCE:.0f} %",
        tolerance_routed=f"{100 * ROUTED_FRACTION_TOLERANCE:.0f} %",
        lineage=[_lineage(run, manifest) for run, manifest in zip(runs, manifests, strict=True)],
        packages=_packages(runs, manifests),
        reproduce=study
        and {"file": study.name, "name": study.stem, "revision": manifests[0]["git_revision"]},
    )


def summary(comparison: Comparison) -> list[str]:
    """What the numbers say, a sentence or two for each variant: against the baseline, and against a dense
    model of equal cost.
    """
    unigram = mean_interval([run["reference"]["unigram_loss"] for run in comparison.runs])
    assert unigram is not None
    sentences = [_of_group(comparison, group) for group in comparison.groups]
    sentences.append(f"A unigram model, which knows no context, has {unigram.mean:.3f}.")
    if len(comparison.runs) > 1:
        spread = percent(comparison.flops_spread)
        sentences.append(
            f"All were trained with the same FLOPs (spread over runs {spread})."
            if comparison.equal_work
            else f"Training FLOPs differ by {spread}: this is not an isoFLOP comparison."
        )
    if all(len(group.runs) == 1 for group in comparison.groups):
        sentences.append("With one seed each, no difference is claimed.")
    return sentences


def _of_group(comparison: Comparison, group: Group) -> str:
    loss = with_interval(group.interval("eval.loss"), 3)
    if comparison.is_baseline(group):
        return f"{group.label}, the baseline, has a test loss of {loss} nats per token."
    baseline, dense = comparison.baseline_of(group), comparison.equal_cost_of(group)
    if baseline is None:
        text = f"{_named(group)} has a test loss of {loss} nats per token."
    else:
        cost = cost_ratio(group, baseline)
        text = f"{_named(group)} takes {cost:.2f} times the forward FLOPs of {baseline.label}. "
        text += _against(group, baseline)
    if dense is None:
        return text
    cost = cost_ratio(dense, group)
    nearest = f"is {dense.label}, with {cost:.2f} times the FLOPs of {group.label}"
    if max(cost, 1 / cost) > EQUAL_COST:
        return (
            f"{text} No dense model here costs as much, so this does not show whether routing is worth "
            f"anything: the nearest {nearest}."
        )
    if dense is baseline:
        return f"{text} The dense model of equal cost {nearest}."
    return f"{text} The dense model of equal cost {nearest}. {_against(group, dense)}"


def _named(group: Group) -> str:
    """Its label, and what it sets beside the architecture."""
    overrides = [entry for entry in group.runs[0]["overrides"] if not entry.startswith("model.type=")]
    return f"{group.label} ({', '.join(overrides)})" if overrides else group.label


def _against(group: Group, other: Group) -> str:
    """A sentence: by how much the test loss differs, and whether the seeds tell that from nothing."""
    paired = difference_to(group, other, lambda run: run["eval"]["loss"])
    if paired is None:
        return f"It shares no seed with {other.label}."
    if f"{abs(paired.mean):.3f}" == "0.000":
        text = f"Its test loss is that of {other.label}"
    else:
        which = "lower" if paired.mean < 0 else "higher"
        text = f"Its test loss is {abs(paired.mean):.3f} {which} than that of {other.label}"
    if paired.half_width is None:
        return f"{text}."
    low, high = paired.mean - paired.half_width, paired.mean + paired.half_width
    if low <= 0 <= high:
        return f"{text}, which {paired.count} seeds do not tell from no difference."
    low, high = sorted(map(abs, (low, high)))
    return f"{text} (95 % interval over {paired.count} seeds: {low:.3f} to {high:.3f})."


def _rule(group: Group) -> dict[str, str]:
    if group.selection_rule is None:
        rule = "no selection: every layer computes every token"
    elif group.causal:
        rule = f"{group.selection_rule} (causal)"
    else:
        rule = f"{group.selection_rule} (not causal)"
    return {"label": group.label, "rule": rule, "seeds": ", ".join(str(run["seed"]) for run in group.runs)}


def _training(groups: Sequence[Group]) -> str:
    """By which rules the routed models trained; empty where there is none."""
    by_rule: dict[str, list[str]] = {}
    for group in groups:
        if group.training_rule is not None:
            by_rule.setdefault(group.training_rule, []).append(group.label)
    return "; ".join(f"{', '.join(labels)}: {TRAINING[rule]}" for rule, labels in by_rule.items())


def _training_notes(groups: Sequence[Group]) -> str:
    """What training costs beside the forward and backward of what a model computes."""
    notes = {ARCHITECTURES[group.architecture].training_note: None for group in groups}
    return "; ".join(filter(None, notes))


def _prompts(groups: Sequence[Group]) -> str:
    """On how many blocks of how many tokens speed was measured, group by group where they differ."""
    by_text: dict[str, dict[str, None]] = {}
    for group in groups:
        for run in group.runs:
            prompts = run["efficiency"]["timed_prompts"]
            text = f"{prompts['number']} blocks of the test split, of each {round(prompts['prefill'], 1):g} "
            text += "tokens at once (prefill)"
            if "decode" in prompts:
                text += f", then {round(prompts['decode'], 1):g} one at a time (decode)"
            by_text.setdefault(text, {})[group.label] = None
    if len(by_text) == 1:
        return next(iter(by_text))
    return "; ".join(f"{', '.join(labels)}: {text}" for text, labels in by_text.items())


def _lineage(run: Run, manifest: dict[str, Any]) -> dict[str, str]:
    return {
        "name": name_of(run),
        "architecture": run["architecture"],
        "overrides": " ".join(run["overrides"]) or ABSENT,
        "seed": str(run["seed"]),
        "model_dir": run["model_dir"],
        "config_digest": run["config_digest"],
        "evaluation_digest": manifest["digest"],
        "git_revision": manifest["git_revision"],
        "mlflow_run_id": run["mlflow_run_id"] or ABSENT,
    }


def name_of(run: Run) -> str:
    """Variant and point of a run."""
    return ", ".join(filter(None, [run["variant"], point_text(run["point"])]))


def _packages(runs: Sequence[Run], manifests: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Each set of package versions once, with the runs that were evaluated with it."""
    users: dict[str, list[str]] = {}
    for run, manifest in zip(runs, manifests, strict=True):
        versions = {"dynamic-transformers": manifest["package_version"], **manifest["packages"]}
        text = ", ".join(f"{name} {version}" for name, version in versions.items())
        users.setdefault(text, []).append(f"{name_of(run)} seed {run['seed']}")
    if len(users) == 1:
        return [{"runs": "all runs", "versions": next(iter(users))}]
    return [{"runs": ", ".join(names), "versions": versions} for versions, names in users.items()]


def _data_uri(path: Path) -> str:
    kind = {".png": "image/png", ".svg": "image/svg+xml"}[path.suffix]
    return f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode("ascii")
