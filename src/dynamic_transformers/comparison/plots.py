"""The four plots, PNG and SVG. On `Figure` objects: no display and no global pyplot state is needed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dynamic_transformers.comparison.realised import marked
from dynamic_transformers.comparison.statistics import Comparison, Group, Run, lookup, ratio_to
from dynamic_transformers.comparison.tables import CHANCE, bench_tasks, bench_value, headline_metric

# Of the variants, in turn: Okabe and Ito's palette, which the common forms of colour blindness leave apart,
# and a marker each, for print in black and white.
COLOURS = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a6761d")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Of the points of the grid, in turn.
LINE_STYLES = ("-", "--", ":", "-.")
HATCHES = ("", "///", "...", "xxx")
SMOOTHING = 5
WIDTH = 10  # inches, of every figure: the report scales them alike
DPI = 150
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "hatch.color": "white",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "the same ids each time",
}


def write_plots(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Draw all plots of a comparison into `folder`; returns the SVG files by name of the plot."""
    draw: dict[str, Callable[[Comparison], Figure]] = {
        "loss_vs_flops": plot_loss,
        "bench": plot_bench,
        "efficiency": plot_efficiency,
        "routed_fraction": plot_routed_fraction,
    }
    for name, plot in draw.items():
        # Layout is solved while saving, so the style must hold until then.
        with rc_context(STYLE):
            figure = plot(comparison)
            figure.savefig(folder / f"{name}.png", dpi=DPI, facecolor="white")
            figure.savefig(folder / f"{name}.svg", facecolor="white", metadata={"Date": None})
    return {name: folder / f"{name}.svg" for name in draw}


def smoothed(values: Sequence[float], window: int = SMOOTHING) -> list[float]:
    """Centred mean over `window` (odd) values, at both ends over those of them that there are."""
    reach = window // 2
    parts = [values[max(0, index - reach) : index + reach + 1] for index in range(len(values))]
    return [math.fsum(part) / len(part) for part in parts]


def colour_of(group: Group) -> str:
    """That of the variant, which is the same in every plot."""
    return COLOURS[group.place % len(COLOURS)]


def plot_loss(comparison: Comparison) -> Figure:
    """Loss against training FLOPs: whole run, and its last half enlarged."""
    groups, runs = comparison.groups, comparison.runs
    figure = Figure(figsize=(WIDTH, 5.2))
    panels: list[Axes] = list(figure.subplots(1, 2))
    unigram = math.fsum(run["reference"]["unigram_loss"] for run in runs) / len(runs)
    zoom_start = 0.5 * min(run["training_flops"] for run in runs)
    zoomed: list[float] = []
    for group in groups:
        line = {"color": colour_of(group), "ls": LINE_STYLES[group.line % 4], "lw": 1.3}
        for run in group.runs:
            train, held_out = _curve(run, "train/loss"), _curve(run, "eval/loss")
            train = list(zip([x for x, _ in train], smoothed([y for _, y in train]), strict=True))
            for panel in panels:
                panel.plot(*_columns(train), **line, alpha=0.75)
                panel.plot(*_columns(held_out), **_marker(group), ls="", ms=6.5, zorder=3)
            zoomed += [y for x, y in [*train, *held_out] if x >= 0.95 * zoom_start]
    if not zoomed:
        return _message("No loss history in these evaluations.")
    for panel in panels:
        panel.axhline(unigram, color="#999999", ls=(0, (6, 3)), lw=1.3, zorder=1)
        panel.set_xlabel("training FLOPs")
    margin = 0.08 * (max(zoomed) - min(zoomed)) or 0.05
    panels[1].set_ylim(min(zoomed) - margin, max(zoomed) + margin)
    panels[1].set_xlim(0.95 * zoom_start, 1.03 * max(run["training_flops"] for run in runs))
    panels[0].set_ylabel("loss (nats/token)")
    panels[0].set_title("whole run")
    panels[1].set_title("second half")
    handles = [
        Line2D([], [], **_marker(group), ls=LINE_STYLES[group.line % 4], label=group.label)
        for group in groups
    ]
    explained = [
        Line2D([], [], color="#777777", lw=1.3, label="line: training loss"),
        Line2D([], [], color="#777777", marker="o", ls="", label="marker: validation loss"),
        Line2D([], [], color="#999999", ls=(0, (6, 3)), label=f"unigram {unigram:.2f}"),
    ]
    figure.legend(handles=[*handles, *explained], loc="outside lower center", ncols=4)
    return figure


