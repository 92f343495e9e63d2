"""Training on several nodes: the real task against a fake Kubernetes API that really runs the nodes."""

import copy
import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path

import kubernetes_validate
import pytest
import torch
import yaml
from fake_kubernetes import RBAC, fake_cluster
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from safetensors.torch import load_file

from dynamic_transformers.launch import kubernetes_api, train_job
from dynamic_transformers.launch.run import launch_training
from dynamic_transformers.launch.settings import Launch, SecretVariable
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.settings import UserError
from dynamic_transformers.training.trainer import train, training_config

STEPS = 24  # more than a node can do between the checkpoint after which it is stopped and being stopped


@pytest.fixture
def cluster(tmp_path):
    with fake_cluster(tmp_path) as fake:
        yield fake


@pytest.fixture
def lines(caplog, monkeypatch):
    logger = logging.getLogger("dynamic_transformers")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, "dynamic_transformers")
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch):
    for name in train_job.PASSED_ON:
        monkeypatch.delenv(name, raising=False)


def launch_on(cluster, **changes):
    return Launch(
        nodes=2,
        image="registry.example/train:1",
        claim="shared",
        mount_path=str(cluster.claims["shared"]),
        environment={"OMP_NUM_THREADS": "1"},
        **changes,
    )


@pytest.fixture
def launch(cluster):
    return launch_on(cluster)


@pytest.fixture(scope="module")
def settings(make_settings):
    return make_settings(
        "mod", data={"batch_size": 2}, training={"max_steps": STEPS, "checkpoint_every": 2, "log_every": 1}
    )


@pytest.fixture(scope="module")
def finished_run(settings, data_dir, tmp_path_factory):
    """A run as a job would leave it, for the tests that are about the job alone."""
    return train(settings, data_dir, tmp_path_factory.mktemp("finished") / "run")


def volume_of(launch):
    return Path(launch.mount_path) / "dynamic-transformers"


def name_of(settings, data_dir, launch):
    return train_job.job_name(settings.model.type, training_config(settings, data_dir), launch)


def weights(run_dir):
    return load_file(run_dir / read_manifest(run_dir, "train")["checkpoint"] / "model.safetensors")


def succeed(cluster, launch, finished_run):
    """Makes every job leave `finished_run` and be complete."""

    def run(name):
        cluster.status(name, active=1)
        shutil.copytree(finished_run, volume_of(launch) / name / "run")
        cluster.status(name, "Complete", succeeded=1)

    cluster.on_create = run


def posts(cluster):
    return cluster.requests.count(("create", "trainjobs"))


def test_the_manifest_has_all_that_a_node_needs():
    launch = Launch(
        processes=8,
        nodes=2,
        image="registry.example/train:1",
        claim="shared",
        mount_path="/mnt/shared",
        resources={"cpu": "8", "nvidia.com/gpu": "8"},
        node_selector={"pool": "gpu"},
        tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        environment={"NCCL_DEBUG": "WARN"},
        secrets=[SecretVariable("MLFLOW_TRACKING_PASSWORD", "mlflow", "password")],
        image_pull_secrets=["registry"],
        shared_memory="8Gi",
        timeout_seconds=3600,
    )
    launch = Launch.from_json(launch.to_json())
    manifest = train_job.train_job("dt-mod-1", launch, Path("/mnt/shared/job.json"))
    # The models drop what they do not know.
    assert TrainerV1alpha1TrainJob.from_dict(manifest).to_dict() == manifest
    spec = manifest["spec"]
    assert spec["runtimeRef"] == {"name": "torch-distributed"} and spec["activeDeadlineSeconds"] == 3600
    assert spec["trainer"] == {
        "image": "registry.example/train:1",
        "command": ["python", "-m", "torch.distributed.run"],
        "args": ["-m", "dynamic_transformers.launch.worker", "/mnt/shared/job.json"],
        "numNodes": 2,
        "numProcPerNode": 8,
        "resourcesPerNode": {"limits": {"cpu": "8", "nvidia.com/gpu": "8"}},
        "env": [
            {"name": "NCCL_DEBUG", "value": "WARN"},
            {
                "name": "MLFLOW_TRACKING_PASSWORD",
                "valueFrom": {"secretKeyRef": {"name": "mlflow", "key": "password"}},
            },
        ],
    }
    (patch,) = spec["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == launch.node_selector and pod["tolerations"] == launch.tolerations
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in copy.deepcopy(pod["volumes"])}
    assert {path: volumes[name] for path, name in mounts.items()} == {
        "/mnt/shared": {"persistentVolumeClaim": {"claimName": "shared"}},
        "/dev/shm": {"emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
    }
    kubernetes_validate.validate(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "node"},
            "spec": pod
            | {
                "containers": [
                    pod["containers"][0]
                    | {key: spec["trainer"][key] for key in ("image", "command", "args", "env")}
                    | {"resources": spec["trainer"]["resourcesPerNode"]}
                ]
            },
        },
        kubernetes_validate.latest_version(),
        strict=True,
    )


