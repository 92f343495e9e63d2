"""Training on other nodes: one TrainJob of Kubeflow Trainer v2, whose data and run are on a shared volume.

The volume holds, below `dynamic-transformers/`, one `data-<digest>/` for all jobs that train on it. Each
job has `<job>/job-….json`, `<job>/run/`, and what its nodes print in `<job>/logs/<time>/node-<rank>/`. A
job's name follows from what it computes: a task that is tried again finds its job, whether it runs or has
ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from dynamic_transformers.folders import flush, new_sibling
from dynamic_transformers.interruption import Interrupted, Interruption
from dynamic_transformers.launch.job_state import LIMIT, OF_LAUNCH, OF_LOGS, holding, why_failed
from dynamic_transformers.launch.kubernetes_api import GROUP, VERSION, TrainJobs
from dynamic_transformers.launch.settings import Launch
from dynamic_transformers.launch.worker import WORKER, write_job
from dynamic_transformers.manifest import digest, finished, fresh_folder
from dynamic_transformers.settings import Settings, UserError, holds_credentials
from dynamic_transformers.training.run_folder import run_identity, training_config

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
LEFTOVER_SECONDS = 86400.0  # after which a half-made data folder is nobody's work any more
MANAGER = "dynamic-transformers.github.io/train"  # the Trainer wants a domain and a path
USER = 1000  # of the images
MEETING_SECONDS = 300  # that the other nodes wait for the first one
CLOSING_SECONDS = 10  # of the grace period, for torchrun after its workers


def train_on_nodes(settings: Settings, data_dir: Path, run_dir: Path, launch: Launch) -> Path:
    """Train by a TrainJob, and copy the finished run to `run_dir`.

    A run that is finished on the volume is taken as it is. A job that runs already is followed; one that has
    failed is replaced, and its training goes on from the last checkpoint (`training.resume=auto`). A signal
    ends this task, not the job.

    Raises:
        UserError: the volume is not here, the cluster refuses the job, or its nodes found a mistake.
        RuntimeError: the job failed, or the cluster cannot be reached.
    """
    config = training_config(run_identity(settings, data_dir, launch.world_size), settings)
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
        # Its own for each way to split the batch over ranks: a job that runs already may have another.
        job_file = job / f"job-{digest(settings.to_dict())[:8]}.json"
        write_job(job_file, settings, data, run)
        ended = run_job(train_job(name, launch, job_file))
        if holding(ended, "Failed"):
            raise RuntimeError(why_failed(ended))
        wait_until_visible(name, run, config)
    with fresh_folder(run_dir, "train") as temporary:
        shutil.copytree(run, temporary, dirs_exist_ok=True)
    return run_dir


def run_job(manifest: dict[str, Any]) -> dict[str, Any]:
    """`TrainJobs.run`, which SIGTERM and SIGINT end, with a line and the exit code that a shell expects."""

    def leave(number: int) -> None:
        name = manifest["metadata"]["name"]
        logger.warning("this task ends, TrainJob %s goes on: the task follows it when it is run again", name)
        raise Interrupted(number)

    with Interruption(then=leave):
        return TrainJobs().run(manifest)


def job_name(architecture: str, config: dict, launch: Launch) -> str:
    """A DNS label that is the same for the same training: settings, data, batch over all ranks, program."""
    return f"dt-{architecture}-{digest({'config': config, 'image': launch.image})[:16]}"


def share(data_dir: Path, shared: Path) -> None:
    """Copy a data folder to the volume, unless it is there. Several tasks may do so at the same time."""
    for leftover in shared.parent.glob(".data-*.new-*"):  # locks are not to be had on every network volume
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
    if shared.exists():
        return
    temporary = new_sibling(shared)
    try:
        shutil.copytree(data_dir, temporary, dirs_exist_ok=True)
        flush(temporary)
        temporary.rename(shared)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another task was faster
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
    values = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    # From torch 2.12 on; before, its workers have 30 seconds.
    values["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(launch.grace_seconds - CLOSING_SECONDS)
    values |= launch.environment
    for entry in launch.secrets:
        values.pop(entry.variable, None)
    if holds_credentials(values.get("MLFLOW_TRACKING_URI", "")):
        del values["MLFLOW_TRACKING_URI"]
        values.pop("MLFLOW_RUN_ID", None)  # it is a run of that server
        logger.warning("MLFLOW_TRACKING_URI holds a password: give it to the nodes by a Secret")
    plain = [{"name": name, "value": value} for name, value in values.items()]
    return plain + [
        {"name": entry.variable, "valueFrom": {"secretKeyRef": {"name": entry.secret, "key": entry.key}}}
        for entry in launch.secrets
    ]


def train_job(name: str, launch: Launch, job_file: Path) -> dict[str, Any]:
    """The TrainJob that runs one worker for each process on each node.

    torchrun takes numbers of nodes and processes and the address from the PET_* variables, which the
    Trainer's torch runtime sets. Volumes, mounts and placement are patches of that runtime: its replicated
    job and its container are both called `node`.
    """
    # Of its own for every job of this name, so that a failure is not explained by an earlier one.
    logs = job_file.parent / "logs" / time.strftime("%Y%m%d-%H%M%S")
    torchrun = [
        # With torchrun's default, a node that starts again before the others notice reads what the first node
        # has left of the earlier meeting, and all wait for one another.
        *("--rdzv-backend", "c10d", "--rdzv-id", name),
        *("--rdzv-endpoint", "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)"),  # Kubernetes puts the values there
        *("--rdzv-conf", f"read_timeout={MEETING_SECONDS}"),
        *(
            "--log-dir",
            f"{logs}/node-$(PET_NODE_RANK)",
            "--tee",
            "3",
        ),  # 3: both streams, also to the pod's log
    ]
    trainer: dict[str, Any] = {
        "image": launch.image,
        "command": ["python", "-m", "torch.distributed.run"],
        "args": [*torchrun, "-m", WORKER, str(job_file)],
        "numNodes": launch.nodes,
        "numProcPerNode": launch.processes,
        "env": node_environment(launch),
    }
    if launch.resources:
        trainer["resourcesPerNode"] = {"limits": launch.resources}
    shared_memory = {"medium": "Memory"}
    if launch.shared_memory:
        shared_memory["sizeLimit"] = launch.shared_memory
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": launch.grace_seconds,
        # Where the storage heeds it, the volume is the images' to write to, without a look at every file.
        "securityContext": {"fsGroup": USER, "fsGroupChangePolicy": "OnRootMismatch"},
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
                "manager": MANAGER,
                "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patch]}}},
            }
        ],
    }
    if launch.timeout_seconds:
        spec[LIMIT] = launch.timeout_seconds
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": name,
            "labels": {"app.kubernetes.io/name": "dynamic-transformers"},
            "annotations": {OF_LOGS: str(logs), OF_LAUNCH: digest(dataclasses.asdict(launch))[:16]},
        },
        "spec": spec,
    }
