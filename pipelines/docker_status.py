"""Works around kubeflow/pipelines #13332: DockerRunner reports failed containers as SUCCESS.

kfp 2.17 starts containers with `auto_remove`, and takes one that is gone before it asks for the status for
a successful one. When test_kfp_still_takes_a_removed_container_for_a_successful_one fails, kfp is mended:
`local_steps` may then take kfp's own function.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import docker
from docker.errors import DockerException
from requests.exceptions import RequestException

# requests' own errors come through docker's client too.
DOCKER_ERRORS = (DockerException, RequestException)


def run_docker_container(
    client: docker.DockerClient,
    image: str,
    command: list[str],
    volumes: dict[str, Any],
    around: Callable[[Any], AbstractContextManager] = nullcontext,
    **container_run_args: Any,
) -> int:
    """What kfp's function of this name does, but the container is removed only after its status is known.

    Args:
        around: gives a context for the time in which the container runs.
    """
    container = client.containers.run(
        image=image, command=command, detach=True, volumes=volumes, **container_run_args
    )
    try:
        with around(container):
            for line in container.logs(stream=True):
                print(line.decode(errors="replace"), end="")
            return container.wait()["StatusCode"]
    finally:
        container.remove(force=True)
