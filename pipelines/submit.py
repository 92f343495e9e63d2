# pyright: reportArgumentType=false, reportOptionalOperand=false
# The server's API, generated for kfp, declares every field of an answer as optional.
"""Submits the pipeline to a Kubeflow Pipelines server: `python -m pipelines.submit --host URL`.

A package is uploaded once: its version is named after its content. The bearer token comes from `--token-file`
or KFP_TOKEN, else kfp's own credentials serve: ~/.config/kfp/context.json, or in a cluster the token of the
service account. SSL_CERT_FILE may name the certificates to trust.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from datetime import UTC, datetime
from pathlib import Path

from kfp_server_api import V2beta1PipelineVersion

from dynamic_transformers.command_line import run_command
from dynamic_transformers.settings import UserError
from pipelines.arguments import (
    add_pipeline_arguments,
    add_shards_argument,
    data_shards_of,
    pipeline_arguments,
)
from pipelines.compile import (
    add_cluster_argument,
    add_data_argument,
    cluster_of,
    compile_pipeline,
    data_uri_of,
)
from pipelines.images import warn_of_revision_mismatch
from pipelines.package import Package, check_pushed, read_package, without_cache
from pipelines.progress import Watch
from pipelines.server import Client, connect, named, plain_errors, read_token, server_address, token_place

PAUSE_SECONDS = 60.0  # before a run is begun again; twice as long each further time, as for a step


def submit(args: argparse.Namespace) -> None:
    """Upload the pipeline where its content is new, start a run, and wait for it if asked."""
    settings, runs = pipeline_arguments(args)
    host = server_address(args.host or os.environ.get("KFP_HOST", ""))
    check_options(args)
    token_file = token_place(args.token_file)
    token = read_token(token_file)
    experiment_name = args.experiment or settings.tracking.experiment
    run_name = args.run_name or f"{settings.run.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    with tempfile.TemporaryDirectory() as folder, plain_errors(host, token):
        package = package_of(args, Path(folder))
        client = connect(host, token_file, token)
        if args.namespace and not client.multi_user:
            print("warning: --namespace: this server has one user, and ignores it", file=sys.stderr)
        namespace = args.namespace or client.get_user_namespace() or None
        with redirect_stdout(None):  # kfp prints links of its own
            experiment = client.create_experiment(experiment_name, namespace=namespace)
            version, uploaded = upload(client, package, namespace)
        print(f"experiment: {experiment_name}")
        print(f"pipeline:   {package.name}, {package.version}, {'uploaded' if uploaded else 'already there'}")
        watch = Watch(client, package, [run.name for run in runs])
        deadline = time.monotonic() + args.timeout
        for again in range(args.resubmit + 1):
            name = f"{run_name}-again{again}" if again else run_name
            run_id = client.begin_run(
                name,
                experiment.experiment_id,
                params={"settings": settings.to_json()},
                pipeline_id=version.pipeline_id,
                version_id=version.pipeline_version_id,
                pipeline_root=args.pipeline_root,
            )
            link = f"{host}/#/runs/details/{run_id}"
            print(f"run:        {name}, {run_id}")
            print(f"link:       {link}", flush=True)
            if not args.wait:
                return
            try:
                run = watch.follow(run_id, link, deadline)
            except KeyboardInterrupt:
                print(f"no longer waiting; the run goes on: {link}", file=sys.stderr)
                sys.exit(130)
            failure = watch.failure(run, run_id, link)
            if failure is None:
                return
            pause = PAUSE_SECONDS * 2**again
            in_time = time.monotonic() + pause < deadline
            # A run that someone canceled is not wanted.
            if run.state != "FAILED" or failure.mistake or again == args.resubmit or not in_time:
                raise UserError(failure.line)
            print(f"{failure.line}\nbegun again in {pause:.0f} s, {again + 1} of {args.resubmit}", flush=True)
            time.sleep(pause)


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that have no meaning together.

    Raises:
        UserError: names them.
    """
    if args.timeout < math.inf and not args.wait:
        raise UserError("--timeout needs --wait")
    compiled_now = {
        "--cluster": args.cluster,
        "--data-uri": args.data_uri,
        "--data-shards": args.data_shards != 1,
    }
    for option, given in compiled_now.items():
        if args.package and given:
            raise UserError(f"{option} is for a pipeline that is compiled now; --package has its own")
    data_uri_of(args)
    data_shards_of(args)
    if args.resubmit < 0:
        raise UserError(f"--resubmit {args.resubmit}: must be at least 0")
    if args.resubmit and not args.wait:
        raise UserError("--resubmit needs --wait")
    if args.resubmit and args.no_cache:
        raise UserError("--resubmit takes what has finished from the cache, which --no-cache turns off")
    if args.pipeline_root is not None and not re.fullmatch(r"[a-z0-9]+://\S+", args.pipeline_root):
        raise UserError(f"--pipeline-root {args.pipeline_root}: must be like s3://bucket/folder")


