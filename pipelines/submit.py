# pyright: reportArgumentType=false, reportOptionalOperand=false
# The server's API, generated for kfp, declares every field of an answer as optional.
"""Submits the pipeline to a Kubeflow Pipelines server: `python -m pipelines.submit --host URL`.

A package is uploaded once: its version is named after its content. The bearer token comes from `--token-file`
or KFP_TOKEN, else kfp's own credentials serve: ~/.config/kfp/context.json, or in a cluster the token of the
service account. SSL_CERT_FILE may name the certificates to trust.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kfp
import yaml
from kfp.client import (
    KF_PIPELINES_SA_TOKEN_ENV,
    KF_PIPELINES_SA_TOKEN_PATH,
    ServiceAccountTokenVolumeCredentials,
)
from kfp_server_api import ApiException, V2beta1PipelineVersion, V2beta1Run
from urllib3.exceptions import HTTPError, MaxRetryError, SSLError

from dynamic_transformers import __version__
from dynamic_transformers.command_line import run_command
from dynamic_transformers.manifest import digest
from dynamic_transformers.settings import UserError
from pipelines.arguments import add_pipeline_arguments, pipeline_arguments
from pipelines.compile import add_cluster_argument, cluster_of, compile_pipeline
from pipelines.images import warn_of_revision_mismatch

INPUTS = ("settings", "architectures", "seeds")
REQUEST_TIMEOUT = (3, 10)  # seconds to connect, which urllib3 tries four times, and to answer
POLL_SECONDS = 5.0
PATIENCE = 12  # polls in a row without an answer before --wait gives up
ENDED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")


@dataclass
class Package:
    """A compiled pipeline: its file, its name, the name of the version that holds its content, its images."""

    path: Path
    name: str
    version: str
    images: list[str]


class Client(kfp.Client):
    """kfp's client, but it gives up within seconds where kfp's asks for minutes, or waits for ever."""

    def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
        """Ask once, and refuse whatever else answers there: kfp takes any page for a healthy server."""
        try:
            health = self._healthz_api.healthz_service_get_healthz(_request_timeout=REQUEST_TIMEOUT)
            json.loads(self._healthz_api.api_client.last_response.data)
            return health
        except ApiException as error:
            if error.status != 404:
                raise
            reason = "it has no health page"
        except ValueError:
            reason = "its health page is not JSON; if it is one to log in, give a token"
        raise UserError(f"{self._existing_config.host} is no Kubeflow Pipelines server: {reason}")

    def get_run(self, run_id: str) -> Any:
        """Ask for the state of a run."""
        return self._run_api.run_service_get_run(run_id=run_id, _request_timeout=REQUEST_TIMEOUT)


def submit(args: argparse.Namespace) -> None:
    """Upload the pipeline where its content is new, start a run, and wait for it if asked."""
    settings, parameters = pipeline_arguments(args)
    parameters["settings"] = settings.to_json()
    host = server_address(args.host or os.environ.get("KFP_HOST", ""))
    if args.timeout < math.inf and not args.wait:
        raise UserError("--timeout needs --wait")
    if args.package and args.cluster:
        raise UserError("--cluster is for a pipeline that is compiled now; --package has its own")
    token_file = token_place(args.token_file)
    token = read_token(token_file)
    experiment_name = args.experiment or settings.tracking.experiment
    run_name = args.run_name or f"{settings.run.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    with tempfile.TemporaryDirectory() as folder, plain_errors(host, token):
        compiled = Path(folder) / "pipeline.yaml"
        package = read_package(args.package or compile_pipeline(cluster_of(args), compiled))
        if not args.local_images:
            check_pushed(package)
        if not args.package:
            warn_of_revision_mismatch()
        client = connect(host, token_file, token)
        namespace = args.namespace or client.get_user_namespace() or None
        with redirect_stdout(None):  # kfp prints links of its own
            experiment = client.create_experiment(experiment_name, namespace=namespace)
            version, uploaded = upload(client, package, namespace)
            run_id = client.run_pipeline(
                experiment.experiment_id,
                run_name,
                params=parameters,
                pipeline_id=version.pipeline_id,
                version_id=version.pipeline_version_id,
            ).run_id
        link = f"{host}/#/runs/details/{run_id}"
        print(f"experiment: {experiment_name}")
        print(f"pipeline:   {package.name}, {package.version}, {'uploaded' if uploaded else 'already there'}")
        print(f"run:        {run_name}, {run_id}")
        print(f"link:       {link}", flush=True)
        if args.wait:
            check_success(follow(client, run_id, link, args.timeout), link)


def server_address(host: str) -> str:
    """`host` without a slash at its end.

    Raises:
        UserError: empty, no URL, or one that holds a password, which would be printed.
    """
    if not host:
        raise UserError("no server: give --host https://... or set KFP_HOST")
    if not re.fullmatch(r"https?://[^/@\s]+(/[^@\s]*)?", host):
        raise UserError("--host: must be like https://host or https://host:8080/pipeline, without a password")
    return host.rstrip("/")


def read_package(path: Path) -> Package:
    """Read what `pipelines.compile` wrote.

    Raises:
        UserError: no such file, no pipeline, or one that does not take our parameters.
    """
    try:
        documents = list(yaml.safe_load_all(path.read_text()))
        name = documents[0]["pipelineInfo"]["name"]
        inputs = documents[0]["root"].get("inputDefinitions", {}).get("parameters", {})
        executors = documents[0]["deploymentSpec"]["executors"].values()
        images = [executor["container"]["image"] for executor in executors if "container" in executor]
        version = f"{__version__}-{digest(documents)[:12]}"
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no compiled pipeline; `make pipeline` writes one") from error
    if missing := [name for name in INPUTS if name not in inputs]:
        raise UserError(f"{path}: pipeline {name} has no parameter {', '.join(missing)}")
    return Package(path, name, version, images)


def check_pushed(package: Package) -> None:
    """Refuse images that no registry has given a digest: a cluster would try to pull them for ever.

    Raises:
        UserError: names the first.
    """
    for image in package.images:
        if "@sha256:" not in image:
            raise UserError(
                f"{image} was not pushed: run `make build-images push-images REGISTRY=...`,"
                " or give --local-images if the cluster has this machine's images"
            )


def token_place(token_file: Path | None) -> Path | None:
    """The file that holds the token: as asked, or in a cluster the service account's; None for KFP_TOKEN."""
    volume = Path(os.environ.get(KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH))
    if token_file is None and not os.environ.get("KFP_TOKEN") and volume.is_file():
        return volume
    return token_file


