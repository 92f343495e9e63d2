"""A finished comparison as MLflow shows it: names and colours of the report, and what stands in bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynamic_transformers.comparison.compare import read_comparison
from dynamic_transformers.comparison.plots import colour_of
from dynamic_transformers.comparison.statistics import Comparison, Group, point_text
from dynamic_transformers.comparison.tables import bench_tasks, headline_metric
from dynamic_transformers.settings import Settings
from dynamic_transformers.tracking import ComparedRun, track_comparison

EFFICIENCY = (
    "forward_flops_per_token",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "kv_bytes_per_token",
)


def track_report(settings: Settings, name: str, report: Path) -> None:
    """Log the folder of a finished comparison, with a view of its runs in charts."""
    comparison = read_comparison(report)
    runs = compared_runs(comparison)
    track_comparison(settings.tracking, settings.run.output_dir, name, runs, report, bars_of(comparison))


def compared_runs(comparison: Comparison) -> list[ComparedRun]:
    """The runs that were tracked, by variant and point of the grid."""
    return [
        ComparedRun(
            run_id=run["mlflow_run_id"],
            name=_name(group, run),
            colour=colour_of(group),
            axis=run["training_tokens"],
            figures={
                f"efficiency/{key}": value for key in EFFICIENCY if (value := run["efficiency"].get(key))
            },
            tags={
                "variant": group.variant,
                "point": point_text(group.point),
                "seed": str(run["seed"]),
                "digest": run["model_digest"],
            },
            loss=run["eval"]["loss"] if group.causal else None,
        )
        for group in comparison.groups
        for run in group.runs
        if run["mlflow_run_id"]
    ]


def bars_of(comparison: Comparison) -> dict[str, list[str]]:
    """Metrics of MLflow that are shown as bars, by section; of each task the one that its plot shows."""
    tasks = {task: headline_metric(metrics) for task, metrics in bench_tasks(comparison.groups).items()}
    return {
        "Test and benchmarks": [
            "test/loss",
            "test/bits_per_byte",
            *(f"bench/{task}/{metric}" for task, metric in tasks.items() if metric),
        ],
        "Efficiency": [f"efficiency/{key}" for key in EFFICIENCY],
    }


def _name(group: Group, run: dict[str, Any]) -> str:
    return f"{group.label}, seed {run['seed']}" if len(group.runs) > 1 else group.label
