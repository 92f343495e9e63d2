"""Runs the compiled pipeline on this machine: `python -m pipelines.run`.

Each step is a process, or with `--docker` a container of its image. The same runs, and the same settings but
for those that change no result, have the same folder: called again, the pipeline goes on from what has
finished and from training's checkpoints.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import docker
from docker.errors import NotFound
from docker.types import Mount
from kfp import local
from kfp.components import load_component_from_file

from components import image_of
from dynamic_transformers.command_line import path, run_command
from dynamic_transformers.folders import set_aside, sole_writer
from dynamic_transformers.manifest import digest, fresh_folder, read_manifest, revision, write_json
from dynamic_transformers.reading import flat
from dynamic_transformers.settings import Settings, TrackingSettings, UserError
from dynamic_transformers.tracking import report_of, tracking_uri, view_of
from dynamic_transformers.tracking.store import store_name
from dynamic_transformers.tracking.view import LOCAL_SERVER, full_link
from dynamic_transformers.training.identity import settings_identity
from pipelines.arguments import (
    add_pipeline_arguments,
    add_shards_argument,
    data_shards_of,
    pipeline_arguments,
    refuse_own_tasks,
)
from pipelines.cluster import LOCAL
from pipelines.compile import compile_pipeline
from pipelines.console import quiet_console
from pipelines.docker_status import DOCKER_ERRORS
from pipelines.images import STEPS, warn_of_revision_mismatch
from pipelines.local_steps import LocalSteps

# Variables of the caller that containers get too; not those that name files of this machine.
PASSED_ON = re.compile(
    r"MLFLOW_TRACKING_(URI|USERNAME|PASSWORD|TOKEN|AUTH|AWS_SIGV4|INSECURE_TLS)"
    r"|HF_(TOKEN|ENDPOINT)|WANDB_(API_KEY|BASE_URL)|(HTTPS?|NO)_PROXY|OMP_(NUM_THREADS|WAIT_POLICY)",
    re.IGNORECASE,  # proxies are often in small letters
)


def run(args: argparse.Namespace) -> None:
    """Compile, run, and show where the results are."""
    settings, study = pipeline_arguments(args, here=True)
    data_shards = data_shards_of(args)
    data = prepared_data(settings, args.data_uri) if args.data_uri else None
    runs = [run.name for run in study]
    # Steps run in folders of their own: places must not depend on where they are.
    settings.run.output_dir = str(Path(settings.run.output_dir).resolve())
    folder = settings.run_dir
    root = folder / "pipeline"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.output_dir: {root} cannot be made: {error.strerror}") from error
    if not os.environ.get("MLFLOW_TRACKING_URI"):  # the steps inherit it, with whatever secret it holds
        settings.tracking.mlflow_uri = tracking_uri(settings.tracking, settings.run.output_dir)
    os.environ.pop("MLFLOW_RUN_ID", None)  # it would be that of every step here
    os.environ["DYNAMIC_TRANSFORMERS_REVISION"] = revision()  # that of all steps, however long they take
    runner = docker_runner(settings, data) if args.docker else local.SubprocessRunner(use_venv=False)
    with sole_writer(folder):
        check_report(folder / "report")
        execution = execution_of(root, execution_identity(settings, data), args.force)
        tell_program(execution, ", ".join(map(image_of, STEPS)) if args.docker else revision())
        run_here(settings, runs, runner, execution, data, data_shards)


def prepared_data(settings: Settings, folder: Path) -> Path:
    """The folder of `--data-uri`, which holds data of these settings.

    Raises:
        UserError: it holds nothing of the kind.
    """
    # Not above: it takes seconds, and the steps alone need it otherwise.
    from dynamic_transformers.data.prepare import check_prepared

    folder = folder.resolve()
    try:
        check_prepared(settings, folder)
    except UserError as error:
        raise UserError(f"--data-uri: {error}") from error
    return folder


def run_here(
    settings: Settings, runs: list[str], runner: Any, execution: Path, data: Path | None, data_shards: int
) -> None:
    """Run the pipeline, its outputs in `execution`, where what has finished of it is found.

    Args:
        data: prepared before; None: they are prepared now.
        data_shards: as `comparison_pipeline` takes it.

    Raises:
        UserError: it failed, or ended without a comparison.
        SystemExit: a signal ended it.
    """
    start = time.time()
    folder, failure = settings.run_dir, None
    logs = folder / "logs"
    package = compile_pipeline(LOCAL, execution.with_suffix(".yaml"), str(data or ""), data_shards)
    # What an earlier try's last step said of it.
    shutil.rmtree(execution / "report-finished", ignore_errors=True)
    local.init(runner, pipeline_root=str(execution.parent))
    pipeline = load_component_from_file(str(package))
    steps = LocalSteps()
    steps.install(execution.name)
    try:
        with steps.heeding_signals(), quiet_console(logs / "pipeline.log", lambda: bool(steps.signal)):
            pipeline(settings=settings.to_json())
    except (RuntimeError, *DOCKER_ERRORS) as error:  # RuntimeError: how the runner tells that a task failed
        failure = str(error).splitlines()[0]
    finally:
        collect_logs(execution, runs, logs)
    if steps.signal:
        name = signal.Signals(steps.signal).name
        print(f"ended by {name}; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(128 + steps.signal)
    report = execution / ("report-finished" if failure else "compare") / "report"
    if (report / "comparison.json").is_file():
        with fresh_folder(folder / "report", "compare") as copy:
            shutil.copytree(report, copy, dirs_exist_ok=True)
        show(settings, time.time() - start)
    elif not failure:
        failure = "it ended without a comparison"
    if failure:
        raise UserError(f"the pipeline failed ({failure}); its logs are in {logs}")


def execution_identity(settings: Settings, data: Path | None = None) -> dict[str, Any]:
    """What two calls must have in common to be one execution, by key: all that decides what it computes.

    Of the training that is its identity and its budget, as for a run folder; of data that were prepared
    before, what they hold. Where anything is tracked or kept does not count.
    """
    values = settings.to_dict()
    del values["data"]["batch_size"]  # in the identity's `global_batch`
    del values["data"]["processes"]
    budget = {key: values["training"][key] for key in ("max_steps", "max_tokens", "max_flops")}
    rest = {key: values[key] for key in ("data", "evaluation", "study")} | {"training": budget}
    imported = {"--data-uri": read_manifest(data)["content_digest"]} if data else {}
    return {**settings_identity(settings), **flat(rest), "run.name": settings.run.name, **imported}


def execution_of(root: Path, identity: dict[str, Any], force: bool) -> Path:
    """The folder of an execution, its identity written beside it; says why it begins anew, if it does."""
    execution = root / digest(identity)[:12]
    records = sorted(root.glob("*.identity.json"), key=lambda path: path.stat().st_mtime)
    if execution.is_dir() and force:
        print(f"moved aside: {set_aside(execution)}")
    elif records and not execution.is_dir():
        before = read_identity(records[-1])
        keys = [key for key in {**before, **identity} if before.get(key) != identity.get(key)]
        listed = ", ".join(f"{key} ({before.get(key)} there, {identity.get(key)} now)" for key in keys)
        if before and keys:
            print(f"begins anew, since settings differ from {records[-1].name.split('.')[0]}: {listed}")
    write_json(execution.with_suffix(".identity.json"), identity)
    return execution


def read_identity(record: Path) -> dict[str, Any]:
    """The identity of an earlier execution; empty where the file is damaged: it only explains."""
    try:
        identity = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    return identity if isinstance(identity, dict) else {}


def tell_program(execution: Path, program: str) -> None:
    """Say that an execution goes on, and if it does so with another program than it was begun with."""
    record = execution.with_suffix(".program")
    if execution.is_dir():
        print(f"goes on in {execution}; --force begins anew")
        if record.is_file() and (before := record.read_text()) != program:
            print(f"warning: it was begun with {before}, and goes on with {program}", file=sys.stderr)
    record.write_text(program)


def check_report(report: Path) -> None:
    """Refuse to put the report where something else is.

    Raises:
        UserError: names the place.
    """
    ours = (report / "comparison.json").is_file() or not report.exists()
    if not ours and (not report.is_dir() or any(report.iterdir())):
        raise UserError(
            f"{report}: is no report of a pipeline, which would go there; move it, or give another run.name"
        )


def docker_runner(settings: Settings, data: Path | None = None) -> local.DockerRunner:
    """Containers that see `run.output_dir`, `data` and the host's network; their files belong to the caller.

    Raises:
        UserError: Docker cannot be used, an image of the pipeline is missing, or task files of one's own.
    """
    refuse_own_tasks(settings, "a container")
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
    output_dir = settings.run.output_dir
    mounts = [Mount(target=output_dir, source=output_dir, type="bind")]
    if data:
        mounts.append(Mount(target=str(data), source=str(data), type="bind", read_only=True))
    return local.DockerRunner(
        mounts=mounts,
        user=f"{os.getuid()}:{os.getgid()}",
        network_mode="host",  # a tracking server on localhost is the same for steps as for people
        shm_size="2g",  # Docker's 64 MB are too few for data loaders and gloo
        environment={name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)},
    )


def collect_logs(execution: Path, runs: list[str], logs: Path) -> None:
    """Copy every step's log to `logs`, named after step and run, or group of shards."""
    logs.mkdir(parents=True, exist_ok=True)
    for log in sorted(execution.rglob("*.log")):
        name, loop = log.parent.name, log.relative_to(execution).parts[0]
        if loop.startswith("for-loop"):
            iteration = int(loop.rpartition("-")[2])
            name += f"-{iteration + 1 if name == 'tokenize-shards' else runs[iteration]}"
        shutil.copy(log, logs / f"{name}.log")


