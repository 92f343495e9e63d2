"""report.html: one file that a reader can open anywhere, print and check."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from dynamic_transformers.comparison.plots import CHANCE, SMOOTHING
from dynamic_transformers.comparison.realised import MARK, marked, timing_warnings
from dynamic_transformers.comparison.statistics import (
    EQUAL_WORK_TOLERANCE,
    NAMES,
    NON_CAUSAL,
    ROUTED_FRACTION_TOLERANCE,
    Group,
    Run,
    baseline_of,
    equal_work,
    flops_spread,
    group_runs,
    mean_interval,
    named_rules,
    percent,
    ratio_to,
    separated,
    warnings,
)
from dynamic_transformers.comparison.tables import (
    ABSENT,
    bench_table,
    main_table,
    realised_table,
    with_interval,
)
from dynamic_transformers.settings import CONTROLS

TEMPLATE_DIR = Path(__file__).parent
TRAINING = {
    "topk": "topk, which is not causal",
    "threshold": "topk at first, then threshold, which is causal",
    **{rule: f"{rule}, as in evaluation" for rule in CONTROLS},
}


def render_report(
    runs: Sequence[Run],
    manifests: Sequence[dict[str, Any]],
    plots: dict[str, Path],
    routing: dict[str, Path],
    title: str,
) -> str:
    """HTML of the report.

    Args:
        runs: checked runs, in the order of the table.
        manifests: the evaluation's manifest of each run.
        plots: PNG files by name; they are embedded.
        routing: PNG of the routing of a text, by run.
        title: heading.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_DIR), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    bench_headers, bench_rows = bench_table(runs)
    realised_headers, realised_rows = realised_table(runs)
    return environment.get_template("report.html.j2").render(
        title=title,
        summary=summary(runs),
        warnings=[*warnings(runs), *timing_warnings(group_runs(runs))],
        table=main_table(runs),
        bench_headers=bench_headers,
        bench_rows=bench_rows,
        realised_headers=realised_headers,
        realised_rows=realised_rows,
        mark=MARK,
        prompts=_prompts(group_runs(runs)),
        plots={name: _data_uri(path) for name, path in plots.items()},
        routing={name: _data_uri(path) for name, path in routing.items()},
        smoothing=SMOOTHING,
        chance=", ".join(sorted({f"{level:.2f}" for level in CHANCE.values()})),
        training=_training(group_runs(runs)),
        rules=[_rule(group) for group in group_runs(runs)],
        has_stt=any(run["architecture"] == "stt" for run in runs),
        non_causal=NON_CAUSAL,
        tolerance=f"{100 * EQUAL_WORK_TOLERANCE:.0f} %",
        tolerance_routed=f"{100 * ROUTED_FRACTION_TOLERANCE:.0f} %",
        lineage=[_lineage(run, manifest) for run, manifest in zip(runs, manifests, strict=True)],
        packages=_packages(runs, manifests),
    )


def summary(runs: Sequence[Run]) -> str:
    """One paragraph of plain statements made from the numbers."""
    groups = group_runs(runs)
    baseline = baseline_of(groups)
    sentences = []
    for group in groups:
        loss = group.interval("eval.loss")
        assert loss is not None
        sentence = f"{group.label} reaches a test loss of {with_interval(loss, 3)} nats/token"
        if baseline is not None and group is not baseline:
            sentence += f", {_against(group, baseline)}"
            flops = ratio_to(group, baseline, "efficiency.forward_flops_per_token")
            speed = ratio_to(group, baseline, "efficiency.prefill_tokens_per_second")
            assert flops is not None and speed is not None
            sentence += f", with {flops.mean:.2f} times its forward FLOPs per token"
            sentence += marked(f" and {speed.mean:.2f} times its prefill speed", group, "prefill")
        sentences.append(sentence + ".")
    unigram = mean_interval([run["reference"]["unigram_loss"] for run in runs])
    assert unigram is not None
    sentences.append(f"A unigram model has {unigram.mean:.3f}.")
    if len(runs) > 1:
        spread = percent(flops_spread(runs))
        sentences.append(
            f"Training FLOPs are equal (spread over runs {spread})."
            if equal_work(runs)
            else f"Training FLOPs differ by {spread}: this is not an isoFLOP comparison."
        )
    return " ".join(sentences)


def _against(group: Group, baseline: Group) -> str:
    loss, reference = group.interval("eval.loss"), baseline.interval("eval.loss")
    assert loss is not None and reference is not None
    difference = loss.mean - reference.mean
    if f"{abs(difference):.3f}" == "0.000":
        text = "equal to standard to three decimals"
    else:
        text = f"{abs(difference):.3f} {'below' if difference < 0 else 'above'} standard"
    if loss.half_width is not None and reference.half_width is not None:
        text += f" ({'intervals apart' if separated(loss, reference) else 'intervals overlap'})"
    return text


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
    rules = named_rules(run, selection=True)
    name = NAMES[run["architecture"]] + (f" ({', '.join(rules)})" if rules else "")
    return {
        "name": name if run["eval"]["causal"] else f"{name} – {NON_CAUSAL}",
        "seed": str(run["seed"]),
        "model_dir": run["model_dir"],
        "config_digest": run["variant"],
        "evaluation_digest": manifest["digest"],
        "git_revision": manifest["git_revision"],
        "mlflow_run_id": run["mlflow_run_id"] or ABSENT,
    }


def _packages(runs: Sequence[Run], manifests: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Each set of package versions once, with the runs that were evaluated with it."""
    users: dict[str, list[str]] = {}
    for run, manifest in zip(runs, manifests, strict=True):
        versions = {"dynamic-transformers": manifest["package_version"], **manifest["packages"]}
        text = ", ".join(f"{name} {version}" for name, version in versions.items())
        users.setdefault(text, []).append(f"{NAMES[run['architecture']]} seed {run['seed']}")
    if len(users) == 1:
        return [{"runs": "all runs", "versions": next(iter(users))}]
    return [{"runs": ", ".join(names), "versions": versions} for versions, names in users.items()]


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
