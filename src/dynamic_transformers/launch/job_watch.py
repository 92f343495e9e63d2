"""What a person who follows a job is told besides its state: restarts, and why no node gets ready."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dynamic_transformers.launch.job_state import OF_LOGS, containers, holding, obstacles
from dynamic_transformers.launch.node_logs import NodeLogs

logger = logging.getLogger("dynamic_transformers")

LATE_SECONDS = 300.0  # without ready nodes, after which a reason is looked for
EXPLAIN_SECONDS = 60.0  # between two looks at the events


class JobWatch:
    """Remembers what has been said of one job, so that a line comes only when something changes."""

    def __init__(self, job: dict[str, Any]):
        self.name = job["metadata"]["name"]
        logs = job["metadata"].get("annotations", {}).get(OF_LOGS)
        self.logs = NodeLogs(Path(logs)) if logs else None
        self.counts: dict[tuple[str, str], int] = {}
        self.ready()
        self.is_blind = False

    def ready(self) -> None:
        """All is well now: forget reasons why it was not."""
        self.ready_at = time.monotonic()
        self.next_look = self.ready_at + LATE_SECONDS
        self.said: set[str] = set()

    def is_late(self) -> bool:
        """Whether it is time to look for a reason why nodes are not ready."""
        return time.monotonic() >= self.next_look

    def explain(self, job: dict[str, Any], pods: Iterable[Any], events: Iterable[Any]) -> None:
        """Warn of each reason that has not been told yet."""
        self.next_look = time.monotonic() + EXPLAIN_SECONDS
        seconds = time.monotonic() - self.ready_at
        found = obstacles(job, pods, events) or {"": "neither a pod nor an event says why"}
        for reason, line in found.items():
            if reason not in self.said:
                logger.warning("TrainJob %s: no ready nodes for %.0f s: %s", self.name, seconds, line)
        self.said |= found.keys()

    def restarts(self, pods: Iterable[Any]) -> None:
        """Say which containers have been started anew in their pod, and what had ended them."""
        told = False
        for pod in pods:
            for state in containers(pod):
                key = (pod.metadata.uid or pod.metadata.name, state.name)
                if state.restart_count > self.counts.get(key, 0):
                    last = state.last_state and state.last_state.terminated
                    why = f"exit code {last.exit_code} ({last.reason})" if last else "an unknown end"
                    logger.warning("%s: restart %d, after %s", pod.metadata.name, state.restart_count, why)
                    told = True
                self.counts[key] = state.restart_count
        if told and self.logs is not None:
            self.logs.show_exceptions()

    def mistake(self) -> str:
        """The user's mistake that ended a process of a node, which no restart mends; '' if there was none."""
        return self.logs.mistake() if self.logs is not None else ""

    def blind(self, reason: str) -> None:
        """Say once that pods or events cannot be read."""
        if not self.is_blind:
            logger.warning("what the job's nodes do cannot be seen: %s", reason)
        self.is_blind = True

    def end(self, job: dict[str, Any]) -> None:
        """Show why a job has failed."""
        if holding(job, "Failed") and self.logs is not None:
            self.logs.show_end()
