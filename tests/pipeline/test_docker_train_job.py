"""A TrainJob whose nodes are containers of the train image. Skipped where no engine or image is at hand."""

import os
import uuid

import pytest
import torch
from docker.types import Mount
from real_docker import client_with_images
from safetensors.torch import load_file

from components import image_of
from dynamic_transformers.launch.run import launch_training
from dynamic_transformers.launch.settings import Launch
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.training.trainer import train
from tests.distributed.fake_kubernetes import fake_cluster


class ContainerNode:
    """A node of a job as a container, which other nodes find by its name."""

    def __init__(self, container):
        self.container = container

    def poll(self):
        self.container.reload()
        state = self.container.attrs["State"]
        return state["ExitCode"] if state["Status"] == "exited" else None

    def output(self):
        return self.container.logs().decode()

    def stop(self):
        self.container.stop(timeout=0)


class Containers:
    """Starts the nodes of jobs on a network of their own."""

    def __init__(self, client, network, volume):
        self.client, self.network, self.volume = client, network, volume
        self.started = []

    @staticmethod
    def address(name):
        return name

    def __call__(self, name, trainer, environment, log):
        container = self.client.containers.run(
            trainer["image"],
            [*trainer["command"], *trainer["args"]],
            name=name,
            hostname=name,
            environment=environment,
            network=self.network.name,
            mounts=[Mount(target=str(self.volume), source=str(self.volume), type="bind")],
            user=f"{os.getuid()}:{os.getgid()}",
            shm_size="1g",
            detach=True,
        )
        self.started.append(container)
        return ContainerNode(container)


@pytest.fixture
def client():
    return client_with_images("train")


@pytest.fixture
def cluster(client, tmp_path):
    network = client.networks.create(f"train-job-{uuid.uuid4().hex[:8]}", driver="bridge")
    nodes = None
    try:
        with fake_cluster(tmp_path) as fake:
            nodes = fake.start_node = Containers(client, network, fake.claims["shared"])
            yield fake
    finally:
        for container in nodes.started if nodes else []:
            container.remove(force=True)
        network.remove()


def weights(run_dir):
    return load_file(run_dir / read_manifest(run_dir, "train")["checkpoint"] / "model.safetensors")


def test_two_containers_train_what_one_process_trains(client, cluster, make_settings, data_dir, tmp_path):
    one = train(make_settings("mod", data={"batch_size": 4}), data_dir, tmp_path / "one")
    launch = Launch(
        nodes=2,
        image=image_of("train"),
        claim="shared",
        mount_path=str(cluster.claims["shared"]),
        environment={"OMP_NUM_THREADS": "1"},
    )
    settings = make_settings("mod", data={"batch_size": 2})
    run_dir = launch_training(settings, data_dir, tmp_path / "run", launch)
    assert [node.poll() for node in cluster.nodes] == [0, 0]
    manifest = read_manifest(run_dir, "train")
    # It was the image that trained, not this checkout.
    assert (
        manifest["git_revision"]
        == client.images.get(launch.image).labels["org.opencontainers.image.revision"]
    )
    assert manifest["training_tokens"] == read_manifest(one)["training_tokens"]
    for name, value in weights(one).items():
        if "threshold" not in name:  # the mean of two quantiles is not the quantile of both
            torch.testing.assert_close(weights(run_dir)[name], value, atol=2e-3, rtol=1e-2)
