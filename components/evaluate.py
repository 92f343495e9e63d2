"""Evaluates an exported model: test loss, lm-eval, FLOPs."""

from kfp import dsl

from components import image_of


@dsl.component(base_image=image_of("evaluate"), install_kfp_package=False)
def evaluate(
    settings: str,
    data: dsl.Input[dsl.Dataset],
    run_folder: dsl.Input[dsl.Artifact],
    model: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Write `evaluation.json` and lm-eval's results.

    Args:
        settings: all settings, as JSON.
        data: what prepare_data wrote.
        run_folder: what train wrote.
        model: what export wrote.
        evaluation: the figures.
        metrics: those that KFP's pages show.
    """
    from pathlib import Path

    from dynamic_transformers.configure import settings_from_json
    from dynamic_transformers.evaluation.evaluate import evaluate as evaluate_step
    from dynamic_transformers.evaluation.evaluate import shown_figures
    from dynamic_transformers.step_log import step_log

    with step_log(Path(evaluation.path)):
        evaluate_step(
            settings_from_json(settings),
            Path(data.path),
            Path(run_folder.path),
            Path(model.path),
            Path(evaluation.path),
        )
        shown = shown_figures(Path(evaluation.path))
        evaluation.metadata.update(shown)
        for name, value in shown.items():
            if isinstance(value, float):
                metrics.log_metric(name, value)
