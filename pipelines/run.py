"""Runs the compiled pipeline on this machine: `python -m pipelines.run`.

Each step is a process, or with `--docker` a container of its image.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import sys
import time
from pathlib import Path

import docker
from docker.errors import DockerException, NotFound
from docker.types import Mount
from kfp import local
from kfp.components import load_component_from_file
from requests.exceptions import RequestException

from components import image_of
from dynamic_transformers.command_line import run_command
from dynamic_transformers.configure import run_names
from dynamic_transformers.manifest import revision
from dynamic_transformers.settings import Settings, UserError
from dynamic_transformers.tracking import tracking_uri
from pipelines.arguments import add_pipeline_arguments, pipeline_arguments
from pipelines.cluster import LOCAL
from pipelines.compile import compile_pipeline
from pipelines.console import quiet_console
from pipelines.docker_status import report_failures
from pipelines.images import STEPS, warn_of_revision_mismatch

# Variables of the caller that containers get too; not those that name files of this machine.
PASSED_ON = re.compile(
    r"MLFLOW_TRACKING_(URI|USERNAME|PASSWORD|TOKEN|AUTH|AWS_SIGV4|INSECURE_TLS)"
    r"|HF_(TOKEN|ENDPOINT)|WANDB_(API_KEY|BASE_URL)|(HTTPS?|NO)_PROXY|OMP_NUM_THREADS",
    re.IGNORECASE,  # proxies are often in small letters
)
# requests' own errors come through docker's client too.
DOCKER_ERRORS = (DockerException, RequestException)


def run(args: argparse.Namespace) -> None:
    """Compile, run, and show where the results are."""
    settings, parameters = pipeline_arguments(args, here=True)
    runs = run_names(**parameters)
    # Steps run in folders of their own: places must not depend on where they are.
    settings.run.output_dir = str(Path(settings.run.output_dir).resolve())
    if not os.environ.get("MLFLOW_TRACKING_URI"):  # the steps inherit it, with whatever secret it holds
        settings.tracking.mlflow_uri = tracking_uri(settings.tracking, settings.run.output_dir)
    os.environ.pop("MLFLOW_RUN_ID", None)  # it would be that of every step here
    os.environ["DYNAMIC_TRANSFORMERS_REVISION"] = revision()  # that of all steps, however long they take
    folder = settings.run_dir
    root = folder / "pipeline"
    package = compile_pipeline(LOCAL)
    root.mkdir(parents=True, exist_ok=True)
    runner = docker_runner(settings) if args.docker else local.SubprocessRunner(use_venv=False)
    local.init(runner, pipeline_root=str(root))
    pipeline = load_component_from_file(str(package))
    logs = folder / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    start = time.time()
    failure = None
    try:
        with quiet_console(logs / "pipeline.log"):
            pipeline(settings=settings.to_json(), **parameters)
    except (RuntimeError, *DOCKER_ERRORS) as error:  # RuntimeError: how the runner tells that a task failed
        failure = str(error).splitlines()[0]
    finally:
        execution = newest(root, start)
        if execution is not None:
            collect_logs(execution, runs, logs)
    step = "report-finished" if failure else "compare"
    report = execution / step / "report" if execution else None
    if report is not None and (report / "comparison.json").is_file():
        shutil.rmtree(folder / "report", ignore_errors=True)
        shutil.copytree(report, folder / "report")
        show(settings, time.time() - start)
    elif not failure:
        failure = "it ended without a comparison"
    if failure:
        raise UserError(f"the pipeline failed ({failure}); its logs are in {logs}")


def docker_runner(settings: Settings) -> local.DockerRunner:
    """Containers that see `run.output_dir` and the host's network, and whose files belong to the caller.

    Raises:
        UserError: Docker cannot be used, or an image of the pipeline is missing.
    """
    try:
        client = docker.from_env()
        for image in map(image_of, STEPS):
            try:
                client.images.get(image)
            except NotFound as error:
                raise UserError(f"{image}: no such image; run `make build-images` first") from error
    except DOCKER_ERRORS as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Docker cannot be used ({reason}): is it running, and may you use it?") from error
    warn_of_revision_mismatch()
    report_failures()
    output_dir = settings.run.output_dir
    return local.DockerRunner(
        mounts=[Mount(target=output_dir, source=output_dir, type="bind")],
        user=f"{os.getuid()}:{os.getgid()}",
        network_mode="host",  # a tracking server on localhost is the same for steps as for people
        shm_size="2g",  # Docker's 64 MB are too few for data loaders and gloo
        environment={name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)},
    )


def newest(root: Path, start: float) -> Path | None:
    """The folder of the execution that began after `start`."""
    executions = [path for path in root.glob("*") if path.is_dir() and path.stat().st_mtime >= start]
    return max(executions, key=lambda path: path.stat().st_mtime, default=None)


def collect_logs(execution: Path, runs: list[str], logs: Path) -> None:
    """Copy every step's log to `logs`, named after step and run."""
    for path in sorted(execution.rglob("*.log")):
        parts = path.relative_to(execution).parts
        run_name = ""
        if parts[0].startswith("for-loop"):
            run_name = "-" + runs[int(parts[0].rpartition("-")[2])].replace(":", "-seed")
        shutil.copy(path, logs / f"{path.parent.name}{run_name}.log")


def show(settings: Settings, seconds: float) -> None:
    """Print the table, the report's place and the MLflow command."""
    from dynamic_transformers.comparison.compare import print_comparison

    folder = settings.run_dir
    print_comparison(folder / "report")
    print(f"logs:   {folder / 'logs'}")
    if uri := settings.tracking.mlflow_uri:
        print(f"MLflow: make mlflow-ui   (mlflow ui --backend-store-uri {uri})")
    else:
        print("MLflow: at MLFLOW_TRACKING_URI")
    print(f"time:   {seconds:.0f} s")


def main() -> None:
    """Entry of `python -m pipelines.run`."""
    logging.getLogger("kfp").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(prog="pipelines.run", description=__doc__)
    add_pipeline_arguments(parser)
    parser.add_argument(
        "--docker", action="store_true", help="run each step in its image (`make build-images`)"
    )
    run_command(run, parser)


if __name__ == "__main__":
    sys.exit(main())
