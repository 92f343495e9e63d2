"""The main table and the bench table, as plain cells that the terminal and the report both show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from dynamic_transformers.comparison.realised import (
    FIGURES,
    WORK,
    computed_texts,
    marked,
    timed_fraction,
    timing_warnings,
)
from dynamic_transformers.comparison.statistics import (
    Comparison,
    Group,
    Interval,
    Run,
    difference_to,
    lookup,
    mean_interval,
    percent,
    ratio_to,
    warnings,
)

ABSENT = "–"
CHANCE = {"dt_cloze": 0.25, "dt_arithmetic": 0.25}  # accuracy of guessing
AT_CHANCE = "≈ chance"
SI_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
LOSS_HEADER = "test loss (nats/token)"
TIMED_HEADER = "routed, timed (prefill / decode)"
# Eleven columns and the label have to fit a terminal of 80, or the log of a build. What is computed of the
# test split stands in a table of its own there.
TERMINAL_HEADERS = {
    "parameters": "params",
    "training FLOPs": "train\nFLOPs",
    "training tokens": "train\ntok.",
    LOSS_HEADER: "test\nloss\nnats",
    "bits per byte": "bits/\nbyte",
    "FLOPs ratio": "FLOPs\nratio",
    "prefill tok/s ratio": "pre-\nfill\nratio",
    "decode tok/s": "dec.\ntok/s",
    TIMED_HEADER: "rout-\ned in\npre./\ndec.",
    "KV bytes/token": "KV B\n/tok.",
    "causal": "cau-\nsal",
}


@dataclass(frozen=True)
class Row:
    """One line of the main table; `best` marks a test loss that is separated from all others."""

    label: str
    cells: tuple[str, ...]
    best: bool = False
    reference: bool = False


@dataclass(frozen=True)
class MainTable:
    """Headers (the label's first), rows, and the sentences that must be read with them.

    Attributes:
        caption: what the figures are.
        warnings: what limits them.
    """

    headers: tuple[str, ...]
    rows: tuple[Row, ...]
    caption: tuple[str, ...]
    warnings: tuple[str, ...]


def si(value: float, unit: str = "") -> str:
    """Three significant digits with an SI prefix: 1234567 → `1.23 M`."""
    if value == 0:
        return f"0 {unit}".strip()
    exponent = min(max(math.floor(math.log10(abs(value)) / 3), 0), len(SI_PREFIXES) - 1)
    if abs(value) / 1000**exponent >= 999.5 and exponent < len(SI_PREFIXES) - 1:
        exponent += 1
    scaled = value / 1000**exponent
    digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
    if exponent == 0 and float(value).is_integer():
        digits = 0
    return f"{scaled:.{digits}f} {SI_PREFIXES[exponent]}{unit}".strip()


def with_interval(interval: Interval | None, digits: int) -> str:
    """`mean ± half width`, the mean alone for one seed, a dash for nothing."""
    if interval is None:
        return ABSENT
    if interval.half_width is None:
        return f"{interval.mean:,.{digits}f}"
    return f"{interval.mean:,.{digits}f} ± {interval.half_width:,.{digits}f}"


def si_interval(interval: Interval | None) -> str:
    """As `with_interval` with SI prefixes; an interval too small to show in three digits is left out."""
    if interval is None:
        return ABSENT
    if interval.half_width is None or interval.half_width < 0.0005 * abs(interval.mean):
        return si(interval.mean)
    return f"{si(interval.mean)} ± {si(interval.half_width)}"


def main_table(comparison: Comparison) -> MainTable:
    """A row for each group, then the unigram reference; the caption carries every warning."""

    def ratio(group: Group, key: str) -> str:
        reference = group if comparison.is_baseline(group) else comparison.baseline_of(group)
        return _rounded(ratio_to(group, reference, key), 2)

    flops = "efficiency.forward_flops_per_token"
    columns: dict[str, Callable[[Group], str]] = {
        "seeds": lambda group: str(len(group.runs)),
        "parameters": lambda group: si_interval(group.interval("parameters")),
        "training FLOPs": lambda group: si_interval(group.interval("training_flops")),
        "training tokens": lambda group: si_interval(group.interval("training_tokens")),
        LOSS_HEADER: lambda group: with_interval(group.interval("eval.loss"), 3),
        "bits per byte": lambda group: with_interval(group.interval("eval.bits_per_byte"), 3),
        "forward FLOPs/token": lambda group: si_interval(group.interval(flops)),
        "FLOPs ratio": lambda group: ratio(group, flops),
        "prefill tok/s ratio": lambda group: marked(
            ratio(group, "efficiency.prefill_tokens_per_second"), group, "prefill"
        ),
        "decode tok/s": lambda group: marked(
            _rate(group.interval("efficiency.decode_tokens_per_second")), group, "decode"
        ),
        TIMED_HEADER: _timed,
        "KV bytes/token": lambda group: _rounded(group.interval("efficiency.kv_bytes_per_token"), 0),
        "causal": lambda group: "yes" if group.causal else "no",
    }
    rows = [
        Row(group.label, tuple(cell(group) for cell in columns.values()), best=comparison.is_best(group))
        for group in comparison.groups
    ]
    unigram = mean_interval([run["reference"]["unigram_loss"] for run in comparison.runs])
    assert unigram is not None
    cells = dict.fromkeys(columns, ABSENT) | {LOSS_HEADER: f"{unigram.mean:.3f}"}
    rows.append(Row("unigram", tuple(cells.values()), reference=True))
    limits = (*warnings(comparison), *timing_warnings(comparison.groups))
    return MainTable(("variant", *columns), tuple(rows), _caption(comparison), limits)


def render_table(comparison: Comparison) -> Table:
    """The main table for the terminal; it fits 80 columns."""
    content = main_table(comparison)
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption_justify="left")
    table.caption = Text("\n".join((*content.caption, *content.warnings)))
    table.add_column("", overflow="fold")
    for header in TERMINAL_HEADERS.values():
        table.add_column(header, justify="right", no_wrap=True)
    for row in content.rows:
        values = dict(zip(content.headers[1:], row.cells, strict=True))
        label = row.label.replace(" (", "\n(").replace(", ", ",\n")
        label = label if values["seeds"] in (ABSENT, "1") else f"{label}\n{values['seeds']} seeds"
        cells = [Text(label)]
        for header in TERMINAL_HEADERS:
            bold = row.best and header == LOSS_HEADER
            cells.append(Text(_stacked(values[header]), style="bold" if bold else ""))
        table.add_row(*cells, style="dim" if row.reference else None)
    return table


def realised_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: what each group computed of the test split, of its domains, and of each task.

    Of a routed group the fraction of tokens, with its standard deviation over rows, and FLOPs per token; of
    another one the FLOPs.
    """
    groups = comparison.groups
    texts = computed_texts(groups)
    routed = [any(of_text[place].fraction for of_text in texts.values()) for place in range(len(groups))]
    headers = ["text"]
    for group, is_routed in zip(groups, routed, strict=True):
        headers += [f"{group.label}: routed (sd)"] if is_routed else []
        headers.append(f"{group.label}: FLOPs/token")
    rows = []
    for text, of_groups in texts.items():
        cells = []
        for computed, is_routed in zip(of_groups, routed, strict=True):
            if is_routed:
                spread = "" if computed.sd is None else f" ({computed.sd:.3f})"
                cells.append(with_interval(computed.fraction, 3) + spread)
            cells.append(si_interval(computed.flops))
        rows.append([text, *cells])
    return headers, rows


def render_realised_table(comparison: Comparison) -> Table | None:
    """The fractions of `realised_table` for the terminal; None where nothing is routed."""
    headers, rows = realised_table(comparison)
    shown = [place for place, header in enumerate(headers) if header.endswith("routed (sd)")]
    if not shown:
        return None
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption_justify="left")
    table.caption = Text("Fraction of tokens that routed layers computed (standard deviation over rows).")
    table.add_column("", overflow="fold")
    for place in shown:
        table.add_column(headers[place].removesuffix(": routed (sd)"), justify="right")
    for row in rows:
        table.add_row(Text(row[0]), *(Text(row[place]) for place in shown))
    return table


