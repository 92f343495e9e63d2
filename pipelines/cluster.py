# pyright: reportAttributeAccessIssue=false
"""What a cluster is told about each step: resources, nodes, volumes, secrets, retries. Fixed when compiled.

A YAML file holds `ClusterSettings`; cluster/example.yaml is a pattern.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from kfp import dsl, kubernetes
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from components import image_of
from dynamic_transformers.configure import omegaconf_line
from dynamic_transformers.launch.settings import Launch, SecretVariable
from dynamic_transformers.settings import UserError

CPUS, BYTES = r"(\d*\.)?\d+m?", r"\d+([EPTGM]i?|Ki)?"
OPERATORS, EFFECTS = ("Exists", "Equal"), ("NoSchedule", "PreferNoSchedule", "NoExecute")
STEPS = ("configure", "prepare_data", "train", "export", "evaluate", "compare", "report_finished")
# Where a second attempt cannot help: configure finds the user's mistakes, report_finished tells how it ended.
TRIED_ONCE = ("configure", "report_finished")
MAX_RETRIES = 10
BACKOFF_SECONDS, BACKOFF_FACTOR = 60, 2  # before the first retry, and what each further one multiplies it by
DAY = 24 * 60 * 60
WITHOUT_LIMIT = 30 * DAY  # what an attempt may take where `timeout_seconds` says nothing
PENDING = DAY  # what an attempt may wait for its node and image, which Argo counts too


@dataclass
class Toleration:
    """A taint that a step's pod bears, as in Kubernetes."""

    key: str
    operator: str = "Exists"  # Exists | Equal
    value: str | None = None
    effect: str | None = None  # None: every effect


@dataclass
class StepSettings:
    """Where a step runs, and what of."""

    cpu: str | None = None  # limit, as Kubernetes writes it: 8, 500m
    memory: str | None = None  # limit: 64Gi
    accelerator: str = "nvidia.com/gpu"
    accelerators: int = 0  # of one node; training runs one process on each
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[Toleration] = field(default_factory=list)
    timeout_seconds: int = 0  # of one attempt; 0: none, but `retry_window` counts 30 days


@dataclass
class ClusterSettings:
    """Settings of a compiled pipeline.

    Attributes:
        steps: by name; a step that is not named takes what the cluster gives it. Each of the steps that share
            the work of `prepare_data` (`--data-shards`) gets what that gets.
        environment: variables of every step and of a TrainJob's nodes; the pipeline holds their values.
        secrets: for every step: tokens of the hub, of MLflow, of W&B.
        image_pull_secrets: names of Secrets with the registry's credentials.
        retries: how often a step that failed is begun again, within its `retry_window`; never configure and
            report_finished. A step whose pod was evicted or deleted, or whose node was lost, is not begun
            again: to Argo, which KFP runs on, that is an error, no failure (`submit --resubmit`).
        parallel_runs: runs (architecture and seed) at the same time.
        shared_memory: size of /dev/shm for training; a pod's own 64 MB are too few.
        nodes: of one training run; more than one need `volume_claim`.
        volume_claim: PersistentVolumeClaim, ReadWriteMany, for data and checkpoints: training is then a
            TrainJob of the Kubeflow Trainer, which goes on from its last checkpoint when it is begun again.
        mount_path: where it appears.
        runtime: the ClusterTrainingRuntime that the TrainJob is one of.
        grace_seconds: what its nodes get for a step and a checkpoint when they are to end.
    """

    steps: dict[str, StepSettings] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    secrets: list[SecretVariable] = field(default_factory=list)
    image_pull_secrets: list[str] = field(default_factory=list)
    retries: int = 2
    parallel_runs: int = 4
    shared_memory: str | None = "2Gi"
    nodes: int = 1
    volume_claim: str = ""
    mount_path: str = "/shared"
    runtime: str = Launch.runtime
    grace_seconds: int = Launch.grace_seconds


LOCAL = ClusterSettings(
    retries=0, parallel_runs=1, shared_memory=None
)  # this machine, with or without Docker


