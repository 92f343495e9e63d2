# pyright: reportArgumentType=false, reportOptionalOperand=false
# The server's API, generated for kfp, declares every field of an answer as optional.
"""What a server tells of a run: its steps, told from Argo's nodes, how they change, and why one failed.

`task_details` are the nodes of Argo, which KFP runs on. A step's name stands on a node between its driver and
its executors: `train-driver` → `train` → `executor`, or, with retries, `executor` → `executor(0)` …
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from kfp_server_api import V2beta1PipelineTaskDetail, V2beta1Run

from dynamic_transformers.command_line import MISTAKE
from dynamic_transformers.launch.patience import OUTAGE_SECONDS
from dynamic_transformers.settings import UserError
from pipelines.package import GROUPS, Package
from pipelines.server import Client

POLL_SECONDS = 5.0
ENDED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
SHOWN = ("PENDING", "RUNNING", "SUCCEEDED", "FAILED", "CANCELING", "CANCELED")  # not what never ran
NAMED = 3  # of the steps that failed

ATTEMPT = re.compile(r"executor\((\d+)\)")
ITERATION = re.compile(r"iteration-iterations\((\d+):.*\)")
DRIVER = "-driver"
# What KFP's launcher and Argo's executor print around a step's own lines.
AROUND = re.compile(r"[IWE]\d{4} |time=\S+ level=|Error: exit status|\[KFP ")
LAUNCHER_GIVES_UP = re.compile(r"F\d{4} .*?(?:exit status (\d+))?$")  # all that follows is Go's stack
# Argo's message where a program ended by itself, and was not killed; an eviction has no exit code.
ENDED_BY_ITSELF = re.compile(r"exit code (?!137|143)\d+")

NEVER = datetime.max.replace(tzinfo=UTC)


@dataclass
class StepState:
    """A step, or one of its iterations in a loop.

    Attributes:
        step: as in the pipeline: `train`; `train-driver` where that is what failed.
        name: with the run or group, where it has one: `train of mod-seed0`.
        pod: that of the last attempt.
        message: Argo's, such as `main: Error (exit code 1)`.
    """

    step: str
    name: str
    state: str
    attempts: int
    cached: bool
    pod: str
    message: str
    start: datetime
    end: datetime

    def __str__(self) -> str:
        state = self.state + (f", attempt {self.attempts}" if self.attempts > 1 else "")
        return f"{self.name}: {state}{', from the cache' if self.cached else ''}"


@dataclass
class Nodes:
    """Argo's nodes, and which follows which."""

    details: list[V2beta1PipelineTaskDetail]
    children: dict[str, list[V2beta1PipelineTaskDetail]] = field(default_factory=dict)
    parents: dict[str, list[V2beta1PipelineTaskDetail]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        by_key = {key_of(detail.pod_name or detail.task_id): detail for detail in self.details}
        for key, detail in by_key.items():
            names = [child.pod_name or child.task_id for child in detail.child_tasks or []]
            self.children[key] = [by_key[key_of(name)] for name in names if key_of(name) in by_key]
            for child in self.children[key]:
                self.parents[key_of(child.pod_name or child.task_id)].append(detail)

    def after(self, detail: V2beta1PipelineTaskDetail) -> list[V2beta1PipelineTaskDetail]:
        """The nodes that follow directly."""
        return self.children[key_of(detail.pod_name or detail.task_id)]

    def before(self, detail: V2beta1PipelineTaskDetail) -> Iterator[V2beta1PipelineTaskDetail]:
        """All nodes that came before, the nearest first."""
        found, seen = [detail], set()
        for node in found:
            for parent in self.parents[key_of(node.pod_name or node.task_id)]:
                if id(parent) not in seen:
                    seen.add(id(parent))
                    found.append(parent)
                    yield parent


def key_of(name: str) -> str:
    """What a node's id and its pod's name have in common, of which a server tells now this, now that."""
    return name.rpartition("-")[2]


def step_states(run: V2beta1Run, steps: dict[str, str | None], runs: Sequence[str]) -> list[StepState]:
    """The steps that have begun, in that order.

    Args:
        steps: names, and what the loop that they are in goes over, as in `Package`.
        runs: their names, in the order of the loop.
    """
    nodes = Nodes(task_details(run))
    found = []
    for detail in nodes.details:
        name = detail.display_name or ""
        driver_failed = name.endswith(DRIVER) and detail.state == "FAILED"
        step = name.removesuffix(DRIVER) if driver_failed else name
        if step not in steps:
            continue
        executors = [node for node in nodes.after(detail) if node.display_name == "executor"]
        retries = [node for executor in executors for node in nodes.after(executor)]
        attempts = sorted(
            (node for node in retries if ATTEMPT.fullmatch(node.display_name or "")),
            key=lambda node: int(ATTEMPT.fullmatch(node.display_name)[1]),  # type: ignore[index]
        )
        last = (attempts or executors or [detail])[-1]
        errors = [node.error.message for node in (last, *executors, detail) if node.error]
        found.append(
            StepState(
                step=name,
                name=name + iteration_of(detail, nodes, steps[step], runs),
                state=detail.state or "",
                attempts=len(attempts),
                cached=detail.state == "SUCCEEDED" and {node.state for node in executors} == {"SKIPPED"},
                pod=last.pod_name or "",
                message=errors[0] if errors else "",
                start=detail.start_time or NEVER,
                end=detail.end_time or NEVER,
            )
        )
    return sorted(found, key=lambda state: (state.start, state.name))


def iteration_of(
    detail: V2beta1PipelineTaskDetail, nodes: Nodes, loop: str | None, runs: Sequence[str]
) -> str:
    """` of RUN` or ` of group N`, by a node's iteration; empty in no loop, or where no server tells."""
    for node in nodes.before(detail) if loop else ():
        if iteration := ITERATION.fullmatch(node.display_name or ""):
            index = int(iteration[1])
            if loop == GROUPS:
                return f" of group {index + 1}"
            return f" of {runs[index]}" if index < len(runs) else ""
    return ""


def task_details(run: V2beta1Run) -> list[Any]:
    """Nodes of a run, as far as the server tells."""
    return (run.run_details and run.run_details.task_details) or []


@dataclass
class Failure:
    """Why a run did not succeed: in a line, and whether by a user's mistake, which would be found again."""

    line: str
    mistake: bool


@dataclass
class Watch:
    """Follows runs of `package` over the runs of these names."""

    client: Client
    package: Package
    runs: Sequence[str]

    def states(self, run: V2beta1Run) -> list[StepState]:
        """The run's steps."""
        return step_states(run, self.package.steps, self.runs)

    def follow(self, run_id: str, link: str, deadline: float) -> V2beta1Run:
        """Print each change of state of the run and its steps until the run ends.

        Raises:
            UserError: it has not ended at `deadline`, of `time.monotonic`.
            ApiException, HTTPError: the server refuses, or is away for longer than `patiently` waits.
        """
        known = {}
        while True:
            left = min(OUTAGE_SECONDS, deadline - time.monotonic())
            run = self.client.state_of(run_id, left)
            lines = {state.name: str(state) for state in self.states(run) if state.state in SHOWN}
            if run.state:
                lines["run"] = f"run: {run.state}"
            for name, line in lines.items():
                if known.get(name) != line:
                    known[name] = line
                    print(f"{datetime.now():%H:%M:%S} {line}", flush=True)
            if run.state in ENDED:
                return run
            if time.monotonic() >= deadline:
                raise UserError(f"the run has not ended within --timeout, and goes on: {link}")
            time.sleep(POLL_SECONDS)

    def failure(self, run: V2beta1Run, run_id: str, link: str) -> Failure | None:
        """Why a run that has ended did not succeed: its first failed steps, each with its last line."""
        if run.state == "SUCCEEDED":
            return None
        failed = [state for state in self.states(run) if state.state == "FAILED"]
        failed.sort(key=lambda state: state.end)
        ends = [self.end(run_id, state) for state in failed]
        reasons = [reason for reason, _ in ends[:NAMED]]
        if len(failed) > NAMED:
            reasons.append(f"{len(failed) - NAMED} more failed")
        if not reasons and run.error:
            reasons = [run.error.message]
        if not reasons:  # of what is not ours, the last says most: the first only holds the others
            others = [detail for detail in task_details(run) if detail.state == "FAILED"]
            others.sort(key=lambda detail: detail.end_time or NEVER)
            reasons = [f"{detail.display_name} failed" for detail in others[:1]]
        line = "; ".join(reasons) or "the server names no step that failed"
        return Failure(
            f"the run ended {run.state}: {' '.join(line.split())}; see {link}",
            any(mistake for _, mistake in ends),
        )

    def end(self, run_id: str, state: StepState) -> tuple[str, bool]:
        """Which step failed, with Argo's message and its own last line; whether by a user's mistake."""
        message = f" ({state.message})" if state.message else ""
        last, status = last_words(self.client.log_of(run_id, state.pod)) if state.pod else ("", None)
        refused = state.step == "configure" and bool(ENDED_BY_ITSELF.search(state.message))
        return f"{state.name} failed{message}" + (f": {last}" if last else ""), refused or status == MISTAKE


def last_words(log: str) -> tuple[str, int | None]:
    """The last line of a pod's log that a step printed itself, or ''; and its exit status, if that is told.

    Argo's message has the launcher's exit code, which is 1 whatever the step's was.
    """
    last = ""
    for line in log.splitlines():
        if end := LAUNCHER_GIVES_UP.match(line):
            return last, int(end[1]) if end[1] else None
        if line.strip() and not AROUND.match(line):
            last = line.strip()
    return last, None