def plot_bench(comparison: Comparison) -> Figure:
    """Accuracies as bars from zero, bits per byte as points in a panel of their own."""
    groups = comparison.groups
    metrics = {task: headline_metric(names) for task, names in bench_tasks(groups).items()}
    perplexities = [task for task, metric in metrics.items() if metric == "bits_per_byte"]
    accuracies = [task for task, metric in metrics.items() if metric and task not in perplexities]
    if not perplexities and not accuracies:
        return _message("No benchmark results in these evaluations.")
    shown = [tasks for tasks in (accuracies, perplexities) if tasks]
    rows = max(len(tasks) for tasks in shown)
    figure = Figure(figsize=(WIDTH, 1.9 + rows * (0.35 + 0.2 * len(groups))))
    panels: list[Axes] = list(figure.subplots(1, len(shown), squeeze=False)[0])
    step = 0.8 / len(groups)
    for panel, tasks in zip(panels, shown, strict=True):
        for row, task in enumerate(tasks):
            for index, group in enumerate(groups):
                _bench_mark(panel, group, task, metrics[task] or "", row - 0.4 + (index + 0.5) * step, step)
            if task in CHANCE and tasks is accuracies:
                panel.plot([CHANCE[task]] * 2, [row - 0.46, row + 0.46], color="black", ls="--", lw=1.4)
        panel.set_yticks(range(len(tasks)), tasks)
        panel.set_ylim(len(tasks) - 0.45, -0.55)
        panel.grid(visible=False, axis="y")
        if tasks is accuracies:
            panel.set_xlim(left=0)
            panel.set_xlabel("accuracy (higher is better)")
        else:
            panel.margins(x=0.08)
            panel.set_xlabel("bits per byte (lower is better)")
    handles = [Line2D([], [], **_marker(group), ls="", ms=8, label=group.label) for group in groups]
    if any(task in CHANCE for task in accuracies):
        handles.append(Line2D([], [], color="black", ls="--", lw=1.4, label="chance (0.25)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if len(groups) > 4 else 5)
    return figure


def plot_efficiency(comparison: Comparison) -> Figure:
    """Forward FLOPs beside measured times, both as ratios to the baseline."""
    pairs = [(group, other) for group in comparison.groups if (other := comparison.baseline_of(group))]
    if not pairs:
        return _message("Ratios need the baseline and at least one other variant.")
    measures = (
        ("forward FLOPs per token (counted)", "efficiency.forward_flops_per_token", "#56b4e9", ""),
        ("prefill time per token (measured)", "efficiency.prefill_tokens_per_second", "#e69f00", "///"),
        ("decode time per token (measured)", "efficiency.decode_tokens_per_second", "#cc79a7", "..."),
    )
    figure = Figure(figsize=(WIDTH, 4.6))
    panel = figure.subplots()
    width, tops = 0.27, [1.0]
    for index, (_, key, colour, hatch) in enumerate(measures):
        for place, (group, baseline) in enumerate(pairs):
            x = place + (index - 1) * width
            ratio = ratio_to(group, baseline, key, inverse=key.endswith("per_second"))
            if ratio is None:
                panel.annotate("n/a", (x, 0), (0, 3), textcoords="offset points", ha="center")
                continue
            panel.bar(x, ratio.mean, 0.92 * width, color=colour, hatch=hatch, lw=0)
            if ratio.half_width is not None and ratio.half_width > 0.001:
                panel.errorbar(x, ratio.mean, ratio.half_width, color="black", capsize=3, lw=1.2)
            top = ratio.mean + (ratio.half_width or 0)
            box = {
                "facecolor": "white",
                "edgecolor": "none",
                "pad": 0.5,
            }  # keeps the line at 1 out of the text
            work = key.removeprefix("efficiency.").removesuffix("_tokens_per_second")
            text = marked(f"{ratio.mean:.2f}", group, work)
            panel.annotate(text, (x, top), (0, 4), textcoords="offset points", ha="center", bbox=box)
            tops.append(top)
    panel.axhline(1, color="#4d4d4d", lw=1.3)
    panel.set_ylim(0, 1.14 * max(tops))
    margin = 0.6 + max(0, 3 - len(pairs)) / 2
    panel.set_xlim(-margin, len(pairs) - 1 + margin)
    panel.set_xticks(range(len(pairs)), [_wrapped(group.label, 20) for group, _ in pairs])
    panel.set_ylabel(f"ratio to {comparison.baseline} (lower is cheaper)")
    panel.grid(visible=False, axis="x")
    handles = [panel.bar(0, 0, color=colour, hatch=hatch, label=name) for name, _, colour, hatch in measures]
    line = Line2D([], [], color="#4d4d4d", lw=1.3, label=f"{comparison.baseline} = 1")
    figure.legend(handles=[*handles, line], loc="outside lower center", ncols=2)
    return figure


def plot_routed_fraction(comparison: Comparison) -> Figure:
    """Target, training and evaluation fractions of selected tokens per routed layer; spread over rows."""
    routed = [group for group in comparison.groups if any(_fractions(run) for run in group.runs)]
    if not routed:
        return _message("No routed layers in these models.")
    columns = len(routed) if len(routed) <= 3 else math.ceil(len(routed) / 2)
    lines = math.ceil(len(routed) / columns)
    figure = Figure(figsize=(WIDTH, 2.9 * lines + 0.7))
    panels: list[Axes] = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for panel, group in zip(panels, routed, strict=False):
        colour = colour_of(group)
        layers = sorted({int(layer) for run in group.runs for layer in _fractions(run)})
        place = {layer: index for index, layer in enumerate(layers)}
        for run in group.runs:
            for layer, fraction in _fractions(run).items():
                x = place[int(layer)]
                # Null becomes NaN, which matplotlib leaves out.
                target, train, evaluation, spread = (
                    math.nan if (value := fraction[name]) is None else value
                    for name in ("target", "train", "eval", "eval_sd")
                )
                panel.plot([x - 0.38, x + 0.38], [target] * 2, color="black", lw=2, zorder=2)
                panel.plot([x - 0.16], [train], "o", mfc="white", mec=colour, mew=1.6, ms=7, zorder=3)
                panel.errorbar(
                    x + 0.16,
                    evaluation,
                    spread,
                    fmt="o",
                    color=colour,
                    alpha=0.8,
                    ms=7,
                    elinewidth=1,
                    zorder=3,
                )
        every = math.ceil(len(layers) / 12)
        panel.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
        panel.set_xlim(-0.6, len(layers) - 0.4)
        panel.set_title(_wrapped(group.label, 26), color=colour)
        panel.set_xlabel("layer")
        panel.grid(visible=False, axis="x")
    for panel in panels[len(routed) :]:
        panel.set_visible(False)
    highest = max(panel.get_ylim()[1] for panel in panels[: len(routed)])
    panels[0].set_ylim(0, max(1.1 * highest, 0.05))
    for row in range(lines):
        panels[row * columns].set_ylabel("fraction of tokens selected")
    handles = [
        Line2D([], [], color="black", lw=2, label="target"),
        Line2D([], [], marker="o", mfc="white", mec="#555555", mew=1.6, ms=7, ls="", label="training"),
        Line2D([], [], marker="o", color="#555555", ms=7, ls="", label="evaluation"),
        Line2D([], [], color="#555555", lw=1, label="standard deviation over rows"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _marker(group: Group) -> dict[str, Any]:
    """Marker of a group: filled at the first point of the grid, hollow at others."""
    colour = colour_of(group)
    return {
        "color": colour,
        "marker": MARKERS[group.place % len(MARKERS)],
        "mec": colour,
        "mfc": "white" if group.line or not group.causal else colour,
    }


def _bench_mark(panel: Axes, group: Group, task: str, metric: str, y: float, step: float) -> None:
    value, error = bench_value(group, task, metric)
    if value is None:
        return
    if metric == "bits_per_byte":
        panel.plot(value.mean, y, **_marker(group), ms=7, ls="", zorder=3)
    else:
        hatch = HATCHES[group.line % 4] if group.causal else "///"
        panel.barh(y, value.mean, 0.9 * step, color=colour_of(group), hatch=hatch, lw=0)
    if error is not None:
        panel.errorbar(value.mean, y, xerr=error, color="black", capsize=2.5, lw=1.1, zorder=2.5)
    if len(group.runs) > 1:
        seeds = [lookup(run, "bench").get(task, {}).get(metric) for run in group.runs]
        present = [seed for seed in seeds if seed is not None]
        panel.plot(present, [y] * len(present), "o", ms=3, color="white", mec="black", mew=0.7, zorder=4)


def _fractions(run: Run) -> dict[str, dict[str, float | None]]:
    return run["efficiency"]["routed_fraction"] or {}


def _curve(run: Run, key: str) -> list[tuple[float, float]]:
    return [(row["training_flops"], row[key]) for row in run["history"] if row.get(key) is not None]


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _wrapped(label: str, width: int) -> str:
    return textwrap.fill(label, width, break_on_hyphens=False)


def _message(text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure = Figure(figsize=(WIDTH, 1.2))
    figure.text(0.5, 0.5, text, ha="center", va="center", color="#555555")
    return figure
