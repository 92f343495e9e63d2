"""A finished run, and copies of it."""

import logging
import shutil

import pytest
from run_contents import STEPS

from dynamic_transformers.training.trainer import train


@pytest.fixture(autouse=True)
def everything_logged(caplog):
    caplog.set_level(logging.INFO, logger="dynamic_transformers")


@pytest.fixture(scope="session")
def finished(make_settings, data_dir, tmp_path_factory):
    """A finished run of 12 steps with checkpoints at 4, 8 and 12."""
    return train(make_settings("mod", training=STEPS), data_dir, tmp_path_factory.mktemp("runs") / "mod")


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def unfinished(run):
    """The same, as a kill after step 12 leaves it."""
    (run / "manifest.json").unlink()
    shutil.rmtree(run / "weights")
    return run