def read_cluster(path: Path) -> ClusterSettings:
    """Settings of a YAML file.

    Raises:
        UserError: no such file, no YAML, an unknown key or step, a wrong type or value.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; cluster/example.yaml is a pattern")
    try:
        cluster = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(ClusterSettings), OmegaConf.load(path))
        )
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {omegaconf_line(error)}") from error
    except (YAMLError, OSError) as error:  # OSError: a file that holds one number
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    assert isinstance(cluster, ClusterSettings)
    try:
        check(cluster)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return cluster


def check(cluster: ClusterSettings) -> None:
    """Refuse what a cluster could only refuse later.

    Raises:
        UserError: names the key, the value and what would be right.
    """
    if unknown := sorted(set(cluster.steps) - set(STEPS)):
        raise UserError(f"steps.{unknown[0]}: must be one of {', '.join(STEPS)}")
    at_least("retries", cluster.retries, 0)
    if cluster.retries > MAX_RETRIES:
        raise UserError(f"retries={cluster.retries}: must be at most {MAX_RETRIES}")
    at_least("parallel_runs", cluster.parallel_runs, 1)
    at_least("nodes", cluster.nodes, 1)
    at_least("grace_seconds", cluster.grace_seconds, 30)
    quantity("shared_memory", cluster.shared_memory, BYTES, "64Gi")
    if not PurePosixPath(cluster.mount_path).is_absolute():
        raise UserError(f"mount_path={cluster.mount_path}: must be an absolute path")
    if cluster.nodes > 1 and not cluster.volume_claim:
        raise UserError(f"nodes={cluster.nodes} needs volume_claim, which the nodes share")
    for name, step in cluster.steps.items():
        key = f"steps.{name}"
        quantity(f"{key}.cpu", step.cpu, CPUS, "8 or 500m")
        quantity(f"{key}.memory", step.memory, BYTES, "64Gi")
        at_least(f"{key}.accelerators", step.accelerators, 0)
        at_least(f"{key}.timeout_seconds", step.timeout_seconds, 0)
        for index, toleration in enumerate(step.tolerations):
            check_toleration(f"{key}.tolerations[{index}]", toleration)


def check_toleration(key: str, toleration: Toleration) -> None:
    """Refuse a toleration that Kubernetes does not know.

    Raises:
        UserError: names the key, the value and what would be right.
    """
    if toleration.operator not in OPERATORS:
        raise UserError(f"{key}.operator={toleration.operator}: must be one of {', '.join(OPERATORS)}")
    if toleration.value is not None and toleration.operator == "Exists":
        raise UserError(f"{key}.value={toleration.value}: needs operator=Equal")
    if toleration.effect is not None and toleration.effect not in EFFECTS:
        raise UserError(f"{key}.effect={toleration.effect}: must be one of {', '.join(EFFECTS)}")


def at_least(key: str, value: int, least: int) -> None:
    """Refuse a number that is too small."""
    if value < least:
        raise UserError(f"{key}={value}: must be at least {least}")


def quantity(key: str, value: str | None, pattern: str, example: str) -> None:
    """Refuse what is no quantity of Kubernetes and of KFP."""
    if value is not None and not re.fullmatch(pattern, value):
        raise UserError(f"{key}={value}: must be a quantity, such as {example}")


def launch_of(cluster: ClusterSettings) -> Launch:
    """How the train step starts its processes."""
    step = cluster.steps.get("train", StepSettings())
    processes = max(1, step.accelerators)
    if cluster.nodes == 1 and not cluster.volume_claim:
        # No more than that: where and how long the task runs is not the cache's business.
        return Launch(processes=processes)
    limits = {"cpu": step.cpu, "memory": step.memory}
    resources = {name: value for name, value in limits.items() if value}
    if step.accelerators:
        resources[step.accelerator] = str(step.accelerators)
    return Launch(
        processes=processes,
        nodes=cluster.nodes,
        image=image_of("train"),
        claim=cluster.volume_claim,
        mount_path=cluster.mount_path,
        runtime=cluster.runtime,
        resources=resources,
        node_selector=step.node_selector,
        tolerations=[without_none(asdict(toleration)) for toleration in step.tolerations],
        environment=cluster.environment,
        secrets=cluster.secrets,
        image_pull_secrets=cluster.image_pull_secrets,
        shared_memory=cluster.shared_memory,
        timeout_seconds=step.timeout_seconds,
        grace_seconds=cluster.grace_seconds,
    )


def retry_window(step: StepSettings, retries: int) -> int:
    """Seconds after the first attempt's start within which Argo begins a step again (its `maxDuration`).

    It is the deadline of the last attempt too: all attempts, each of full length, and all waits fit in.
    """
    attempt = (step.timeout_seconds or WITHOUT_LIMIT) + PENDING
    waits = sum(BACKOFF_SECONDS * BACKOFF_FACTOR**retry for retry in range(retries))
    return (retries + 1) * attempt + waits


def place(task: dsl.PipelineTask, name: str, cluster: ClusterSettings) -> None:
    """Give a task what the cluster's settings say of step `name`."""
    step = cluster.steps.get(name, StepSettings())
    if cluster.retries and name not in TRIED_ONCE:
        task.set_retry(
            cluster.retries,
            backoff_duration=f"{BACKOFF_SECONDS}s",
            backoff_factor=BACKOFF_FACTOR,
            backoff_max_duration=f"{retry_window(step, cluster.retries)}s",
        )
    if name == "train" and cluster.volume_claim:
        step = StepSettings()  # it watches; the nodes of its job compute, and have the time limit
    if step.cpu:
        task.set_cpu_limit(step.cpu)
    if step.memory:
        task.set_memory_limit(step.memory)
    if step.accelerators:
        task.set_accelerator_type(step.accelerator)
        task.set_accelerator_limit(step.accelerators)
    for key, value in step.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in step.tolerations:
        kubernetes.add_toleration(task, **without_none(asdict(toleration)))
    if step.timeout_seconds:
        kubernetes.set_timeout(task, step.timeout_seconds)
    if cluster.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, cluster.image_pull_secrets)
    for variable, value in cluster.environment.items():
        task.set_env_variable(variable, value)
    for secret in cluster.secrets:
        kubernetes.use_secret_as_env(task, secret.secret, {secret.key: secret.variable})
    if name == "train" and cluster.volume_claim:
        kubernetes.mount_pvc(task, cluster.volume_claim, cluster.mount_path)
    elif name == "train" and cluster.shared_memory:
        kubernetes.empty_dir_mount(
            task, "shared-memory", "/dev/shm", medium="Memory", size_limit=cluster.shared_memory
        )


def without_none(values: dict) -> dict:
    """The entries that are set."""
    return {key: value for key, value in values.items() if value is not None}
