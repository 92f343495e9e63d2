"""Compiles the pipeline: `python -m pipelines.compile [build/pipeline.yaml] [--cluster FILE]`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from kfp import compiler

from dynamic_transformers.command_line import run_command
from dynamic_transformers.settings import UserError
from pipelines.arguments import add_shards_argument, data_shards_of
from pipelines.cluster import ClusterSettings, read_cluster
from pipelines.comparison import comparison_pipeline
from pipelines.images import warn_of_revision_mismatch

DEFAULT_PACKAGE = Path("build/pipeline.yaml")


def compile_pipeline(
    cluster: ClusterSettings, path: Path = DEFAULT_PACKAGE, data_uri: str = "", data_shards: int = 1
) -> Path:
    """Write the pipeline's YAML to `path` and return it.

    Args:
        data_uri: where prepared data lie, which come in instead of being prepared.
        data_shards: in how many steps at a time the data are tokenized; 1: one step prepares them.

    Raises:
        UserError: `path` does not end in .yaml, or cannot be written.
    """
    if path.suffix != ".yaml":
        raise UserError(f"{path}: must end in .yaml")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pipeline = comparison_pipeline(cluster, data_uri, data_shards)
        compiler.Compiler().compile(pipeline, str(path))  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def add_cluster_argument(parser: argparse.ArgumentParser) -> None:
    """The file that says what the cluster gives to each step."""
    parser.add_argument(
        "--cluster", default="", metavar="FILE", help="resources, volumes, secrets: see cluster/example.yaml"
    )


def cluster_of(args: argparse.Namespace) -> ClusterSettings:
    """Settings of `--cluster`.

    Raises:
        UserError: as `read_cluster`.
    """
    return read_cluster(Path(args.cluster)) if args.cluster else ClusterSettings()


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """Where prepared data lie that the cluster's steps can read."""
    parser.add_argument(
        "--data-uri",
        default="",
        metavar="URI",
        help="prepared data (s3://bucket/folder, gs://, minio://) that are taken instead of preparing them",
    )


def data_uri_of(args: argparse.Namespace) -> str:
    """Address of `--data-uri`; empty where data are to be prepared.

    Raises:
        UserError: an address that KFP does not fetch into a step's pod.
    """
    if args.data_uri and not re.fullmatch(r"(s3|gs|minio)://[^/\s]+/\S+", args.data_uri):
        raise UserError(
            f"--data-uri {args.data_uri}: must be like s3://bucket/folder (or gs://, minio://), where a"
            " cluster's steps can read"
        )
    return args.data_uri


def compile_command(args: argparse.Namespace) -> None:
    """Compile as asked, and print where to."""
    print(compile_pipeline(cluster_of(args), args.output, data_uri_of(args), data_shards_of(args)))
    warn_of_revision_mismatch()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m pipelines.compile`."""
    parser = argparse.ArgumentParser(prog="pipelines.compile", description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, default=DEFAULT_PACKAGE)
    add_cluster_argument(parser)
    add_data_argument(parser)
    add_shards_argument(parser)
    run_command(compile_command, parser, arguments)


if __name__ == "__main__":
    main()
