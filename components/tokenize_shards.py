"""Tokenizes one group of the shards of all sources."""

from kfp import dsl

from components import image_of


@dsl.component(base_image=image_of("prepare"), install_kfp_package=False)
def tokenize_shards(
    settings: str, plan: dsl.Input[dsl.Artifact], group: int, groups: int, shards: dsl.Output[dsl.Artifact]
):
    """Write a folder for each shard.

    Args:
        settings: all settings, as JSON.
        plan: what plan_data wrote.
        group: which one this is, from 1.
        groups: how many there are.
        shards: tokens and index of each shard.
    """
    from pathlib import Path

    from dynamic_transformers.configure import settings_from_json
    from dynamic_transformers.data.fan_out import tokenize_group
    from dynamic_transformers.step_log import step_log

    with step_log(Path(shards.path)):
        tokenize_group(settings_from_json(settings), Path(plan.path), group, groups, Path(shards.path))
