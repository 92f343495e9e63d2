"""Docker, for the tests that start real containers."""

import os

import docker
import pytest
from docker.errors import DockerException

from components import IMAGES, image_of
from pipelines.images import revision_mismatch


def client_with_images(*steps):
    """A client of an engine that has the images of `steps`, built of these sources.

    Else the test is skipped; in CI, which builds the images before, it fails for those of other sources.
    """
    try:
        client = docker.from_env()
        for step in steps:
            client.images.get(image_of(step))
    except DockerException as error:
        pytest.skip(f"needs a Docker engine and `make build-images`: {str(error).splitlines()[0]}")
    except KeyError as error:
        pytest.skip(f"{IMAGES} has no image of {error}; run `make build-images`")
    if reason := revision_mismatch():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return client
