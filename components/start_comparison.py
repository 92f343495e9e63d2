"""Opens the MLflow run under which a comparison's runs hang."""

from kfp import dsl

from components import image_of


@dsl.component(base_image=image_of("prepare"), install_kfp_package=False)
def start_comparison(settings: str, parent_run: dsl.Output[dsl.Artifact]):
    """Write the id of the parent run; empty when tracking is off or the server cannot be reached.

    An artifact, not a parameter: inside a loop, KFP's local runner replaces every output parameter of an
    earlier task by the loop's item.

    Args:
        settings: all settings, as JSON.
        parent_run: a text file.
    """
    from pathlib import Path

    from dynamic_transformers.configure import settings_from_json
    from dynamic_transformers.tracking import start_parent_run

    values = settings_from_json(settings)
    run_id = start_parent_run(values.tracking, values.run.output_dir, values.run.name)
    Path(parent_run.path).write_text(run_id)
