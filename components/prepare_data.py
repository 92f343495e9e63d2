"""Mixes, tokenizes and packs the documents."""

from kfp import dsl

from components import image_of


@dsl.component(base_image=image_of("prepare"), install_kfp_package=False)
def prepare_data(settings: str, data: dsl.Output[dsl.Dataset]):
    """Write the data folder.

    Args:
        settings: all settings, as JSON.
        data: tokenized splits, tokenizer, evaluation tasks, manifest.
    """
    from pathlib import Path

    from dynamic_transformers.configure import settings_from_json
    from dynamic_transformers.data.prepare import prepare
    from dynamic_transformers.manifest import read_manifest
    from dynamic_transformers.step_log import step_log

    with step_log(Path(data.path)):
        prepare(settings_from_json(settings), Path(data.path))
        manifest = read_manifest(Path(data.path))
        tokens = {f"{name}_tokens": split["tokens"] for name, split in manifest["splits"].items()}
        data.metadata.update(digest=manifest["content_digest"], **tokens)
