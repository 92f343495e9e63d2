"""How many processes train one model, and on which machines."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynamic_transformers.settings import UserError


@dataclass
class SecretVariable:
    """An environment variable whose value stays in a Kubernetes Secret."""

    variable: str
    secret: str
    key: str


@dataclass
class Launch:
    """One process of this machine, several (torchrun), or, with a claim, a TrainJob of Kubeflow Trainer.

    The step's batch is `data.batch_size` blocks for each process.

    Raises:
        UserError: numbers out of range, or nodes without what they need.
    """

    processes: int = 1  # on each node
    nodes: int = 1
    # All that follows is for a TrainJob.
    image: str = ""
    claim: str = ""  # a PersistentVolumeClaim that this task and all nodes can write to at once
    mount_path: str = ""  # where it is mounted, in this task as on the nodes
    runtime: str = "torch-distributed"  # a ClusterTrainingRuntime for torch
    resources: dict[str, str] = field(default_factory=dict)  # limits of one node
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    secrets: list[SecretVariable] = field(default_factory=list)
    image_pull_secrets: list[str] = field(default_factory=list)
    shared_memory: str | None = None  # size of /dev/shm; None: what a node's memory allows
    timeout_seconds: int = 0  # 0: no limit
    grace_seconds: int = 300  # for a step and a checkpoint, when a node is to end

    def __post_init__(self):
        least_of = {"processes": 1, "nodes": 1, "timeout_seconds": 0, "grace_seconds": 30}
        for name, least in least_of.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UserError(f"launch.{name}={value}: must be a whole number, at least {least}")
        missing = [name for name in ("image", "claim", "mount_path") if not getattr(self, name)]
        if (self.nodes > 1 or self.claim) and missing:
            job = f"nodes={self.nodes}" if self.nodes > 1 else f"claim={self.claim}"
            raise UserError(f"launch.{job} needs launch.{' and launch.'.join(missing)}")
        if self.mount_path and not Path(self.mount_path).is_absolute():
            raise UserError(f"launch.mount_path={self.mount_path}: must be an absolute path")

    @property
    def world_size(self) -> int:
        """Processes on all nodes together."""
        return self.nodes * self.processes

    def to_json(self) -> str:
        """One JSON string: how it travels through a pipeline parameter."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Launch:
        """Inverse of `to_json`; '' is one process.

        Raises:
            UserError: unknown keys, or what the class refuses.
        """
        values = json.loads(text or "{}")
        unknown = sorted(values.keys() - {entry.name for entry in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"launch: no such key: {', '.join(unknown)}")
        secrets = values.pop("secrets", [])
        for entry in secrets:
            if entry.keys() != {"variable", "secret", "key"}:
                raise UserError(f"launch.secrets: {entry} must have variable, secret and key")
        return cls(**values, secrets=[SecretVariable(**entry) for entry in secrets])