def show(settings: Settings, seconds: float) -> None:
    """Print the table, the report's place and the link to the charts."""
    from dynamic_transformers.comparison.compare import print_comparison, tracked_runs

    folder = settings.run_dir
    print_comparison(folder / "report")
    print(f"logs:   {folder / 'logs'}")
    print(f"MLflow: {charts(settings, tracked_runs(folder / 'report'))}")
    print(f"time:   {seconds:.0f} s")


def charts(settings: Settings, runs: list[str]) -> str:
    """Where MLflow shows a comparison of these runs."""
    store = (settings.tracking, settings.run.output_dir)
    uri = tracking_uri(*store)
    try:
        report = report_of(*store, runs)
        link = view_of(*store, report) if report else None
    except UserError as error:
        return str(error)
    if link is None:
        return "has no report of these runs"
    if uri.startswith("http"):
        return full_link(uri, link)
    ours = uri == tracking_uri(TrackingSettings(), "outputs")
    command = "make mlflow-ui" if ours else f"MLFLOW_TRACKING_URI={store_name(uri)} make mlflow-ui"
    return f"{command}, then {full_link(LOCAL_SERVER, link)}"


def main() -> None:
    """Entry of `python -m pipelines.run`."""
    logging.getLogger("kfp").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(prog="pipelines.run", description=__doc__)
    add_pipeline_arguments(parser)
    parser.add_argument(
        "--data-uri",
        type=path,
        metavar="FOLDER",
        help="prepared data, such as outputs/data/..., that are taken instead of preparing them",
    )
    add_shards_argument(parser)
    parser.add_argument(
        "--docker", action="store_true", help="run each step in its image (`make build-images`)"
    )
    parser.add_argument(
        "--force", action="store_true", help="begin anew; what an earlier call has left is moved aside"
    )
    run_command(run, parser)


if __name__ == "__main__":
    sys.exit(main())
