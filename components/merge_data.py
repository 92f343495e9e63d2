"""Mixes and packs the documents of shards that several steps have tokenized."""

from typing import List  # noqa: UP035  (kfp reads the annotation)

from kfp import dsl

from components import image_of


@dsl.component(base_image=image_of("prepare"), install_kfp_package=False)
def merge_data(
    settings: str,
    plan: dsl.Input[dsl.Artifact],
    shards: dsl.Input[List[dsl.Artifact]],  # noqa: UP006
    data: dsl.Output[dsl.Dataset],
):
    """Write the data folder, as prepare_data does.

    Args:
        settings: all settings, as JSON.
        plan: what plan_data wrote.
        shards: what the tokenize_shards steps wrote.
        data: tokenized splits, tokenizer, evaluation tasks, manifest.
    """
    from pathlib import Path

    from dynamic_transformers.configure import settings_from_json
    from dynamic_transformers.data.fan_out import merge_groups
    from dynamic_transformers.manifest import read_manifest
    from dynamic_transformers.step_log import step_log

    with step_log(Path(data.path)):
        groups = [Path(group.path) for group in shards]
        merge_groups(settings_from_json(settings), Path(plan.path), groups, Path(data.path))
        manifest = read_manifest(Path(data.path))
        tokens = {f"{name}_tokens": split["tokens"] for name, split in manifest["splits"].items()}
        data.metadata.update(digest=manifest["content_digest"], **tokens)
