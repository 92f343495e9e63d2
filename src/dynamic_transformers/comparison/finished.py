"""Compares what has finished of a pipeline that failed."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dynamic_transformers.comparison.compare import compare, tracked_runs
from dynamic_transformers.manifest import digest
from dynamic_transformers.settings import Settings
from dynamic_transformers.tracking import download, find_evaluated, track_comparison

logger = logging.getLogger("dynamic_transformers")


def compare_finished(settings: Settings, runs: Sequence[str], output_dir: Path) -> list[str]:
    """Compare those of `runs` that MLflow knows as evaluated with these settings; says what is missing.

    MLflow, since what a failed pipeline leaves elsewhere cannot be found by a step that runs after it.

    Args:
        runs: `architecture:seed` each.
        output_dir: of the report; not made when nothing has finished.

    Returns:
        The runs that were compared.

    Raises:
        UserError: MLflow is off or cannot be reached.
    """
    evaluated = find_evaluated(settings.tracking, settings.run.output_dir, digest(settings.to_dict()))
    found = [run for run in runs if run in evaluated]
    missing = [run for run in runs if run not in evaluated]
    logger.warning("finished: %s; not: %s", ", ".join(found) or "none", ", ".join(missing) or "none")
    if not found:
        return []
    with tempfile.TemporaryDirectory() as folder:
        evaluations, models = (
            [
                download(
                    settings.tracking,
                    settings.run.output_dir,
                    evaluated[run],
                    artifact,
                    Path(folder) / run.replace(":", "-seed"),
                )
                for run in found
            ]
            for artifact in ("evaluation", "model")
        )
        title = (
            f"Dynamic Transformers: what finished of a pipeline that failed (without {', '.join(missing)})"
        )
        compare(evaluations, output_dir, models=models, title=title)
    track_comparison(
        settings.tracking,
        settings.run.output_dir,
        f"{settings.run.name}-unfinished",
        tracked_runs(output_dir),
        output_dir,
    )
    return found