def package_of(args: argparse.Namespace, folder: Path) -> Package:
    """The pipeline as asked for, compiled now or given, in `folder` if it has to be written.

    Raises:
        UserError: no pipeline, images that no cluster can pull, or --resubmit without a cache.
    """
    path = args.package or compile_pipeline(
        cluster_of(args), folder / "compiled.yaml", data_uri_of(args), data_shards_of(args)
    )
    package = read_package(path)
    if not args.local_images:
        check_pushed(package)
    if not args.package:
        warn_of_revision_mismatch()
    if args.no_cache:
        return read_package(without_cache(path, folder / "pipeline.yaml"))
    if args.resubmit and not package.cached:
        raise UserError(
            "--resubmit takes what has finished from the cache, which this pipeline was compiled without"
        )
    return package


def upload(client: Client, package: Package, namespace: str | None) -> tuple[V2beta1PipelineVersion, bool]:
    """The pipeline's version with this content, and whether it is new on the server."""
    # A new pipeline comes with a version that the server names after it: the description says what it holds.
    description = f"first version: {package.version}"
    listed = client.list_pipelines(namespace=namespace, filter=named(package.name)).pipelines or []
    same_name = [pipeline.pipeline_id for pipeline in listed if pipeline.display_name == package.name]
    if same_name:
        pipeline_id, new = same_name[0], False
    else:
        pipeline = client.upload_pipeline(str(package.path), package.name, description, namespace)
        pipeline_id, new = pipeline.pipeline_id, True
    for name in (package.version, package.name):
        for version in client.list_pipeline_versions(pipeline_id, filter=named(name)).pipeline_versions or []:
            if version.display_name == package.version or version.description == description:
                return version, new
    return client.upload_pipeline_version(str(package.path), package.version, pipeline_id), True


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m pipelines.submit`."""
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it warns of each attempt
    parser = argparse.ArgumentParser(prog="pipelines.submit", description=__doc__)
    parser.add_argument("--host", help="https://... of the server (default: KFP_HOST)")
    parser.add_argument("--experiment", help="default: tracking.experiment")
    parser.add_argument("--run-name", help="default: run.name and the time")
    parser.add_argument(
        "--namespace", help="where several users share the server; one with a single user ignores it"
    )
    parser.add_argument("--wait", action="store_true", help="follow the run until it ends")
    parser.add_argument(
        "--resubmit",
        type=int,
        default=0,
        metavar="N",
        help="with --wait: begin a run that failed again, up to N times, after 1, 2, 4 ... minutes, unless"
        " a step found a mistake of yours; what has finished comes from the cache",
    )
    parser.add_argument("--no-cache", action="store_true", help="take no result of an earlier run")
    parser.add_argument("--pipeline-root", metavar="URI", help="where artifacts go (default: the server's)")
    parser.add_argument("--timeout", type=float, default=math.inf, metavar="SECONDS", help="of --wait")
    parser.add_argument("--token-file", type=Path, help="holds the bearer token (default: KFP_TOKEN)")
    parser.add_argument("--package", type=Path, help="a compiled pipeline (default: compile it now)")
    parser.add_argument(
        "--local-images",
        action="store_true",
        help="take images that were not pushed: the cluster has this machine's (kind load docker-image)",
    )
    add_cluster_argument(parser)
    add_data_argument(parser)
    add_shards_argument(parser)
    add_pipeline_arguments(parser)
    run_command(submit, parser, arguments)


if __name__ == "__main__":
    main()
