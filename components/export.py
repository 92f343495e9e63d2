"""Exports a training run as a Hugging Face folder."""

from kfp import dsl

from components import image_of


@dsl.component(base_image=image_of("export"), install_kfp_package=False)
def export(data: dsl.Input[dsl.Dataset], run_folder: dsl.Input[dsl.Artifact], model: dsl.Output[dsl.Model]):
    """Write the exported model.

    Args:
        data: what prepare_data wrote.
        run_folder: what train wrote.
        model: weights, configuration, tokenizer and, for routed models, their code.
    """
    from pathlib import Path

    from dynamic_transformers.export import export as export_step
    from dynamic_transformers.manifest import read_manifest
    from dynamic_transformers.step_log import step_log

    with step_log(Path(model.path)):
        export_step(Path(run_folder.path), Path(model.path), Path(data.path))
        facts = read_manifest(Path(model.path))
        names = (
            "variant",
            "seed",
            "architecture",
            "parameters",
            "training_flops",
            "training_tokens",
            "digest",
        )
        model.metadata.update({name: facts[name] for name in names}, **facts["point"])
