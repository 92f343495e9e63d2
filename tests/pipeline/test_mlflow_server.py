"""The MLflow server of cluster/ with a real PostgreSQL and a server of S3: as a process, and as its image."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import boto3
import mlflow
import psycopg2
import pytest
import yaml
from moto.server import ThreadedMotoServer
from real_docker import client_with_images

from components import image_of
from dynamic_transformers.settings import PROJECT_ROOT, TrackingSettings
from dynamic_transformers.tracking import ComparedRun, RunTracker, find_evaluated, track_comparison, view_of
from pipelines.images import SERVER

MARK = "5gq7x2"  # found also in a password that was quoted for a URI
WEIGHTS = bytes(range(256)) * 5000
PASSWORD = f"p@ss/w:rd%21#?{MARK}"
STAGE = (PROJECT_ROOT / "images/Dockerfile").read_text().partition(" AS mlflow\n")[2].partition("\nFROM")[0]
SERVICES = yaml.safe_load((PROJECT_ROOT / "cluster/mlflow-compose.yaml").read_text())["services"]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def filled(environment, **values):
    """An `environment` of the compose file with `${NAME...}` filled in."""

    def value(match):
        name, default = match.groups()
        return values.get(name, default)

    return {key: re.sub(r"\$\{(\w+):[-?]([^}]*)\}", value, text) for key, text in environment.items()}


@pytest.fixture(scope="module", autouse=True)
def client_without_secrets():
    """Nothing of AWS, PostgreSQL or MLflow in the environment of the client, which is this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "PG", "MLFLOW_"))]:
            patch.delenv(name)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
        yield


