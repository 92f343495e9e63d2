"""Compares the evaluated models: speed side by side, table, plots, report."""

from typing import List  # noqa: UP035  (kfp reads the annotation)

from kfp import dsl

from components import image_of


@dsl.component(base_image=image_of("evaluate"), install_kfp_package=False)
def compare(
    settings: str,
    parent_run: dsl.Input[dsl.Artifact],
    models: dsl.Input[List[dsl.Model]],  # noqa: UP006
    evaluations: dsl.Input[List[dsl.Artifact]],  # noqa: UP006
    report: dsl.Output[dsl.Artifact],
):
    """Write `comparison.json`, `report.html` and plots.

    Args:
        settings: all settings, as JSON.
        parent_run: what start_comparison wrote, the MLflow run that receives the report.
        models: what the export steps wrote, in the order of `evaluations`.
        evaluations: what the evaluate steps wrote.
        report: the comparison.
    """
    from pathlib import Path

    from dynamic_transformers.comparison.compare import compare as compare_step
    from dynamic_transformers.configure import settings_from_json
    from dynamic_transformers.step_log import step_log
    from dynamic_transformers.tracking import finish_parent_run

    values = settings_from_json(settings)
    output = Path(report.path)
    with step_log(output):
        compare_step(
            [Path(evaluation.path) for evaluation in evaluations],
            output,
            models=[Path(model.path) for model in models],
        )
        run_id = Path(parent_run.path).read_text()
        finish_parent_run(values.tracking, values.run.output_dir, run_id, output)
