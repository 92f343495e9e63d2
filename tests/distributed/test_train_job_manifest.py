"""The TrainJob as the Trainer gets it."""

import copy
import dataclasses
import json
import re
from pathlib import Path

import kubernetes_validate
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from dynamic_transformers.launch import train_job
from dynamic_transformers.launch.settings import Launch, SecretVariable
from tests.distributed.fake_kubernetes import RBAC
from tests.distributed.train_jobs import name_of


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
