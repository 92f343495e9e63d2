"""Training on several nodes: the real task against a fake Kubernetes API that really runs the nodes."""

import copy
import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
import typing
from pathlib import Path

import kubernetes_validate
import pytest
import torch
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from safetensors.torch import load_file

from dynamic_transformers.launch import job_watch, kubernetes_api, node_logs, patience, train_job
from dynamic_transformers.launch.run import launch_training
from dynamic_transformers.launch.settings import Launch, SecretVariable
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.settings import UserError
from dynamic_transformers.training.run_folder import training_config
from dynamic_transformers.training.trainer import train
from tests.distributed.fake_kubernetes import RBAC, fake_cluster
from tests.distributed.fake_trainer import NOW

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
    training = {"max_steps": STEPS, "checkpoint_every": 2, "log_every": 1}
    return make_settings("mod", data={"batch_size": 2}, training=training)


@pytest.fixture(scope="module")
def finished_run(settings, data_dir, tmp_path_factory):
    """What two nodes are to leave, by one process: also for the tests that are about the job alone."""
    both = dataclasses.replace(settings, data=dataclasses.replace(settings.data, batch_size=4))
    return train(both, data_dir, tmp_path_factory.mktemp("finished") / "run")


def volume_of(launch):
    return Path(launch.mount_path) / "dynamic-transformers"


def name_of(settings, data_dir, launch):
    config = training_config(settings, data_dir, launch.world_size)
    return train_job.job_name(settings.model.type, config, launch)


