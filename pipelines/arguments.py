"""What a run of the pipeline is asked for on the command lines of `pipelines.run` and `pipelines.submit`."""

from __future__ import annotations

import argparse
from typing import Any

from dynamic_transformers.configure import compose_settings
from dynamic_transformers.settings import ARCHITECTURES, Settings, UserError


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """Configuration, architectures, seeds and overrides."""
    parser.add_argument("--config-name", default="quickstart", help="a file of config/ (default: quickstart)")
    parser.add_argument(
        "--architectures", default=",".join(ARCHITECTURES), help="by commas (default: all four)"
    )
    parser.add_argument("--seeds", default="0", help="by commas; each architecture is trained with each")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")


def pipeline_arguments(args: argparse.Namespace) -> tuple[Settings, dict[str, Any]]:
    """Settings, and values for the pipeline's parameters `architectures` and `seeds`.

    Raises:
        UserError: a mistake in any of them.
    """
    settings = compose_settings(args.config_name, args.overrides)
    architectures, seeds = args.architectures.split(","), args.seeds.split(",")
    for name in architectures:
        if name not in ARCHITECTURES:
            raise UserError(f"--architectures {name}: must be one of {', '.join(ARCHITECTURES)}")
    for seed in seeds:
        if not seed.isdecimal():
            raise UserError(f"--seeds {seed}: must be whole numbers, by commas")
    if len(set(architectures)) < len(architectures) or len(set(seeds)) < len(seeds):
        raise UserError("--architectures and --seeds: name each once")
    return settings, {"architectures": architectures, "seeds": [int(seed) for seed in seeds]}
