"""Opens the MLflow run under which a comparison's runs hang."""

from kfp import dsl

from components import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def start_comparison(settings: str) -> str:
    """Id of the parent run; empty when tracking is off or the server cannot be reached.

    Args:
        settings: all settings, as JSON.
    """
    from dynamic_transformers.configure import settings_from_json
    from dynamic_transformers.tracking import start_parent_run

    values = settings_from_json(settings)
    return start_parent_run(values.tracking, values.run.output_dir, values.run.name)
