"""Runs after the pipeline however it ended: compares what finished of one that failed."""

from typing import List  # noqa: UP035  (kfp reads the annotation)

from kfp import dsl

from components import image_of


@dsl.component(base_image=image_of("evaluate"), install_kfp_package=False)
def report_finished(
    status: dsl.PipelineTaskFinalStatus,
    settings: str,
    variants: str,
    grid: str,
    overrides: List[str],  # noqa: UP006
    dataset_configs: str,
    max_flops: float,
    mlflow_uri: str,
    mlflow_experiment: str,
    report: dsl.Output[dsl.Artifact],
):
    """Write the report that `compare` could not write, of the runs that MLflow knows as evaluated.

    Args:
        status: how the pipeline ended; nothing is compared after a success.
        settings, variants, grid, overrides, dataset_configs, max_flops, mlflow_uri, mlflow_experiment: the
            pipeline's parameters, as `configure` takes them.
        report: the comparison; a page that says why there is none after a success, when nothing has
            finished, or when MLflow has it already. Written in any case: KFP shows what a step did not write
            as a link to nothing.
    """
    from pathlib import Path

    output = Path(report.path)

    def say(text: str) -> None:
        output.mkdir(parents=True, exist_ok=True)
        page = f"<!doctype html>\n<title>report_finished</title>\n<p>{text}</p>\n"
        (output / "report.html").write_text(page)

    # Servers name a success differently, and some say RUNNING when a loop has ended (kubeflow/pipelines
    # #13321): then MLflow tells whether there is anything left to do.
    if status.state in ("SUCCEEDED", "COMPLETE", "CACHED"):
        return say("All runs have finished: the report is the output of compare.")

    from dynamic_transformers.comparison.finished import compare_finished
    from dynamic_transformers.configure import settings_from_parameters
    from dynamic_transformers.step_log import step_log
    from dynamic_transformers.study import common, study_runs

    with step_log(output):
        values = settings_from_parameters(
            settings, variants, grid, overrides, dataset_configs, max_flops, mlflow_uri, mlflow_experiment
        )
        if not compare_finished(common(values), [run.name for run in study_runs(values)], output):
            say("No comparison: no run has been evaluated, or MLflow has the report already (see the log).")
