"""Training on other nodes: one TrainJob of Kubeflow Trainer v2, whose data and run are on a shared volume.

On the volume, below `dynamic-transformers/`: `data-<digest>/`, once for all jobs that train on it, and of
each job `<job>/job.json` and `<job>/run/`. A job's name follows from what it computes, so that a task that
is tried again finds its job, whatever became of it.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from dynamic_transformers.launch.kubernetes_api import GROUP, VERSION, TrainJobs
from dynamic_transformers.launch.settings import Launch
from dynamic_transformers.launch.worker import WORKER, write_job
from dynamic_transformers.manifest import digest, finished, fresh_folder
from dynamic_transformers.settings import Settings, UserError, holds_credentials
from dynamic_transformers.training.trainer import training_config

logger = logging.getLogger("dynamic_transformers")

# What says to which MLflow run a task logs, as KFP's plugin sets it. Credentials come from Secrets alone.
PASSED_ON = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_WORKSPACE",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_RUN_ID",
)
VISIBLE_SECONDS = 120.0  # a network volume may show other machines' files late
LOOK_SECONDS = 2.0


def train_on_nodes(settings: Settings, data_dir: Path, run_dir: Path, launch: Launch) -> Path:
    """Train by a TrainJob, and copy the finished run to `run_dir`.

    A run that is finished on the volume is taken as it is. A job that runs already is followed; one that has
    failed is replaced, and its training goes on from the last checkpoint (`training.resume=auto`).

    Raises:
        UserError: the volume is not here, or the cluster refuses the job.
        RuntimeError: the job failed, or the cluster cannot be reached.
    """
    config = training_config(settings, data_dir)
    if finished(run_dir, "train", config):
        return run_dir
    if not os.access(launch.mount_path, os.W_OK):
        raise UserError(
            f"launch.mount_path={launch.mount_path}: no folder that this task can write to; "
            f"mount the claim {launch.claim} there"
        )
    name = job_name(settings.model.type, config, launch)
    volume = Path(launch.mount_path) / "dynamic-transformers"
    job = volume / name
    run = job / "run"
    job.mkdir(parents=True, exist_ok=True)
    if not finished(run, "train", config):
        data = volume / f"data-{config['data_digest'][:16]}"
        share(data_dir, data)
        write_job(job / "job.json", settings, data, run)
        TrainJobs().run(train_job(name, launch, job / "job.json"))
        wait_until_visible(name, run, config)
    with fresh_folder(run_dir, "train") as temporary:
        shutil.copytree(run, temporary, dirs_exist_ok=True)
    return run_dir


def job_name(architecture: str, config: dict, launch: Launch) -> str:
    """A DNS label that is the same for the same training: settings, data, batch over all ranks, program."""
    what = {"config": config, "world_size": launch.world_size, "image": launch.image}
    return f"dt-{architecture}-{digest(what)[:16]}"


def share(data_dir: Path, shared: Path) -> None:
    """Copy a data folder to the volume, unless it is there. Several tasks may do so at the same time."""
    if shared.exists():
        return
    temporary = Path(tempfile.mkdtemp(dir=shared.parent, prefix=f".{shared.name}."))
    try:
        shutil.copytree(data_dir, temporary, dirs_exist_ok=True)
        temporary.rename(shared)
    except OSError:
        if not shared.exists():  # else another task was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def wait_until_visible(name: str, run: Path, config: dict) -> None:
    """Wait for the run of a job that is complete.

    Raises:
        RuntimeError: it does not appear.
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not finished(run, "train", config):
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"TrainJob {name} is complete, but there is no finished run in {run}: "
                "are its nodes and this task on the same volume?"
            )
        time.sleep(LOOK_SECONDS)


def node_environment(launch: Launch) -> list[dict[str, Any]]:
    """Variables of a node's container: this task's MLflow run, what `launch` says, secrets by reference."""
    values = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)} | launch.environment
    for entry in launch.secrets:
        values.pop(entry.variable, None)
    if holds_credentials(values.get("MLFLOW_TRACKING_URI", "")):
        del values["MLFLOW_TRACKING_URI"]
        values.pop("MLFLOW_RUN_ID", None)  # which only that server knows
        logger.warning("MLFLOW_TRACKING_URI holds a password: give it to the nodes by a Secret")
    plain = [{"name": name, "value": value} for name, value in values.items()]
    return plain + [
        {"name": entry.variable, "valueFrom": {"secretKeyRef": {"name": entry.secret, "key": entry.key}}}
        for entry in launch.secrets
    ]


def train_job(name: str, launch: Launch, job_file: Path) -> dict[str, Any]:
    """The TrainJob that runs one worker for each process on each node.

    torchrun takes numbers of nodes and processes, rank and address from the PET_* variables, which the
    Trainer's torch runtime sets. Volumes, mounts and placement are patches of that runtime: its replicated
    job and its container are both called `node`.
    """
    trainer: dict[str, Any] = {
        "image": launch.image,
        "command": ["python", "-m", "torch.distributed.run"],
        "args": ["-m", WORKER, str(job_file)],
        "numNodes": launch.nodes,
        "numProcPerNode": launch.processes,
    }
    if variables := node_environment(launch):
        trainer["env"] = variables
    if launch.resources:
        trainer["resourcesPerNode"] = {"limits": launch.resources}
    shared_memory = {"medium": "Memory"}
    if launch.shared_memory:
        shared_memory["sizeLimit"] = launch.shared_memory
    pod: dict[str, Any] = {
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": launch.claim}},
            # A pod's own /dev/shm is 64 MB: too little for NCCL and data loaders.
            {"name": "shm", "emptyDir": shared_memory},
        ],
        "containers": [
            {
                "name": "node",
                "volumeMounts": [
                    {"name": "shared", "mountPath": launch.mount_path},
                    {"name": "shm", "mountPath": "/dev/shm"},
                ],
            }
        ],
    }
    if launch.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in launch.image_pull_secrets]
    if launch.node_selector:
        pod["nodeSelector"] = launch.node_selector
    if launch.tolerations:
        pod["tolerations"] = launch.tolerations
    patch = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    spec: dict[str, Any] = {
        "runtimeRef": {"name": launch.runtime},
        "trainer": trainer,
        "runtimePatches": [
            {
                "manager": "dynamic-transformers",
                "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patch]}}},
            }
        ],
    }
    if launch.timeout_seconds:
        spec["activeDeadlineSeconds"] = launch.timeout_seconds
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": "dynamic-transformers"}},
        "spec": spec,
    }
