"""Trains one architecture with one seed."""

from kfp import dsl

from components import image_of


@dsl.component(base_image=image_of("train"), install_kfp_package=False)
def train(
    settings: str,
    run: str,
    data: dsl.Input[dsl.Dataset],
    run_folder: dsl.Output[dsl.Artifact],
    launch: str = "",
):
    """Write the run folder: configuration, metrics, checkpoints, manifest.

    Args:
        settings: all settings, as JSON.
        run: `architecture:seed`.
        data: what prepare_data wrote.
        run_folder: the run.
        launch: on how many processes and nodes, as `Launch.to_json` gives it; '' is one process.
    """
    from pathlib import Path

    from dynamic_transformers.configure import settings_from_json
    from dynamic_transformers.launch.run import launch_training
    from dynamic_transformers.launch.settings import Launch
    from dynamic_transformers.step_log import step_log

    with step_log(Path(run_folder.path)):
        architecture, _, seed = run.partition(":")
        values = settings_from_json(settings, [f"model.type={architecture}", f"run.seed={int(seed or 0)}"])
        values.run.name = f"{values.run.name}-{architecture}-seed{values.run.seed}"  # as tracking shows it
        launch_training(values, Path(data.path), Path(run_folder.path), Launch.from_json(launch))
