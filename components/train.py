"""Trains one architecture with one seed."""

from kfp import dsl

from components import image_of


@dsl.component(base_image=image_of("train"), install_kfp_package=False)
def train(
    settings: str,
    run: str,
    parent_run: dsl.Input[dsl.Artifact],
    data: dsl.Input[dsl.Dataset],
    run_folder: dsl.Output[dsl.Artifact],
):
    """Write the run folder: configuration, metrics, checkpoints, manifest.

    Args:
        settings: all settings, as JSON.
        run: `architecture:seed`.
        parent_run: what start_comparison wrote, the MLflow run to hang this one under.
        data: what prepare_data wrote.
        run_folder: the run.
    """
    from pathlib import Path

    from dynamic_transformers.configure import settings_from_json
    from dynamic_transformers.step_log import step_log
    from dynamic_transformers.training.trainer import train as train_step

    architecture, _, seed = run.partition(":")
    values = settings_from_json(settings, [f"model.type={architecture}", f"run.seed={int(seed or 0)}"])
    with step_log(Path(run_folder.path)):
        train_step(values, Path(data.path), Path(run_folder.path), Path(parent_run.path).read_text())
