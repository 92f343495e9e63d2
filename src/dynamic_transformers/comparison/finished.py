"""Compares what has finished of a pipeline that failed."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dynamic_transformers.comparison.compare import compare
from dynamic_transformers.comparison.tracked import track_report
from dynamic_transformers.evaluation.evaluate import comparison_of
from dynamic_transformers.settings import Settings, UserError
from dynamic_transformers.tracking import download, find_evaluated, report_of

logger = logging.getLogger("dynamic_transformers")


def compare_finished(settings: Settings, runs: Sequence[str], output_dir: Path) -> list[str]:
    """Compare those of `runs` that MLflow knows as evaluated with these settings; says what is missing.

    MLflow, since what a failed pipeline leaves elsewhere cannot be found by a step that runs after it. Where
    it has a report of all of them already, as after a pipeline that ended well, nothing is done.

    Args:
        runs: names of the study's runs.
        output_dir: of the report; not made when nothing has finished.

    Returns:
        The runs that were compared.

    Raises:
        UserError: MLflow cannot be reached.
    """
    tracking, outputs = settings.tracking, settings.run.output_dir
    evaluated = find_evaluated(tracking, outputs, comparison_of(settings))
    names = {run: f"{settings.run.name}-{run}" for run in runs}
    finished = {run: evaluated[name] for run, name in names.items() if name in evaluated}
    if finished and (report := report_of(tracking, outputs, list(finished.values()))):
        logger.info("%s: compared already, MLflow has the report in run %s", ", ".join(finished), report)
        return []
    copies: dict[str, tuple[Path, Path]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for run, run_id in finished.items():
            place = Path(folder) / run
            try:
                evaluation, model = (
                    download(tracking, outputs, run_id, artifact, place)
                    for artifact in ("evaluation", "model")
                )
            except UserError as error:
                logger.warning("%s: cannot be compared (%s)", run, error)
            else:
                copies[run] = (evaluation, model)
        missing = [run for run in runs if run not in copies]
        logger.warning("finished: %s; not: %s", ", ".join(copies) or "none", ", ".join(missing) or "none")
        if not copies:
            return []
        which = f"without {', '.join(missing)}" if missing else "all runs"
        evaluations, models = zip(*copies.values(), strict=True)
        compare(
            evaluations,
            output_dir,
            models=models,
            baseline=settings.study.baseline,
            settings=settings,
            title=f"Dynamic Transformers: what finished of a pipeline that failed ({which})",
        )
    track_report(settings, f"{settings.run.name}-unfinished", output_dir)
    return list(copies)
