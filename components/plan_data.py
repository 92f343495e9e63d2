"""Plans the tokenization of data in several steps: the tokenizer, and the sources in shards."""

from kfp import dsl

from components import image_of


@dsl.component(base_image=image_of("prepare"), install_kfp_package=False)
def plan_data(settings: str, plan: dsl.Output[dsl.Artifact]):
    """Write the plan.

    Args:
        settings: all settings, as JSON.
        plan: tokenizer, and a manifest with all shards and what the sources are made of.
    """
    from pathlib import Path

    from dynamic_transformers.configure import settings_from_json
    from dynamic_transformers.data.fan_out import plan_shards
    from dynamic_transformers.step_log import step_log

    with step_log(Path(plan.path)):
        plan_shards(settings_from_json(settings), Path(plan.path))