def read_token(token_file: Path | None) -> str:
    """The bearer token, empty if there is none.

    Raises:
        UserError: the file cannot be read, or what it or KFP_TOKEN holds is no token. Never shows it.
    """
    try:
        text = os.environ.get("KFP_TOKEN", "") if token_file is None else token_file.read_text("latin-1")
    except OSError as error:
        raise UserError(f"--token-file {token_file}: {error.strerror}") from error
    token = text.strip()
    if not re.fullmatch(r"[!-~]*", token) or (token_file and not token):
        raise UserError(f"{token_file or 'KFP_TOKEN'}: must hold one token, and nothing else")
    return token


def connect(host: str, token_file: Path | None, token: str) -> Client:
    """A client of a server that is there and well; it reads a token file again for each request."""
    credentials = ServiceAccountTokenVolumeCredentials(str(token_file)) if token_file else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # "only works with Kubeflow Pipelines 2"
        client = Client(
            host,
            existing_token=None if token_file else token or None,
            credentials=credentials,
            ssl_ca_cert=os.environ.get("SSL_CERT_FILE"),
        )
    client.get_kfp_healthz()
    return client


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


def named(name: str) -> str:
    """The server's filter for things of this name."""
    equals = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    return json.dumps({"predicates": [equals]})


def follow(client: Client, run_id: str, link: str, timeout: float) -> V2beta1Run:
    """Print each change of state of the run and its tasks until the run ends.

    Raises:
        UserError: it has not ended after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    states, silent = {}, 0
    while True:
        try:
            run, silent = client.get_run(run_id), 0
        except (ApiException, HTTPError) as error:
            silent += 1
            if silent > PATIENCE or (isinstance(error, ApiException) and error.status < 500):
                raise
            run = V2beta1Run()
        tasks = [(task.task_id, task.display_name, task.state) for task in task_details(run)]
        for key, name, state in [*tasks, (run_id, "run", run.state)]:
            if state and states.get(key) != state:
                states[key] = state
                print(f"{datetime.now():%H:%M:%S} {name}: {state}", flush=True)
        if run.state in ENDED:
            return run
        if time.monotonic() >= deadline:
            raise UserError(f"the run has not ended after {timeout:g} s and goes on: {link}")
        time.sleep(POLL_SECONDS)


def check_success(run: V2beta1Run, link: str) -> None:
    """Refuse a run that did not succeed.

    Raises:
        UserError: names its state and the first tasks that failed.
    """
    if run.state == "SUCCEEDED":
        return
    failed = [task for task in task_details(run) if task.state == "FAILED"]
    # A loop fails after the step in it that failed.
    failed.sort(key=lambda task: task.end_time.timestamp() if task.end_time else math.inf)
    reasons = [
        f"{task.display_name} failed" + (f" ({task.error.message})" if task.error else "")
        for task in failed[:3]
    ]
    if not reasons and run.error:
        reasons = [run.error.message]
    line = ", ".join(reasons) or "the server names no failed task"
    raise UserError(f"the run ended {run.state}: {' '.join(line.split())}; see {link}")


def task_details(run: V2beta1Run) -> list:
    """Tasks of a run, as far as the server tells."""
    return (run.run_details and run.run_details.task_details) or []


@contextmanager
def plain_errors(host: str, token: str) -> Iterator[None]:
    """Turn what kfp's client raises into a UserError of one line, without the token."""
    try:
        yield
    except (ApiException, HTTPError) as error:
        line = refusal(host, error) if isinstance(error, ApiException) else silence(host, error)
        raise UserError(line.replace(token, "***") if token else line) from error