def weights(run_dir):
    return load_file(run_dir / read_manifest(run_dir, "train")["checkpoint"] / "model.safetensors")


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def succeed(cluster, launch, finished_run, when=lambda: True):
    """Makes every job leave `finished_run` and be complete."""

    def run(name):
        wait_for(when)
        cluster.status(name, active=1, ready=1)
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
        grace_seconds=120,
    )
    launch = Launch.from_json(launch.to_json())
    manifest = train_job.train_job("dt-mod-1", launch, Path("/mnt/shared/job.json"))
    # The models drop what they do not know.
    assert TrainerV1alpha1TrainJob.from_dict(manifest).to_dict() == manifest
    spec = manifest["spec"]
    assert spec["runtimeRef"] == {"name": "torch-distributed"} and spec["activeDeadlineSeconds"] == 3600
    logs = manifest["metadata"]["annotations"]["dynamic-transformers.github.io/logs"]
    assert re.fullmatch(r"/mnt/shared/logs/\d{8}-\d{6}", logs)
    assert spec["trainer"] == {
        "image": "registry.example/train:1",
        "command": ["python", "-m", "torch.distributed.run"],
        "args": [
            *("--rdzv-backend", "c10d", "--rdzv-id", "dt-mod-1"),
            *("--rdzv-endpoint", "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)", "--rdzv-conf", "read_timeout=300"),
            *("--log-dir", f"{logs}/node-$(PET_NODE_RANK)", "--tee", "3"),
            *("-m", "dynamic_transformers.launch.worker", "/mnt/shared/job.json"),
        ],
        "numNodes": 2,
        "numProcPerNode": 8,
        "resourcesPerNode": {"limits": {"cpu": "8", "nvidia.com/gpu": "8"}},
        "env": [
            {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": "110"},
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
    assert pod["terminationGracePeriodSeconds"] == 120 and pod["securityContext"]["fsGroup"] == 1000
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
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "290",
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


def gone_on_from(run):
    """The step that the one node that went on began at, as its output on the volume says."""
    outputs = "".join(path.read_text() for path in run.parent.glob("logs/*/*/*/*/*/stdout.log"))
    (step,) = re.findall(r"going on from \S+/step-(\d+)", outputs)
    return int(step)


def lose_a_node(cluster, run, step):
    """Kills the last node once, when the run has a checkpoint of this step."""

    def disturb(_):
        if (run / "checkpoints" / f"step-{step:08d}").is_dir():
            cluster.disturb = lambda _: None
            cluster.nodes[-1].stop()

    cluster.disturb = disturb


def test_two_nodes_of_which_one_is_lost_train_what_one_process_trains(
    cluster, settings, data_dir, finished_run, tmp_path, lines
):
    cluster.secrets = {"mlflow": {"password": "s3cret"}}
    secret = SecretVariable("MLFLOW_TRACKING_PASSWORD", "mlflow", "password")
    launch = launch_on(cluster, secrets=[secret])
    name = name_of(settings, data_dir, launch)
    lose_a_node(cluster, volume_of(launch) / name / "run", 8)
    run_dir = launch_training(settings, data_dir, tmp_path / "run", launch)
    # Both start again in their pods: the other one has lost its peer.
    assert posts(cluster) == 1 and len(cluster.nodes) >= 4
    assert f"{name}-node-0-1-abcde: restart 1, after exit code 137 (OOMKilled)" in lines.messages
    assert f"{name}-node-0-0-abcde: restart 1, after exit code 1 (Error)" in lines.messages
    assert any(line.startswith("last lines of node-0, process 0") for line in lines.messages)
    assert 8 <= gone_on_from(volume_of(launch) / name / "run") < STEPS
    for key in ("training_steps", "training_tokens"):
        assert read_manifest(run_dir, "train")[key] == read_manifest(finished_run)[key]
    for key, value in weights(finished_run).items():
        if "threshold" not in key:  # the mean of two quantiles is not the quantile of both
            torch.testing.assert_close(weights(run_dir)[key], value, atol=5e-3, rtol=1e-2)
    for path in (path for path in tmp_path.rglob("*") if path.suffix in (".json", ".yaml", ".log")):
        assert "s3cret" not in path.read_text(), path
    # What is finished on the volume needs no job any more, nor an API.
    before = list(cluster.requests)
    again = launch_training(settings, data_dir, tmp_path / "again", launch)
    assert read_manifest(again) == read_manifest(run_dir) and cluster.requests == before


def test_a_job_that_is_suspended_then_fails_and_is_replaced_ends_in_the_same_weights(
    cluster, launch, settings, data_dir, tmp_path, lines
):
    launch = dataclasses.replace(launch, nodes=1)
    run = volume_of(launch) / name_of(settings, data_dir, launch) / "run"
    cluster.backoff_limit = 0

    def suspend_and_lose_the_data(name):
        """When it is resumed, its node fails by itself."""
        if (run / "checkpoints" / "step-00000004").is_dir():
            cluster.disturb = lambda _: None
            cluster.suspend(name)
            (data,) = volume_of(launch).glob("data-*")
            data.rename(data.with_name("lost"))
            threading.Timer(0.5, cluster.suspend, (name, False)).start()

    cluster.disturb = suspend_and_lose_the_data
    with pytest.raises(RuntimeError, match=r"failed \(FailedJobs\): jobset failed due to"):
        launch_training(settings, data_dir, tmp_path / "run", launch)
    assert len(cluster.nodes) == 2 and not cluster.pods and not (tmp_path / "run").exists()
    assert any(": Suspended; " in line for line in lines.messages)
    (logs,) = [line for line in lines.messages if line.startswith("last lines of ")]
    assert logs.startswith("last lines of node-0, process 0") and re.search(
        "UserError: .*no such folder$", logs
    )

    launch_training(settings, data_dir, tmp_path / "run", launch)
    assert len(cluster.nodes) == 3 and posts(cluster) == 2
    assert 4 <= gone_on_from(run) < STEPS
    for name, value in weights(train(settings, data_dir, tmp_path / "here")).items():
        assert torch.equal(weights(tmp_path / "run")[name], value), name


class ScriptedNode:
    """A node that ends with the next of `codes`; None: not yet."""

    codes: typing.ClassVar[list] = []

    @staticmethod
    def address(name):
        return "node"

    def __init__(self, *_):
        self.code = None

    def poll(self):
        if self.code is None and self.codes:
            self.code = self.codes.pop(0)
        return self.code

    def stop(self):
        self.code = self.code or -9


def print_to(cluster, name, node, error=None, **streams):
    """What a node's process writes to the volume, as torchrun lays it out."""
    logs = Path(cluster.jobs[name]["metadata"]["annotations"]["dynamic-transformers.github.io/logs"])
    process = logs / node / "none_x" / "attempt_0" / "0"
    process.mkdir(parents=True, exist_ok=True)
    for stream, text in streams.items():
        (process / f"{stream}.log").write_text(text)
    if error:
        content = {"message": {"message": "", "extraInfo": {"py_callstack": error, "timestamp": "0"}}}
        (process / "error.json").write_text(json.dumps(content))


def test_a_failed_job_raises_with_its_message_and_the_last_lines_of_its_nodes(
    cluster, launch, settings, data_dir, tmp_path, lines
):
    cluster.start_node = type("Failing", (ScriptedNode,), {"codes": [1] * 9})

    def run(name):
        print_to(cluster, name, "node-1", stdout="first line\n" * 99 + "CUDA out of memory")
        cluster.run_nodes(name)

    cluster.on_create = run
    name = name_of(settings, data_dir, launch)
    with pytest.raises(RuntimeError, match=rf"^TrainJob {name} failed \(FailedJobs\): jobset failed due to"):
        launch_training(settings, data_dir, tmp_path / "run", launch)
    assert not cluster.pods and len(cluster.nodes) == 2 + cluster.backoff_limit
    (logs,) = [line for line in lines.messages if line.startswith("last lines of ")]
    assert logs.startswith("last lines of node-1, process 0") and logs.endswith("CUDA out of memory")
    assert logs.count("first line") == node_logs.LAST_LINES - 1


def test_a_restart_is_told_with_what_ended_the_container(
    cluster, launch, settings, data_dir, finished_run, tmp_path, lines
):
    node = cluster.start_node = type("Restarted", (ScriptedNode,), {"codes": [None, 137]})
    name = name_of(settings, data_dir, launch)

    def disturb(name):
        if len(cluster.nodes) == 3 and not node.codes and any("restart 1" in line for line in lines.messages):
            shutil.copytree(finished_run, volume_of(launch) / name / "run")
            node.codes = [0, 0]
        elif len(cluster.nodes) == 2:
            print_to(cluster, name, "node-1", error="Traceback\nValueError: of node 1")

    cluster.disturb = disturb
    launch_training(settings, data_dir, tmp_path / "run", launch)
    said = [line for line in lines.messages if "restart" in line or "last lines" in line]
    assert said[0] == f"{name}-node-0-1-abcde: restart 1, after exit code 137 (OOMKilled)"
    assert said[1].startswith("last lines of node-1, process 0") and said[1].endswith("ValueError: of node 1")
    assert len(said) == 2


IMAGE = {"reason": "ErrImagePull", "message": "registry.example/train:1:\nnot found"}
SECRET = {"reason": "CreateContainerConfigError", "message": 'secret "hub" not found'}
TOLERATION = 'Job "x" is invalid: spec.template.spec.tolerations[0].operator: Invalid value: "Exist"'


@pytest.mark.parametrize(
    ("obstruct", "said"),
    [
        (
            lambda cluster, name: cluster.put_pod(name, 0, waiting=IMAGE),
            r"pod dt-\S+: ErrImagePull: registry.example/train:1: not found",
        ),
        (
            lambda cluster, name: cluster.put_pod(name, 1, waiting=SECRET),
            r'pod dt-\S+: CreateContainerConfigError: secret "hub" not found',
        ),
        (
            lambda cluster, name: cluster.put_pod(name, 0, unscheduled='claim "shared" not found'),
            r'pod dt-\S+: Unschedulable: claim "shared" not found',
        ),
        (
            lambda cluster, name: cluster.warn("JobSet", name, "JobCreationFailed", TOLERATION),
            r'JobSet dt-\S+: JobCreationFailed: Job "x" is invalid: .* "Exist"',
        ),
        (
            lambda cluster, name: (
                cluster.put_pod(name, 0, waiting={"reason": "ContainerCreating"}),
                cluster.warn("Pod", f"{name}-node-0-0-abcde", "FailedMount", "no such volume"),
            ),
            r"Pod dt-\S+: FailedMount: no such volume",
        ),
        (
            lambda cluster, name: (
                cluster.warn("Pod", "another", "BackOff", "of another job"),
                cluster.warn("JobSet", name, "Old", "of the job before", time="2025-12-31T00:00:00Z"),
            ),
            "neither a pod nor an event says why",
        ),
    ],
    ids=["image", "secret", "claim", "toleration", "mount", "nothing"],
)
def test_a_job_without_ready_nodes_says_why_and_goes_on(
    obstruct, said, cluster, launch, settings, data_dir, finished_run, tmp_path, lines, monkeypatch
):
    monkeypatch.setattr(job_watch, "LATE_SECONDS", 0.1)
    monkeypatch.setattr(job_watch, "EXPLAIN_SECONDS", 0.0)

    def warnings():
        return [entry.getMessage() for entry in lines.records if entry.levelno == logging.WARNING]

    def run(name):
        obstruct(cluster, name)
        wait_for(warnings)
        time.sleep(0.1)  # in which it is not said again
        cluster.put_pod(name, 0, waiting={"reason": "Other", "message": "another reason"})
        wait_for(lambda: len(warnings()) > 1)
        succeed(cluster, launch, finished_run)
        cluster.on_create(name)

    cluster.on_create = run
    launch_training(settings, data_dir, tmp_path / "run", launch)
    first, second = warnings()
    assert re.fullmatch(rf"TrainJob dt-\S+: no ready nodes for 0 s: {said}", first)
    assert second.endswith(": Other: another reason")


def test_a_suspended_job_is_waited_for_without_a_warning(
    cluster, launch, settings, data_dir, finished_run, tmp_path, lines, monkeypatch
):
    monkeypatch.setattr(job_watch, "LATE_SECONDS", 0.02)

    def run(name):
        cluster.status(name, "Suspended", "Suspended", "TrainJob is suspended")
        time.sleep(0.2)
        succeed(cluster, launch, finished_run)
        cluster.on_create(name)

    cluster.on_create = run
    launch_training(settings, data_dir, tmp_path / "run", launch)
    assert any(": Suspended; " in line for line in lines.messages)
    assert not [entry for entry in lines.records if entry.levelno == logging.WARNING]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_task_that_is_ended_leaves_its_job_which_the_next_one_follows(
    number, code, cluster, launch, settings, data_dir, finished_run, tmp_path, lines
):
    def run(name):
        cluster.status(name, active=1, ready=1)
        wait_for(lambda: any("1 ready" in line for line in lines.messages))
        os.kill(os.getpid(), number)

    cluster.on_create = run
    with pytest.raises(SystemExit) as end:
        launch_training(settings, data_dir, tmp_path / "run", launch)
    name = name_of(settings, data_dir, launch)
    assert end.value.code == code and name in cluster.jobs
    assert lines.messages[-1].startswith(f"this task ends, TrainJob {name} goes on")
    taken_up = f"TrainJob {name} is there already: this task follows it"
    succeed(cluster, launch, finished_run, lambda: taken_up in lines.messages)
    cluster.start(name)  # the same goes on
    launch_training(settings, data_dir, tmp_path / "run", launch)
    assert posts(cluster) == 1


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


def put_job(cluster, settings, data_dir, launch):
    """A job as an earlier task has left it; returns its name."""
    name = name_of(settings, data_dir, launch)
    cluster.jobs[name] = train_job.train_job(name, launch, volume_of(launch) / "job.json")
    cluster.jobs[name]["metadata"]["creationTimestamp"] = NOW
    return name


@pytest.mark.parametrize("before", ["Failed", "Complete", "being deleted", "without nodes"])
def test_a_job_that_cannot_train_any_more_is_replaced(
    before, cluster, launch, settings, data_dir, finished_run, tmp_path
):
    """Not before its JobSet and its pods are gone: else the new one would be taken for failed, too."""
    mistaken = dataclasses.replace(launch, tolerations=[{"key": "gpu", "operator": "Exist"}])
    name = put_job(cluster, settings, data_dir, mistaken if before == "without nodes" else launch)
    cluster.status(name, before if before in ("Failed", "Complete") else "", "Before", "of an earlier task")
    cluster.put_pod(name, 0)
    if before == "being deleted":
        cluster.on_create = lambda name: None
        cluster.delete(name, {"propagationPolicy": "Foreground"})
    succeed(cluster, launch, finished_run)
    launch_training(settings, data_dir, tmp_path / "run", launch)
    assert weights(tmp_path / "run").keys() == weights(finished_run).keys()
    assert cluster.requests.count(("delete", "trainjobs")) == posts(cluster) == 1
    assert not cluster.pods


def test_pods_that_stay_are_named(cluster, launch, settings, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(kubernetes_api, "DELETION_SECONDS", 0.2)
    name = put_job(cluster, settings, data_dir, launch)
    cluster.status(name, "Failed", "Before", "of an earlier task")
    cluster.put_pod(name, 0)
    cluster.remove_pods = lambda name: None
    with pytest.raises(RuntimeError, match=rf"^pod {name}-node-0-0-abcde is still there 0 s after"):
        launch_training(settings, data_dir, tmp_path / "run", launch)


def test_a_job_that_runs_is_followed_with_other_settings_too(
    cluster, launch, settings, data_dir, finished_run, tmp_path, lines
):
    name = put_job(cluster, settings, data_dir, dataclasses.replace(launch, timeout_seconds=5))
    cluster.status(name, active=1, ready=1)
    succeed(cluster, launch, finished_run, lambda: any("is there already" in line for line in lines.messages))
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
        cluster.status(name, active=1, ready=1)
        cluster.go_away(0.5)
        time.sleep(0.6)
        succeed(cluster, launch, finished_run)
        cluster.on_create(name)

    cluster.on_create = run
    launch_training(settings, data_dir, tmp_path / "run", launch)
    away = [line for line in lines.messages if line.startswith("the Kubernetes API is away")]
    assert any("503" in line for line in away) and any("RemoteDisconnected" in line for line in away)
    assert posts(cluster) == 1


def test_an_outage_that_lasts_is_an_error(cluster, launch, settings, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(patience, "OUTAGE_SECONDS", 0.0)
    cluster.go_away(1000)
    with pytest.raises(RuntimeError, match="the Kubernetes API is still away: 503"):
        launch_training(settings, data_dir, tmp_path / "run", launch)


@pytest.mark.parametrize("verb", ["get", "create", "delete"])
def test_a_right_that_is_missing_is_named(verb, cluster, launch, settings, data_dir, tmp_path):
    if verb == "delete":
        cluster.status(put_job(cluster, settings, data_dir, launch), "Failed")
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


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("runtimePatches", r'unknown field "spec.runtimePatches"; Kubeflow Trainer 2.3 or newer is needed'),
        (
            "terminationGracePeriodSeconds",
            r'unknown field "spec.runtimePatches\[0\]\S+"; Kubeflow Trainer 2.3 or newer is needed',
        ),
        ("numNodes", 'unknown field "spec.trainer.numNodes"'),
    ],
)
def test_a_field_that_a_trainer_would_drop_is_named(
    field, said, cluster, launch, settings, data_dir, tmp_path
):
    cluster.unknown_fields = {field}
    with pytest.raises(UserError, match=rf"^the Kubernetes API refuses to create a TrainJob: .*{said}$"):
        launch_training(settings, data_dir, tmp_path / "run", launch)
    assert not cluster.jobs


def test_a_wrong_toleration_is_named_without_a_word_of_versions(
    cluster, launch, settings, data_dir, tmp_path
):
    launch = dataclasses.replace(launch, tolerations=[{"key": "gpu", "operatr": "Exists"}])
    with pytest.raises(UserError, match=r'unknown field "spec.runtimePatches\[0\]\S+.operatr"$'):
        launch_training(settings, data_dir, tmp_path / "run", launch)


def test_pods_that_may_not_be_seen_do_not_hide_the_failure(
    cluster, launch, settings, data_dir, tmp_path, lines
):
    del cluster.rules[1:]

    def run(name):
        wait_for(lambda: any("cannot be seen" in line for line in lines.messages))
        cluster.status(name, "Failed", "FailedJobs", "the reason")

    cluster.on_create = run
    with pytest.raises(RuntimeError, match="the reason"):
        launch_training(settings, data_dir, tmp_path / "run", launch)
    (blind,) = [line for line in lines.messages if "cannot be seen" in line]
    assert blind.endswith("needs the rules of cluster/train-job-rbac.yaml")


def test_a_volume_that_is_not_here_is_a_mistake(launch, settings, data_dir, tmp_path):
    launch = dataclasses.replace(launch, mount_path=str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"elsewhere: no folder .*; mount the claim shared there"):
        launch_training(settings, data_dir, tmp_path / "run", launch)


def test_data_that_another_task_has_just_copied_stays(data_dir, tmp_path, monkeypatch):
    copytree, shared = shutil.copytree, tmp_path / "data-1"

    def slow(source, target, **options):
        monkeypatch.undo()
        copytree(source, shared)
        return copytree(source, target, **options)

    monkeypatch.setattr(shutil, "copytree", slow)
    train_job.share(data_dir, shared)
    assert [path.name for path in tmp_path.iterdir()] == ["data-1"]
    assert json.loads((shared / "manifest.json").read_text()) == read_manifest(data_dir)


def test_what_killed_copies_left_is_removed_a_day_later(data_dir, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        for name in ("data-1", "data-2"):
            with pytest.raises(KeyboardInterrupt):
                train_job.share(data_dir, tmp_path / name)
    old, new = sorted(tmp_path.iterdir())
    long_ago = time.time() - 2 * train_job.LEFTOVER_SECONDS
    os.utime(old, (long_ago, long_ago))
    train_job.share(data_dir, tmp_path / "data-3")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([new.name, "data-3"])
