"""Merges the pipeline's parameters into the settings and runs that the other steps take."""

from typing import List  # noqa: UP035  (kfp reads the annotation)

from kfp import dsl

from components import image_of


@dsl.component(base_image=image_of("evaluate"), install_kfp_package=False)
def configure(
    settings: str,
    variants: str,
    grid: str,
    overrides: List[str],  # noqa: UP006
    dataset_configs: str,
    max_flops: float,
    mlflow_uri: str,
    mlflow_experiment: str,
    merged: dsl.OutputPath(str),  # type: ignore[valid-type]
    runs: dsl.OutputPath(List[str]),  # type: ignore[valid-type]  # noqa: UP006
    data: dsl.Input[dsl.Dataset] = None,  # type: ignore[assignment]
):
    """Check everything before anything costs time.

    Args:
        settings, variants, grid, overrides, dataset_configs, max_flops, mlflow_uri, mlflow_experiment: as in
            `settings_from_parameters`.
        merged: the settings that all runs have, as JSON.
        runs: what each run of the study differs in, as `StudyRun.to_json` gives it.
        data: prepared before, which the runs are to take; None: they are prepared after this.
    """
    import json
    from pathlib import Path

    from dynamic_transformers.configure import settings_from_parameters
    from dynamic_transformers.data.prepare import check_prepared
    from dynamic_transformers.preflight import preflight
    from dynamic_transformers.step_log import step_log
    from dynamic_transformers.study import common, study_runs

    with step_log(Path(merged)):
        values = settings_from_parameters(
            settings, variants, grid, overrides, dataset_configs, max_flops, mlflow_uri, mlflow_experiment
        )
        study = study_runs(values)
        preflight(values, [run.settings for run in study], here=False)
        if data:
            check_prepared(values, Path(data.path))
        Path(runs).write_text(json.dumps([run.to_json() for run in study]))
        Path(merged).write_text(common(values).to_json())
