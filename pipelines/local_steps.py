"""Steps on this machine end with the pipeline that started them, and what has finished is found again.

kfp 2.17's local runner does neither: a signal ends it alone, while its step goes on without it; and each time
its outputs go to a new folder, so that nothing which a killed pipeline has left is ever taken up.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import docker
from kfp.local import docker_task_handler, executor_input_utils, subprocess_task_handler

from pipelines.docker_status import DOCKER_ERRORS, run_docker_container

# For a container, whose shell is process 1, which no SIGTERM reaches. Again and again: the first one may come
# before the shell has started the step. A step takes it for a wish to end however often it comes.
END_ALL = ["sh", "-c", "while :; do kill -TERM -1; sleep 2; done"]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LocalSteps:
    """The steps that run now, and the signal that they were asked to end by (0: none)."""

    def __init__(self) -> None:
        self.signal = 0
        self.ends: list[Callable[[bool], None]] = []

    def install(self, execution: str) -> None:
        """Let kfp's runners start steps by this object, and put their outputs into the folder `execution`."""
        executor_input_utils.get_local_pipeline_resource_name = lambda pipeline_name: execution
        subprocess_task_handler.run_local_subprocess = self.run_process
        docker_task_handler.run_docker_container = self.run_container

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Within the body, a signal ends the steps that run, and no further one is started."""
        heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup
        previous = {number: signal.signal(number, self.stop) for number in heeded}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def stop(self, number: int, frame: FrameType | None = None) -> None:
        """Ask the steps to end, which may write a checkpoint first; asked twice, end them."""
        again, self.signal = bool(self.signal), self.signal or number
        for end in list(self.ends):
            end(again)

    @contextmanager
    def ended_by(self, end: Callable[[bool], None]) -> Iterator[None]:
        """Within the body a step runs, which `end(at_once)` ends."""
        self.ends.append(end)
        if self.signal:  # it came while the step was started
            end(False)
        try:
            yield
        finally:
            self.ends.remove(end)

    def run_process(self, full_command: Sequence[str], env_vars: dict[str, str] | None = None) -> int:
        """What kfp's function of this name does, in a group of processes that can be ended together."""
        if self.signal:
            return 1
        process = subprocess.Popen(
            full_command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, **(env_vars or {})},
            process_group=0,  # the shell that kfp starts does not pass a signal on
        )

        def end(at_once: bool) -> None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL if at_once else signal.SIGTERM)

        with self.ended_by(end), process:
            assert process.stdout is not None
            # Until the last of the group has closed it, so that nothing goes on when this returns.
            for line in process.stdout:
                print(line, end="")
            print("\n")
            return process.wait()

    def run_container(
        self, client: docker.DockerClient, image: str, command: list[str], volumes: dict, **options: Any
    ) -> int:
        """`docker_status.run_docker_container`, but it can be ended."""
        if self.signal:
            return 1

        def started(container: Any) -> Any:
            def end(at_once: bool) -> None:
                with suppress(*DOCKER_ERRORS):  # it has ended by itself, or the engine is away
                    if at_once:
                        container.kill()
                    else:
                        container.exec_run(END_ALL, detach=True)

            return self.ended_by(end)

        return run_docker_container(client, image, command, volumes, around=started, **options)
