"""Real containers. Skipped, loudly in CI (see .ci/run), without an engine or the images of these sources."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import mlflow
import pytest
from docker.models.containers import Container
from kfp.local import docker_task_handler
from real_docker import client_with_images

from components import image_of
from dynamic_transformers.settings import PROJECT_ROOT
from pipelines.images import SERVER, STEPS
from pipelines.local_steps import LocalSteps


@pytest.fixture(scope="module")
def client():
    return client_with_images(*STEPS, SERVER)


def in_container(client, step, *command):
    return client.containers.run(image_of(step), list(command) or None, remove=True).decode()


@pytest.mark.parametrize(
    ("step", "usage"),
    [("prepare", "prepare"), ("train", "train"), ("export", "export"), ("evaluate", "bench")],
)
def test_each_image_shows_its_command(client, step, usage):
    assert in_container(client, step).startswith(f"usage: dynamic-transformers {usage}")


@pytest.mark.parametrize("step", (*STEPS, SERVER))
def test_images_are_labelled_and_have_no_entrypoint_and_no_root(client, step):
    config = client.images.get(image_of(step)).attrs["Config"]
    assert not config["Entrypoint"] and config["User"] == "1000:1000"
    assert "OMP_WAIT_POLICY=PASSIVE" in config["Env"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == "0.1.0"
    assert f"DYNAMIC_TRANSFORMERS_REVISION={labels['org.opencontainers.image.revision']}" in config["Env"]
    assert len(labels["org.opencontainers.image.revision"]) >= 40 or "unversioned" in str(labels)


@pytest.mark.parametrize("step", (*STEPS, SERVER))
@pytest.mark.parametrize("user", ["1000:1000", "4321:4321"])
def test_whoever_runs_an_image_can_write_caches_and_read_the_code(client, step, user):
    write = "mkdir -p ~/.cache/huggingface && touch ~/.cache/huggingface/hub"
    read = "find /app ! -readable"
    seen = client.containers.run(image_of(step), ["sh", "-c", f"{write} && {read}"], user=user, remove=True)
    assert seen == b""


@pytest.mark.parametrize(
    ("step", "module", "present"),
    [
        ("prepare", "torch", False),
        ("train", "torch", True),
        ("train", "lm_eval", False),
        ("export", "wandb", False),
        ("evaluate", "lm_eval", True),
        ("train", "wandb", True),
    ],
)
def test_an_image_has_only_what_its_step_needs(client, step, module, present):
    found = in_container(
        client,
        step,
        "python",
        "-c",
        f"import importlib.util as u; print(u.find_spec('{module}') is not None)",
    )
    assert found.strip() == str(present)


def failing_step_status(client, monkeypatch):
    """Exit code that kfp's runner sees of a container that exits with 3, when it comes late to ask for it."""
    logs = Container.logs

    def late(container, **options):
        yield from logs(container, **options)
        time.sleep(2)

    monkeypatch.setattr(Container, "logs", late)
    command = ["bash", "-c", "echo gone; exit 3"]
    return docker_task_handler.run_docker_container(client, image_of("prepare"), command, {})


def test_kfp_still_takes_a_removed_container_for_a_successful_one(client, monkeypatch):
    # When this fails, kfp is mended: LocalSteps may start containers by kfp's function.
    assert failing_step_status(client, monkeypatch) == 0


def test_every_failed_container_is_reported(client, monkeypatch):
    monkeypatch.setattr(docker_task_handler, "run_docker_container", LocalSteps().run_container)
    assert failing_step_status(client, monkeypatch) == 3


@pytest.fixture
def mlflow_server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = tmp_path / "server"
    store.mkdir()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{store}/mlflow.db", "--artifacts-destination", str(store)]
    with (store / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{uri}/health").read()
                break
            time.sleep(0.5)
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def run_in_docker(output_dir, *arguments, **environment):
    command = [sys.executable, "-m", "pipelines.run", "--docker", f"run.output_dir={output_dir}", *arguments]
    return subprocess.run(
        command, cwd=PROJECT_ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def test_the_pipeline_runs_with_each_step_in_its_container(client, tmp_path, micro_overrides, mlflow_server):
    output_dir = tmp_path / "outputs"
    budget = "training.max_flops=2.0e9"
    result = run_in_docker(
        output_dir, "--variants", "mod", budget, *micro_overrides, MLFLOW_TRACKING_URI=mlflow_server
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = output_dir / "quickstart" / "report"
    (run,) = json.loads((report / "comparison.json").read_text())["runs"]
    assert run["architecture"] == "mod" and run["eval"]["causal"] is True
    manifest = json.loads((report / "manifest.json").read_text())
    revision = client.images.get(image_of("evaluate")).labels["org.opencontainers.image.revision"]
    assert manifest["git_revision"] == revision  # it was the image that ran, not this checkout
    assert {path.stat().st_uid for path in output_dir.rglob("*")} == {os.getuid()}
    # The steps reached the server on this host.
    tracked = mlflow.MlflowClient(mlflow_server)
    assert "test/loss" in tracked.get_run(run["mlflow_run_id"]).data.metrics
    assert "model" in {artifact.path for artifact in tracked.list_artifacts(run["mlflow_run_id"])}


def test_a_step_that_fails_in_its_container_fails_the_run(client, tmp_path, micro_overrides):
    sources = "data.dataset_configs=[{name: gone, path: json, data_files: /nowhere/gone.jsonl}]"
    result = run_in_docker(tmp_path, "--variants", "standard", *micro_overrides, sources)
    assert result.returncode == 2
    assert "/nowhere/gone.jsonl" in result.stdout and "prepare-data" in result.stderr