TRACKING = {
    "MLFLOW_TRACKING_URI": "http://mlflow.example:5000",
    "MLFLOW_TRACKING_AUTH": "kubernetes",
    "MLFLOW_WORKSPACE": "team",
    "MLFLOW_EXPERIMENT_ID": "7",
    "MLFLOW_RUN_ID": "0123456789abcdef",
}


def variables_of_nodes(launch, lines):
    manifest = train_job.train_job("dt-mod-1", launch, Path("/mnt/shared/job.json"))
    assert TrainerV1alpha1TrainJob.from_dict(manifest).to_dict() == manifest
    assert "s3cret" not in json.dumps(manifest) + " ".join(lines.messages)
    return {entry["name"]: entry for entry in manifest["spec"]["trainer"]["env"]}


def test_the_nodes_log_to_the_run_that_the_task_was_given(launch, lines, monkeypatch):
    secret = {
        "MLFLOW_TRACKING_PASSWORD": "s3cret",
        "MLFLOW_TRACKING_TOKEN": "s3cret",
        "MLFLOW_TRACKING_USERNAME": "s3cret",
        "HF_TOKEN": "s3cret",
    }
    for name, value in (TRACKING | secret).items():
        monkeypatch.setenv(name, value)
    launch = dataclasses.replace(launch, secrets=[SecretVariable("HF_TOKEN", "huggingface", "token")])
    variables = variables_of_nodes(launch, lines)
    assert {name: entry.get("value") for name, entry in variables.items()} == TRACKING | {
        "OMP_NUM_THREADS": "1",
        "HF_TOKEN": None,
    }