@pytest.fixture(scope="module")
def database():
    """Port of a PostgreSQL with the user and the database that the official image makes."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    binaries = folders[-1] if folders else Path(shutil.which("initdb") or "/missing/initdb").parent
    # PostgreSQL refuses to run as root.
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    try:
        subprocess.run([*user, binaries / "postgres", "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs PostgreSQL's server (Debian: apt-get install postgresql): {error}")
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "password").write_text(PASSWORD)
        if user:
            shutil.chown(folder, "postgres")
            shutil.chown(folder / "password", "postgres")
        data = f"--pgdata={folder}/data"
        make = ["--username=mlflow", f"--pwfile={folder}/password", "--auth=scram-sha-256"]
        subprocess.run([*user, binaries / "initdb", data, *make], check=True, capture_output=True)
        control = [*user, binaries / "pg_ctl", data]
        options = f"-h 127.0.0.1 -p {port} -k {folder}"
        start = ["--wait", f"--log={folder}/log", f"--options={options}", "start"]
        subprocess.run([*control, *start], check=True, stdout=subprocess.DEVNULL)
        try:
            with contextlib.closing(connect(port, "postgres")) as connection:
                connection.autocommit = True
                connection.cursor().execute("CREATE DATABASE mlflow")
            yield port
        finally:
            subprocess.run([*control, "--mode=fast", "stop"], check=True, stdout=subprocess.DEVNULL)


def connect(port, database="mlflow"):
    return psycopg2.connect(host="127.0.0.1", port=port, user="mlflow", password=PASSWORD, dbname=database)


@pytest.fixture(scope="module")
def objects():
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def bucket_contents(endpoint):
    s3 = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id="any", aws_secret_access_key="any")
    listed = s3.list_objects_v2(Bucket="mlflow").get("Contents", [])
    return {entry["Key"]: s3.get_object(Bucket="mlflow", Key=entry["Key"])["Body"].read() for entry in listed}


class Process:
    """The image's command and environment, without the image."""

    def __init__(self, environment, folder):
        self.command = [sys.executable, "-m", *json.loads(re.search(r"^CMD (.*)$", STAGE, re.M)[1])]
        self.environment = os.environ | dict(re.findall(r"\b(MLFLOW_\w+)=(\S+)", STAGE)) | environment
        self.folder = folder

    def start(self, *options):
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [*self.command, *options],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def runs(self):
        return self.process.poll() is None

    def log(self):
        return (self.folder / "log").read_text()

    def stop(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()


class Image:
    """The image, with no more rights than a cluster gives it."""

    def __init__(self, environment, folder):
        self.client = client_with_images(SERVER)
        self.image, self.environment = self.client.images.get(image_of(SERVER)), environment

    def start(self, *options):
        self.container = self.client.containers.run(
            self.image,
            [*self.image.attrs["Config"]["Cmd"], *options],
            environment=self.environment,
            detach=True,
            network_mode="host",
            read_only=True,
            tmpfs={"/tmp": ""},
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
        )

    def runs(self):
        self.container.reload()
        return self.container.status == "running"

    def log(self):
        return self.container.logs().decode()

    def stop(self):
        self.container.stop(timeout=30)
        self.container.remove()


class Server:
    """A server that can be started again, and what it stands on."""

    def __init__(self, runner, database, objects):
        self.runner, self.database, self.objects = runner, database, objects
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        self.runner.start("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1")
        for _ in range(600):
            with contextlib.suppress(OSError):
                self.get("/health")
                return
            assert self.runner.runs(), self.runner.log()
            time.sleep(0.5)
        raise AssertionError(self.runner.log())

    def stop(self):
        self.runner.stop()

    def get(self, path, **headers):
        """Status of the answer."""
        try:
            with urllib.request.urlopen(urllib.request.Request(self.uri + path, headers=headers)) as answer:
                return answer.status
        except HTTPError as error:
            return error.code


@pytest.fixture(scope="module", params=[Process, Image])
def server(request, database, objects, tmp_path_factory):
    secrets = {"PGPASSWORD": PASSWORD, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any-secret"}
    bucket = SERVICES["bucket"]
    here = {"AWS_ENDPOINT_URL_S3": objects}
    make_bucket = [sys.executable, *bucket["command"][1:]]
    subprocess.run(make_bucket, env=os.environ | filled(bucket["environment"], **secrets) | here, check=True)
    here |= {"PGHOST": "127.0.0.1", "PGPORT": str(database)}
    environment = filled(SERVICES["mlflow"]["environment"], **secrets) | here
    server = Server(request.param(environment, tmp_path_factory.mktemp("server")), database, objects)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def run_id(server, tmp_path):
    """A model's run, tracked as the pipeline does it, with a comparison's report."""
    settings = TrackingSettings(experiment="cluster", mlflow_uri=server.uri)
    tags = {"run": "mod-seed0"}
    tracker = RunTracker(tmp_path, settings, tmp_path, "mod-seed0", {"model": {"type": "mod"}}, tags)
    for step in (1, 2):
        tracker.log(step, {"tokens": step * 100, "train/loss": 1 / step})
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights.bin").write_bytes(WEIGHTS)
    tracker.log_artifacts(model, "model", large=True)
    tracker.log_final(200, {"test/loss": 0.25})
    tracker.log_comparison(tmp_path.name)
    assert tracker.close("FINISHED")
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.html").write_text("<p>equal work</p>")
    found = find_evaluated(settings, tmp_path, tmp_path.name)
    assert found == {"mod-seed0": tracker.run_id}
    track_comparison(
        settings, tmp_path, "comparison", [ComparedRun(tracker.run_id, "mod", "#0072b2", loss=0.25)], report
    )
    return tracker.run_id


def check_tracked(uri, run_id, tmp_path):
    client = mlflow.MlflowClient(uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.type"] == "mod" and run.data.metrics["test/loss"] == 0.25
    losses = client.get_metric_history(run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in losses] == [(100, 1.0), (200, 0.5)]
    weights = client.download_artifacts(run_id, "model/weights.bin", str(tmp_path))
    assert Path(weights).read_bytes() == WEIGHTS
    parent = client.get_run(run.data.tags["report"])
    assert parent.info.status == "FINISHED" and parent.data.tags["view"] == view_of(
        TrackingSettings(mlflow_uri=uri), tmp_path
    )
    best = client.get_model_version_by_alias("comparison", "best")
    assert best.run_id == run_id and best.source.startswith("mlflow-artifacts:/")
    reports = client.list_artifacts(parent.info.run_id, "report")
    assert [entry.path for entry in reports] == ["report/report.html"]


def test_runs_lie_in_postgresql_and_artifacts_in_the_bucket(server, run_id, tmp_path):
    check_tracked(server.uri, run_id, tmp_path)
    with contextlib.closing(connect(server.database)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT name, status, artifact_uri FROM runs WHERE run_uuid = %s", [run_id])
        ((name, status, artifacts),) = cursor.fetchall()
        assert (name, status) == ("mod", "FINISHED")
        # Through the server: a client needs no access to the bucket.
        assert artifacts.startswith("mlflow-artifacts:/")
        cursor.execute("SELECT value FROM metrics WHERE run_uuid = %s AND key = 'test/loss'", [run_id])
        assert cursor.fetchall() == [(0.25,)]
    stored = {key.rpartition(f"{run_id}/")[2]: body for key, body in bucket_contents(server.objects).items()}
    assert stored["artifacts/model/weights.bin"] == WEIGHTS


def test_a_restarted_server_still_has_them(server, run_id, tmp_path):
    server.stop()
    server.start()
    check_tracked(server.uri, run_id, tmp_path)


def test_the_database_password_is_in_no_log_and_on_no_command_line(server, run_id):
    processes = subprocess.run(["ps", "-eww", "-o", "args="], capture_output=True, text=True).stdout
    assert str(server.port) in processes and "Uvicorn running" in server.runner.log()
    assert MARK not in processes and MARK not in server.runner.log()


@pytest.mark.parametrize(
    ("host", "status"),
    [("mlflow:5000", 200), ("localhost:8080", 200), ("mlflow.evil.example:5000", 403)],
)
def test_it_answers_only_to_its_own_names(server, host, status):
    assert server.get("/api/2.0/mlflow/experiments/get?experiment_id=0", Host=host) == status
    assert server.get("/health", Host=host) == 200
