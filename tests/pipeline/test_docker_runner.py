"""What `python -m pipelines.run --docker` asks of an engine, and how it fails; no engine is needed."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import docker
import pytest
import real_docker
import requests
from docker.errors import APIError, DockerException, NotFound
from kfp.local import config, docker_task_handler, executor_input_utils, subprocess_task_handler
from real_docker import client_with_images

import components
from dynamic_transformers.settings import PROJECT_ROOT, UserError
from pipelines import images
from pipelines.run import docker_runner, main

SECRET = "a-secret-that-nobody-may-see"


@pytest.fixture
def engine(monkeypatch):
    """A Docker engine that has every image."""
    engine = SimpleNamespace(
        images=SimpleNamespace(get=lambda name: name),
        info=dict,
        close=lambda: None,
    )
    monkeypatch.setattr(docker, "from_env", lambda: engine)
    # LocalSteps replaces them; other tests see them as they were.
    for module, name in (
        (docker_task_handler, "run_docker_container"),
        (subprocess_task_handler, "run_local_subprocess"),
        (executor_input_utils, "get_local_pipeline_resource_name"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(images, "revision_mismatch", lambda: "")
    return engine


def raising(error):
    def call(*arguments, **options):
        raise error

    return call


def test_a_container_reads_no_tasks_of_this_machine(engine, make_settings):
    with pytest.raises(UserError, match=r"evaluation.task_dir=tasks: a container cannot read .* bench.py"):
        docker_runner(make_settings(evaluation={"task_dir": "tasks"}))


def test_containers_get_what_steps_read_of_the_callers_environment(engine, make_settings, monkeypatch):
    passed_on = {
        "MLFLOW_TRACKING_URI": "https://mlflow.example",
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": SECRET,
        "MLFLOW_TRACKING_TOKEN": SECRET,
        "MLFLOW_TRACKING_INSECURE_TLS": "true",
        "MLFLOW_TRACKING_AUTH": "kubernetes",
        "MLFLOW_TRACKING_AWS_SIGV4": "true",
        "HF_TOKEN": SECRET,
        "HF_ENDPOINT": "https://hub.example",
        "WANDB_API_KEY": SECRET,
        "HTTPS_PROXY": "http://proxy.example:3128",
        "no_proxy": "localhost",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    # Of this machine alone.
    kept = {
        "MLFLOW_TRACKING_SERVER_CERT_PATH": "/home/me/ca.pem",
        "MLFLOW_TRACKING_CLIENT_CERT_PATH": "/home/me/client.pem",
        "MLFLOW_TRACKING_DIR": "/home/me/mlruns",
        "HF_HOME": "/home/me/hub",
        "HF_TOKEN_PATH": "/home/me/token",
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]} | passed_on | kept)
    assert docker_runner(make_settings()).container_run_args["environment"] == passed_on


def test_containers_see_prepared_data_and_cannot_change_them(engine, make_settings):
    settings = make_settings()
    *_, results, data = docker_runner(settings, Path("/data")).container_run_args["mounts"]
    assert (results["Target"], results["ReadOnly"]) == (settings.run.output_dir, False)
    assert (data["Target"], data["Source"], data["ReadOnly"]) == ("/data", "/data", True)


def test_images_of_another_program_are_told(engine, make_settings, capsys, monkeypatch):
    monkeypatch.setattr(images, "revision_mismatch", lambda: "prepare:1 is of another revision")
    docker_runner(make_settings())
    assert capsys.readouterr().err == "warning: prepare:1 is of another revision\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (NotFound("404 Client Error"), "prepare:.*: no such image; run `make build-images` first"),
        (
            APIError("500 Server Error\nand more"),
            r"Docker cannot be used \(500 Server Error\): is it running",
        ),
        (requests.ConnectionError("aborted"), r"Docker cannot be used \(aborted\): is it running"),
    ],
)
def test_an_engine_that_does_not_do_its_part(error, line, engine, make_settings):
    engine.images.get = raising(error)
    with pytest.raises(UserError, match=line):
        docker_runner(make_settings())


def test_no_engine(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "pipelines.run", "--docker", f"run.output_dir={tmp_path}"],
        cwd=PROJECT_ROOT,
        env=os.environ | {"DOCKER_HOST": "unix:///nowhere/docker.sock", "HF_TOKEN": SECRET},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: Docker cannot be used (Error while fetching server API version")


def test_a_container_that_does_not_start(engine, tmp_path, monkeypatch, capsys):
    engine.containers = SimpleNamespace(run=raising(DockerException("Mounts denied:\nsee the manual")))
    monkeypatch.setattr(config.LocalExecutionConfig, "instance", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(sys, "argv", ["pipelines.run", "--docker", f"run.output_dir={tmp_path / 'outputs'}"])
    with pytest.raises(SystemExit) as end:
        main()
    output, errors = capsys.readouterr()
    assert end.value.code == 2
    assert errors.startswith("error: the pipeline failed (Mounts denied:); its logs are in ")
    assert len(errors.splitlines()) == 1
    # The token is in no file: neither in the compiled pipeline nor in the log.
    assert list(tmp_path.glob("outputs/*/pipeline/*.yaml")) and SECRET not in output
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or SECRET not in path.read_text()


ENDS = (pytest.skip.Exception, pytest.fail.Exception)
OUTCOMES = pytest.mark.parametrize(("ci", "outcome"), [("", ENDS[0]), ("1", ENDS[1])])


@OUTCOMES
def test_no_test_takes_images_of_another_program(ci, outcome, engine, monkeypatch):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(real_docker, "revision_mismatch", lambda: "train:1 is of another revision")
    with pytest.raises(ENDS, match="train:1 is of another revision") as end:
        client_with_images("train")
    assert end.type is outcome


@OUTCOMES
def test_no_test_takes_an_image_that_was_never_built(ci, outcome, engine, monkeypatch, tmp_path):
    monkeypatch.setenv("CI", ci)
    (tmp_path / "images.json").write_text("{}")
    monkeypatch.setattr(components, "IMAGES", tmp_path / "images.json")
    with pytest.raises(ENDS, match="has no image of 'mlflow'") as end:
        client_with_images("mlflow")
    assert end.type is outcome


@OUTCOMES
@pytest.mark.parametrize(
    "error", [NotFound("404 Client Error"), DockerException("away"), requests.ConnectionError("aborted")]
)
def test_no_test_takes_an_engine_that_does_not_do_its_part(error, ci, outcome, engine, monkeypatch):
    monkeypatch.setenv("CI", ci)
    engine.images.get = raising(error)
    with pytest.raises(ENDS, match=f"`make build-images`: {error}") as end:
        client_with_images("train")
    assert end.type is outcome