def test_what_a_secret_holds_is_no_value_of_a_manifest(launch, lines, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:s3cret@mlflow.example")
    secret = SecretVariable("MLFLOW_TRACKING_URI", "mlflow-client", "uri")
    variables = variables_of_nodes(dataclasses.replace(launch, secrets=[secret]), lines)
    assert variables["MLFLOW_TRACKING_URI"] == {
        "name": "MLFLOW_TRACKING_URI",
        "valueFrom": {"secretKeyRef": {"name": "mlflow-client", "key": "uri"}},
    }
    assert not lines.messages
    # Where no secret gives it, the password must not get out either; the run is then nobody's.
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123456789abcdef")
    assert not {"MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"} & variables_of_nodes(launch, lines).keys()
    assert "MLFLOW_TRACKING_URI holds a password" in lines.messages[0]


def test_the_role_is_valid_and_bound():
    role, binding = yaml.safe_load_all(RBAC.read_text())
    for document in (role, binding):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert all(subject["namespace"] for subject in binding["subjects"])


def test_a_jobs_name_is_a_label_that_follows_from_what_it_computes(settings, data_dir, launch):
    name = name_of(settings, data_dir, launch)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", f"{name}-node-0-0") and len(name) < 48

    def name_with(**changes):
        return name_of(settings, data_dir, dataclasses.replace(launch, **changes))

    assert name_with(resources={"cpu": "4"}, timeout_seconds=9) == name
    assert name_with(nodes=1, processes=2) == name  # the same batch
    assert name not in (name_with(nodes=3), name_with(image="registry.example/train:2"))


@pytest.fixture(scope="module")
def two_nodes(settings, data_dir, tmp_path_factory):
    """The run of a job that nothing disturbed, and its cluster."""
    folder = tmp_path_factory.mktemp("two_nodes")
    with fake_cluster(folder) as cluster:
        cluster.secrets = {"mlflow": {"password": "s3cret"}}
        secret = SecretVariable("MLFLOW_TRACKING_PASSWORD", "mlflow", "password")
        launch = launch_on(cluster, secrets=[secret])
        run_dir = launch_training(settings, data_dir, folder / "run", launch)
        first = list(cluster.requests)
        again = launch_training(settings, data_dir, folder / "again", launch)
        # What is finished on the volume needs no job any more, nor an API.
        assert read_manifest(again) == read_manifest(run_dir) and cluster.requests == first
    return run_dir, cluster


def test_two_nodes_train_one_model_and_the_run_comes_back(two_nodes, make_settings, data_dir, tmp_path):
    run_dir, cluster = two_nodes
    settings = make_settings(
        "mod", data={"batch_size": 4}, training={"max_steps": STEPS, "checkpoint_every": 2}
    )
    one = train(settings, data_dir, tmp_path / "one")
    assert len(cluster.nodes) == 2 and posts(cluster) == 1
    for key in ("training_steps", "training_tokens"):
        assert read_manifest(run_dir, "train")[key] == read_manifest(one)[key]
    for name, value in weights(one).items():
        if "threshold" not in name:  # the mean of two quantiles is not the quantile of both
            torch.testing.assert_close(weights(run_dir)[name], value, atol=5e-3, rtol=1e-2)
    for path in (
        *cluster.folder.rglob("*.json"),
        *cluster.folder.rglob("*.yaml"),
        *cluster.folder.rglob("*.log"),
    ):
        assert "s3cret" not in path.read_text(), path


def test_a_job_of_one_node_trains_what_this_process_trains(
    cluster, launch, make_settings, data_dir, tmp_path
):
    settings = make_settings("mod", training={"max_steps": 2})
    launch = dataclasses.replace(launch, nodes=1)
    run_dir = launch_training(settings, data_dir, tmp_path / "run", launch)
    assert len(cluster.nodes) == posts(cluster) == 1
    for name, value in weights(train(settings, data_dir, tmp_path / "here")).items():
        assert torch.equal(weights(run_dir)[name], value), name


def test_a_task_that_is_tried_again_goes_on_from_the_last_checkpoint(
    cluster, launch, settings, data_dir, two_nodes, tmp_path
):
    run = volume_of(launch) / name_of(settings, data_dir, launch) / "run"
    cluster.on_create = lambda name: cluster.run_nodes(name, (run / "checkpoints" / "step-00000004").is_dir)
    with pytest.raises(RuntimeError, match=r"failed \(FailedJobs\): jobset failed due to"):
        launch_training(settings, data_dir, tmp_path / "run", launch)
    assert not (tmp_path / "run").exists() and not (run / "manifest.json").exists()
    cluster.on_create = cluster.run_nodes
    run_dir = launch_training(settings, data_dir, tmp_path / "run", launch)
    assert posts(cluster) == 2
    (going_on,) = re.findall(r"going on from \S+/step-(\d+)", cluster.nodes[-2].output())
    assert 4 <= int(going_on) < STEPS
    for name, value in weights(two_nodes[0]).items():
        assert torch.equal(weights(run_dir)[name], value), name


def test_a_failed_job_raises_with_its_message_and_the_last_lines_of_its_nodes(
    cluster, launch, settings, data_dir, tmp_path, lines
):
    def fail(name):
        cluster.fail_pod(f"{name}-node-0-1", "first line\n" * 99 + "CUDA out of memory")
        cluster.status(name, "Failed", "FailedJobs", "node 1 is gone", failed=1)

    cluster.on_create = fail
    name = name_of(settings, data_dir, launch)
    with pytest.raises(RuntimeError, match=rf"^TrainJob {name} failed \(FailedJobs\): node 1 is gone$"):
        launch_training(settings, data_dir, tmp_path / "run", launch)
    (logs,) = [line for line in lines.messages if line.startswith("last lines of ")]
    assert logs.startswith(f"last lines of {name}-node-0-1:") and logs.endswith("CUDA out of memory")
    assert logs.count("first line") == kubernetes_api.LAST_LINES - 1


def test_the_time_limit_is_named_and_a_task_that_is_tried_again_gets_no_more_time(
    cluster, launch, settings, data_dir, finished_run, tmp_path
):
    cluster.on_create = lambda name: cluster.status(name, "Failed", "DeadlineExceeded", "too late")
    launch = dataclasses.replace(launch, timeout_seconds=7)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"DeadlineExceeded, timeout_seconds=7\): too late; a higher"):
            launch_training(settings, data_dir, tmp_path / "run", launch)
    assert len(cluster.threads) == 1 and ("delete", "trainjobs") not in cluster.requests
    succeed(cluster, launch, finished_run)
    launch_training(settings, data_dir, tmp_path / "run", dataclasses.replace(launch, timeout_seconds=8))
    assert ("delete", "trainjobs") in cluster.requests


@pytest.mark.parametrize("condition", ["Failed", "Complete"])
def test_a_job_that_has_ended_without_a_run_is_replaced(
    condition, cluster, launch, settings, data_dir, finished_run, tmp_path
):
    name = name_of(settings, data_dir, launch)
    cluster.jobs[name] = train_job.train_job(name, launch, Path("job.json"))
    cluster.status(name, condition, "Before", "of an earlier task")
    succeed(cluster, launch, finished_run)
    launch_training(settings, data_dir, tmp_path / "run", launch)
    assert weights(tmp_path / "run").keys() == weights(finished_run).keys()
    assert cluster.requests.count(("delete", "trainjobs")) == posts(cluster) == 1


def test_a_job_that_runs_is_followed(cluster, launch, settings, data_dir, finished_run, tmp_path, lines):
    name = name_of(settings, data_dir, launch)
    cluster.jobs[name] = train_job.train_job(name, launch, Path("job.json"))
    cluster.status(name, active=1)
    succeed(cluster, launch, finished_run)
    cluster.start(name)  # this one, not another
    launch_training(settings, data_dir, tmp_path / "run", launch)
    assert len(cluster.threads) == 1 and ("delete", "trainjobs") not in cluster.requests
    assert f"TrainJob team/{name}: Complete; node: 0 active, 0 ready, 1 succeeded, 0 failed" in lines.messages


