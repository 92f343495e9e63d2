"""A cluster, what is trained there, and what is logged."""

import dataclasses
import logging

import pytest

from dynamic_transformers.launch import train_job
from dynamic_transformers.training.trainer import train
from tests.distributed.fake_kubernetes import fake_cluster
from tests.distributed.train_jobs import STEPS, launch_on


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


@pytest.fixture
def launch(cluster):
    return launch_on(cluster)


@pytest.fixture(scope="session")
def settings(make_settings):
    training = {"max_steps": STEPS, "checkpoint_every": 2, "log_every": 1}
    return make_settings("mod", data={"batch_size": 2}, training=training)


@pytest.fixture(scope="session")
def finished_run(settings, data_dir, tmp_path_factory):
    """What two nodes are to leave, by one process: also for the tests that are about the job alone."""
    both = dataclasses.replace(settings, data=dataclasses.replace(settings.data, batch_size=4))
    return train(both, data_dir, tmp_path_factory.mktemp("finished") / "run")
