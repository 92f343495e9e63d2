"""Trains one run of the study."""

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
        settings: those that all runs have, as JSON.
        run: what it differs in, as `StudyRun.to_json` gives it.
        data: what prepare_data wrote.
        run_folder: the run.
        launch: on how many processes and nodes, as `Launch.to_json` gives it; '' is one process.
    """
    from pathlib import Path

    from dynamic_transformers.configure import settings_from_json
    from dynamic_transformers.launch.run import launch_training
    from dynamic_transformers.launch.settings import Launch
    from dynamic_transformers.step_log import step_log
    from dynamic_transformers.study import run_from_json

    with step_log(Path(run_folder.path)):
        values = run_from_json(settings_from_json(settings), run).settings
        launch_training(values, Path(data.path), Path(run_folder.path), Launch.from_json(launch))
