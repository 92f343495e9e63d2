"""Docker, for the tests that start real containers."""

import os

import docker
import pytest

from components import IMAGES, image_of
from pipelines.docker_status import DOCKER_ERRORS
from pipelines.images import revision_mismatch


def client_with_images(*steps):
    """A client of an engine that has the images of `steps`, built of these sources.

    Else the test is skipped, and fails where CI is set: .ci/run does so once it has built the images.
    """
    client, reason = None, ""
    try:
        client = docker.from_env()
        for step in steps:
            client.images.get(image_of(step))
        reason = revision_mismatch()
    except DOCKER_ERRORS as error:
        reason = f"needs a Docker engine and `make build-images`: {str(error).splitlines()[0]}"
    except KeyError as error:
        reason = f"{IMAGES} has no image of {error}; run `make build-images`"
    if reason:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return client
