"""Compares the evaluated models: speed side by side, table, plots, report."""

from typing import List  # noqa: UP035  (kfp reads the annotation)

from kfp import dsl

from components import image_of


@dsl.component(base_image=image_of("evaluate"), install_kfp_package=False)
def compare(
    settings: str,
    models: dsl.Input[List[dsl.Model]],  # noqa: UP006
    evaluations: dsl.Input[List[dsl.Artifact]],  # noqa: UP006
    report: dsl.Output[dsl.Artifact],
):
    """Write `comparison.json`, `report.html` and plots, and hang the runs under one in MLflow.

    Args:
        settings: all settings, as JSON.
        models: what the export steps wrote, in the order of `evaluations`.
        evaluations: what the evaluate steps wrote.
        report: the comparison.
    """
    from pathlib import Path

    from dynamic_transformers.comparison.compare import compare as compare_step
    from dynamic_transformers.comparison.compare import tracked_runs
    from dynamic_transformers.configure import settings_from_json
    from dynamic_transformers.step_log import step_log
    from dynamic_transformers.tracking import track_comparison

    output = Path(report.path)
    with step_log(output):
        values = settings_from_json(settings)
        compare_step(
            [Path(evaluation.path) for evaluation in evaluations],
            output,
            models=[Path(model.path) for model in models],
        )
        track_comparison(
            values.tracking, values.run.output_dir, values.run.name, tracked_runs(output), output
        )