def headline_metric(metrics: Iterable[str]) -> str | None:
    """The metric of a task that its plot shows: bits per byte of a perplexity task, else an accuracy."""
    return next(
        (name for name in ("bits_per_byte", "acc", "exact_match", "acc_norm") if name in metrics), None
    )


def bench_tasks(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Tasks that any run has, with their metrics, in the order of first appearance."""
    tasks: dict[str, list[str]] = {}
    for group in groups:
        for run in group.runs:
            for task, metrics in run["bench"].items():
                known = tasks.setdefault(task, [])
                known.extend(metric for metric in metrics if metric not in (*known, *FIGURES))
    return tasks


def bench_value(group: Group, task: str, metric: str) -> tuple[Interval | None, float | None]:
    """Mean over seeds of a task's metric, and its standard error over the test's examples.

    Seeds answer the same questions, so the standard error is their root mean square: it does not shrink
    with more seeds.
    """
    values = [run["bench"].get(task, {}).get(metric) for run in group.runs]
    errors = [run["bench_stderr"].get(task, {}).get(metric) for run in group.runs]
    present = [error for error in errors if isinstance(error, int | float)]
    error = math.sqrt(sum(error**2 for error in present) / len(present)) if present else None
    return mean_interval(values), error


def bench_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of every bench metric: mean over seeds, standard error in brackets."""
    groups = comparison.groups
    rows = []
    for task, metrics in bench_tasks(groups).items():
        for metric in metrics:
            chance = CHANCE.get(task) if metric.startswith("acc") else None
            cells = [_bench_cell(*bench_value(group, task, metric), chance) for group in groups]
            rows.append([task, metric, *cells])
    return ["task", "metric", *(group.label for group in groups)], rows


def _bench_cell(value: Interval | None, error: float | None, chance: float | None) -> str:
    if value is None:
        return ABSENT
    digits = 3 if abs(value.mean) < 100 else 1
    guessed = chance is not None and error is not None and abs(value.mean - chance) <= 2 * error
    return (
        f"{value.mean:,.{digits}f}"
        + ("" if error is None else f" ({error:,.{digits}f})")
        + (f" {AT_CHANCE}" if guessed else "")
    )


def _timed(group: Group) -> str:
    found = [mean_interval([timed_fraction(run, work) for run in group.runs]) for work in WORK]
    return " / ".join(with_interval(interval, 3) for interval in found) if any(found) else ABSENT


def _rate(interval: Interval | None) -> str:
    return _rounded(interval, 0 if interval is not None and interval.mean >= 100 else 1)


def _rounded(interval: Interval | None, digits: int) -> str:
    """As `with_interval`, without an interval that would read ± 0: such values are counted, not sampled."""
    if interval is not None and interval.half_width is not None and interval.half_width < 0.5 * 10**-digits:
        interval = Interval(interval.mean, None, interval.count)
    return with_interval(interval, digits)


def _stacked(cell: str) -> str:
    lines = cell.replace(" / ", "\n").replace(" ± ", "\n±").splitlines()
    return "\n".join(line.replace(" ", "") for line in lines)


def _caption(comparison: Comparison) -> tuple[str, ...]:
    sentences = [f"Spread of training FLOPs over runs (max/min − 1): {percent(comparison.flops_spread)}."]
    if any(len(group.runs) > 1 for group in comparison.groups):
        sentences.append("± is the 95 % interval over seeds (Student t).")
    for group in comparison.groups:
        if comparison.is_best(group):
            sentences.append(
                f"Bold: the interval of {group.label} lies below that of every other causal model."
            )
    return tuple(sentences)


def differences(comparison: Comparison) -> list[dict[str, Any]]:
    """Each group − the baseline at its point, paired over seeds, by metric: as comparison.json has them.

    `interval` is that of 95 % (Student t over pairs), None with a single pair.
    """
    values: dict[str, Callable[[Run], float | None]] = {
        key: lambda run, key=key: lookup(run, key) for key in ("eval.loss", "eval.bits_per_byte")
    }
    for task, names in bench_tasks(comparison.groups).items():
        if metric := headline_metric(names):
            values[f"bench.{task}.{metric}"] = lambda run, task=task, metric=metric: (
                run["bench"].get(task, {}).get(metric)
            )
    found = []
    for group in comparison.groups:
        if (baseline := comparison.baseline_of(group)) is None:
            continue
        for metric, value in values.items():
            if difference := difference_to(group, baseline, value):
                half, mean = difference.half_width, difference.mean
                interval = None if half is None else [mean - half, mean + half]
                pairs = {"mean": mean, "interval": interval, "pairs": difference.count}
                found.append({"variant": group.variant, "point": group.point, "metric": metric, **pairs})
    return found