def refusal(host: str, error: ApiException) -> str:
    """What the server answered: `message` of its gateway, `error_message` of its uploads, or plain text."""
    try:
        answer = json.loads(error.body or "")
        message = answer.get("message") or answer.get("error_message") or error.reason
    except (ValueError, AttributeError):
        page = not error.body or "<" in error.body
        message = error.reason if page else error.body
    line = f"{host} answered {error.status}: {' '.join(str(message).split())}"
    if error.status in (401, 403):
        line += "; give a token that is valid there, by --token-file or KFP_TOKEN"
    return line


def silence(host: str, error: HTTPError) -> str:
    """Why there was no answer."""
    reason = error.reason if isinstance(error, MaxRetryError) else error
    detail = str(reason).rpartition(": ")[2]
    if isinstance(reason, SSLError):
        return f"{host}: no secure connection ({detail}); SSL_CERT_FILE may name the certificates to trust"
    return f"nothing answers at {host} ({detail})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m pipelines.submit`."""
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it warns of each attempt
    parser = argparse.ArgumentParser(prog="pipelines.submit", description=__doc__)
    parser.add_argument("--host", help="https://... of the server (default: KFP_HOST)")
    parser.add_argument("--experiment", help="default: tracking.experiment")
    parser.add_argument("--run-name", help="default: run.name and the time")
    parser.add_argument("--namespace", help="where several users share the server")
    parser.add_argument("--wait", action="store_true", help="follow the run until it ends")
    parser.add_argument("--timeout", type=float, default=math.inf, metavar="SECONDS", help="of --wait")
    parser.add_argument("--token-file", type=Path, help="holds the bearer token (default: KFP_TOKEN)")
    parser.add_argument("--package", type=Path, help="a compiled pipeline (default: compile it now)")
    parser.add_argument(
        "--local-images",
        action="store_true",
        help="take images that were not pushed: the cluster has this machine's (kind load docker-image)",
    )
    add_cluster_argument(parser)
    add_pipeline_arguments(parser)
    run_command(submit, parser, arguments)


if __name__ == "__main__":
    main()
