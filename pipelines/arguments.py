"""What a run of the pipeline is asked for on the command lines of `pipelines.run` and `pipelines.submit`."""

from __future__ import annotations

import argparse

from dynamic_transformers.command_line import path
from dynamic_transformers.configure import compose_settings
from dynamic_transformers.preflight import preflight
from dynamic_transformers.settings import SEED_KEY, Settings, UserError
from dynamic_transformers.study import StudyRun, study_runs, variants_of


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """Configuration, variants, seeds and overrides."""
    parser.add_argument(
        "--config-name", default="quickstart", help="a file of config/, or one of ours (default: quickstart)"
    )
    parser.add_argument(
        "--config-dir", type=path, help="your files, which win over ours (default: config/, if there is one)"
    )
    parser.add_argument("--variants", help="labels of study.variants, by commas (default: all)")
    parser.add_argument("--seeds", help="by commas: short for study.grid.run.seed=[...]")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")


def pipeline_arguments(args: argparse.Namespace, here: bool = False) -> tuple[Settings, list[StudyRun]]:
    """Settings with the study that is asked for, and its runs.

    Args:
        here: whether the steps run on this machine.

    Raises:
        UserError: a mistake in any of them.
    """
    settings = compose_settings(args.config_name, args.overrides, args.config_dir)
    if not here:
        refuse_own_tasks(settings, "a cluster")
    if args.seeds is not None:
        settings.study.grid[SEED_KEY] = [seed.strip() for seed in args.seeds.split(",")]
    if args.variants is not None:
        settings.study.variants = chosen(variants_of(settings.study), args.variants)
    runs = study_runs(settings)
    preflight(settings, [run.settings for run in runs], here)
    return settings, runs


def add_shards_argument(parser: argparse.ArgumentParser) -> None:
    """In how many steps at a time the data are tokenized."""
    parser.add_argument(
        "--data-shards",
        type=int,
        default=1,
        metavar="N",
        help="tokenize the data in N steps at a time, which a cluster runs on different nodes (default: 1,"
        " all in the step prepare_data)",
    )


def data_shards_of(args: argparse.Namespace) -> int:
    """Number of `--data-shards`.

    Raises:
        UserError: it is none, or there is nothing to tokenize.
    """
    if args.data_shards < 1:
        raise UserError(f"--data-shards {args.data_shards}: must be at least 1")
    if args.data_shards > 1 and args.data_uri:
        raise UserError("--data-shards is for data that have to be prepared; --data-uri names prepared ones")
    return args.data_shards


def refuse_own_tasks(settings: Settings, where: str) -> None:
    """Refuse task files that the step `evaluate` could not read.

    Raises:
        UserError: says where they can be used.
    """
    if settings.evaluation.task_dir is not None:
        raise UserError(
            f"evaluation.task_dir={settings.evaluation.task_dir}: {where} cannot read this folder; set it to "
            "null, and give --task_dir to bench.py with the models that the pipeline exports"
        )


def chosen(variants: dict[str, list[str]], labels: str) -> dict[str, list[str] | None]:
    """The variants with these labels, in the order of the study.

    Raises:
        UserError: a label that no variant has.
    """
    asked = [label.strip() for label in labels.split(",")]
    for label in asked:
        if label not in variants:
            raise UserError(f"--variants {labels}: no variant {label!r}; there are {', '.join(variants)}")
    return {label: overrides if label in asked else None for label, overrides in variants.items()}
