"""What a run of the pipeline is asked for on the command lines of `pipelines.run` and `pipelines.submit`."""

from __future__ import annotations

import argparse
from typing import Any

from dynamic_transformers.configure import compose_settings, run_names
from dynamic_transformers.preflight import preflight
from dynamic_transformers.settings import ARCHITECTURES, Settings, UserError


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """Configuration, architectures, seeds and overrides."""
    parser.add_argument(
        "--config-name", default="quickstart", help="a file of config/, or one of ours (default: quickstart)"
    )
    parser.add_argument(
        "--architectures", default=",".join(ARCHITECTURES), help="by commas (default: all four)"
    )
    parser.add_argument("--seeds", default="0", help="by commas; each architecture is trained with each")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")


def pipeline_arguments(args: argparse.Namespace, here: bool = False) -> tuple[Settings, dict[str, Any]]:
    """Settings, and values for the pipeline's parameters `architectures` and `seeds`.

    Args:
        here: whether the steps run on this machine.

    Raises:
        UserError: a mistake in any of them.
    """
    settings = compose_settings(args.config_name, args.overrides)
    architectures, seeds = args.architectures.split(","), args.seeds.split(",")
    if not all(seed.isdecimal() for seed in seeds):
        raise UserError(f"--seeds {args.seeds}: must be whole numbers, by commas")
    parameters = {"architectures": architectures, "seeds": [int(seed) for seed in seeds]}
    run_names(**parameters)
    preflight(settings, architectures, here)
    return settings, parameters
