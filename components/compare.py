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
    page: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
):
    """Write `comparison.json`, `report.html` and plots, and let MLflow show all runs in charts.

    Args:
        settings: all settings, as JSON.
        models: what the export steps wrote, in the order of `evaluations`.
        evaluations: what the evaluate steps wrote.
        report: the comparison.
        page: its report.html, which KFP's pages show.
        metrics: each variant's test loss, and its difference to the baseline.
    """
    import shutil
    from contextlib import suppress
    from pathlib import Path

    from dynamic_transformers.comparison.compare import compare as compare_step
    from dynamic_transformers.comparison.compare import shown_figures, tracked_runs
    from dynamic_transformers.comparison.tracked import track_report
    from dynamic_transformers.configure import settings_from_json
    from dynamic_transformers.settings import UserError
    from dynamic_transformers.step_log import step_log
    from dynamic_transformers.tracking import report_of

    output = Path(report.path)
    again = (output / "comparison.json").is_file()
    with step_log(output):
        values = settings_from_json(settings)
        compare_step(
            [Path(evaluation.path) for evaluation in evaluations],
            output,
            baseline=values.study.baseline,
            settings=values,
            models=[Path(model.path) for model in models],
        )
        shutil.copy(output / "report.html", page.path)
        for name, value in shown_figures(output).items():
            metrics.log_metric(name, value)
        with suppress(UserError):  # nobody answers, which track_report takes as it does
            if again and report_of(values.tracking, values.run.output_dir, tracked_runs(output)):
                return
        track_report(values, values.run.name, output)