def test_a_job_that_is_deleted_meanwhile_is_no_success(cluster, launch, settings, data_dir, tmp_path):
    cluster.on_create = lambda name: cluster.jobs.pop(name)
    with pytest.raises(RuntimeError, match="was deleted before it was complete"):
        launch_training(settings, data_dir, tmp_path / "run", launch)


def test_a_complete_job_without_a_run_is_no_success(
    cluster, launch, settings, data_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_job, "VISIBLE_SECONDS", 0.0)
    cluster.on_create = lambda name: cluster.status(name, "Complete", succeeded=1)
    with pytest.raises(RuntimeError, match=r"is complete, but there is no finished run in .*same volume"):
        launch_training(settings, data_dir, tmp_path / "run", launch)


def test_an_outage_is_waited_for(cluster, launch, settings, data_dir, finished_run, tmp_path, lines):
    def run(name):
        cluster.outages = 16
        succeed(cluster, launch, finished_run)
        cluster.on_create(name)

    cluster.on_create = run
    launch_training(settings, data_dir, tmp_path / "run", launch)
    away = [line for line in lines.messages if line.startswith("the Kubernetes API is away")]
    assert any("503" in line for line in away) and any("RemoteDisconnected" in line for line in away)


def test_an_outage_that_lasts_is_an_error(cluster, launch, settings, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(kubernetes_api, "OUTAGE_SECONDS", 0.0)
    cluster.outages = 10**6
    with pytest.raises(RuntimeError, match="no Kubernetes API for 0 s"):
        launch_training(settings, data_dir, tmp_path / "run", launch)


@pytest.mark.parametrize("verb", ["get", "create", "delete"])
def test_a_right_that_is_missing_is_named(verb, cluster, launch, settings, data_dir, tmp_path):
    name = name_of(settings, data_dir, launch)
    if verb == "delete":
        cluster.jobs[name] = train_job.train_job(name, launch, Path("job.json"))
        cluster.status(name, "Failed")
    cluster.rules[0]["verbs"].remove(verb)
    message = rf"^the Kubernetes API refuses to {verb} .* cannot {verb} .*cluster/train-job-rbac.yaml$"
    with pytest.raises(UserError, match=message):
        launch_training(settings, data_dir, tmp_path / "run", launch)


def test_a_job_that_a_webhook_refuses_is_not_taken_for_a_missing_right(
    cluster, launch, settings, data_dir, tmp_path
):
    launch = dataclasses.replace(launch, environment={"PET_NNODES": "3"})
    with pytest.raises(UserError, match=r"create a TrainJob: .*must not have reserved envs$"):
        launch_training(settings, data_dir, tmp_path / "run", launch)


def test_a_trainer_that_would_drop_the_claim_refuses_the_job(cluster, launch, settings, data_dir, tmp_path):
    cluster.unknown_fields = {"runtimePatches"}  # as before 2.2
    message = (
        r'^the Kubernetes API refuses to create a TrainJob: .*unknown field "spec.runtimePatches"; '
        r"Kubeflow Trainer 2.2 or newer is needed$"
    )
    with pytest.raises(UserError, match=message):
        launch_training(settings, data_dir, tmp_path / "run", launch)
    assert not cluster.jobs


def test_logs_that_may_not_be_read_do_not_hide_the_failure(
    cluster, launch, settings, data_dir, tmp_path, lines
):
    del cluster.rules[1:]
    cluster.on_create = lambda name: cluster.status(name, "Failed", "FailedJobs", "the reason")
    with pytest.raises(RuntimeError, match="the reason"):
        launch_training(settings, data_dir, tmp_path / "run", launch)
    assert any(line.startswith("no logs of the failed nodes: (403)") for line in lines.messages)


def test_a_volume_that_is_not_here_is_a_mistake(launch, settings, data_dir, tmp_path):
    launch = dataclasses.replace(launch, mount_path=str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"elsewhere: no folder .*; mount the claim shared there"):
        launch_training(settings, data_dir, tmp_path / "run", launch)


def test_data_that_another_task_has_just_copied_stays(data_dir, tmp_path, monkeypatch):
    copytree, shared = shutil.copytree, tmp_path / "data"

    def slow(source, target, **options):
        monkeypatch.undo()
        copytree(source, shared)
        return copytree(source, target, **options)

    monkeypatch.setattr(shutil, "copytree", slow)
    train_job.share(data_dir, shared)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert json.loads((shared / "manifest.json").read_text()) == read_manifest(data_dir)
