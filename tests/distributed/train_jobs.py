"""What tests of TrainJobs share: a job's place and name, and nodes that end as they are told."""

import json
import shutil
import time
import typing
from pathlib import Path

from safetensors.torch import load_file

from dynamic_transformers.launch import train_job
from dynamic_transformers.launch.settings import Launch
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.training.run_folder import run_identity, training_config
from tests.distributed.fake_trainer import NOW

STEPS = 24  # more than a node can do between the checkpoint after which it is stopped and being stopped


def launch_on(cluster, **changes):
    return Launch(
        nodes=2,
        image="registry.example/train:1",
        claim="shared",
        mount_path=str(cluster.claims["shared"]),
        environment={"OMP_NUM_THREADS": "1"},
        **changes,
    )


def volume_of(launch):
    return Path(launch.mount_path) / "dynamic-transformers"


def name_of(settings, data_dir, launch):
    config = training_config(run_identity(settings, data_dir, launch.world_size), settings)
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


def print_to(cluster, name, node, error=None, message="", **streams):
    """What a node's process writes to the volume, as torchrun lays it out."""
    logs = Path(cluster.jobs[name]["metadata"]["annotations"]["dynamic-transformers.github.io/logs"])
    process = logs / node / "none_x" / "attempt_0" / "0"
    process.mkdir(parents=True, exist_ok=True)
    for stream, text in streams.items():
        (process / f"{stream}.log").write_text(text)
    if error:
        content = {"message": {"message": message, "extraInfo": {"py_callstack": error, "timestamp": "0"}}}
        (process / "error.json").write_text(json.dumps(content))


def put_job(cluster, settings, data_dir, launch):
    """A job as an earlier task has left it; returns its name."""
    name = name_of(settings, data_dir, launch)
    cluster.jobs[name] = train_job.train_job(name, launch, volume_of(launch) / "job.json")
    cluster.jobs[name]["metadata"]["creationTimestamp"] = NOW
    return name
