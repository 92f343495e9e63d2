"""What the objects of a TrainJob say: the job is a dictionary, pods and events are models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LIMIT, LATE = "activeDeadlineSeconds", "DeadlineExceeded"
OF_LAUNCH = "dynamic-transformers.github.io/launch"  # annotation: digest of the settings that made a job
OF_LOGS = "dynamic-transformers.github.io/logs"  # annotation: where its nodes write what they print
STARTING = ("ContainerCreating", "PodInitializing")


def outcome(job: dict[str, Any]) -> dict[str, Any] | None:
    """The condition that ended the job, `Complete` or `Failed`; None: it goes on."""
    for kind in ("Complete", "Failed"):
        if condition := holding(job, kind):
            return condition
    return None


def holding(job: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """The job's condition of a kind, if it holds."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] == kind and condition["status"] == "True":
            return condition
    return None


def describe(job: dict[str, Any]) -> str:
    """State of a job in one line."""
    status = job.get("status", {})
    kinds = [entry["type"] for entry in status.get("conditions", []) if entry["status"] == "True"]
    parts = [", ".join(kinds) or "Created"]
    for child in status.get("jobsStatus", []):
        counts = ("active", "ready", "succeeded", "failed")
        parts.append(f"{child['name']}: " + ", ".join(f"{child[count]} {count}" for count in counts))
    return "; ".join(parts)


def is_ready(job: dict[str, Any]) -> bool:
    """Whether all its nodes run, or it is not to have any now."""
    children = job.get("status", {}).get("jobsStatus", [])
    return bool(holding(job, "Suspended")) or any(child["ready"] or child["succeeded"] for child in children)


def why_replaced(job: dict[str, Any], manifest: dict[str, Any]) -> str:
    """Why a job that is there makes way for the one of a manifest; '': it does not."""
    if "deletionTimestamp" in job["metadata"]:
        return "is being deleted"
    end = outcome(job)
    if end is not None:
        used_up = end.get("reason") == LATE and job["spec"].get(LIMIT) == manifest["spec"].get(LIMIT)
        return "" if used_up else "has ended before"
    made_of, wanted = (entry["metadata"].get("annotations", {}).get(OF_LAUNCH) for entry in (job, manifest))
    if made_of != wanted and not is_ready(job):
        return "waits for its nodes with other settings than these"
    return ""


def why_failed(job: dict[str, Any]) -> str:
    """What a job that has failed says of it, in one line."""
    end = holding(job, "Failed") or {}
    reason, message = end.get("reason", "no reason"), end.get("message", "no message")
    if reason == LATE:
        reason += f", timeout_seconds={job['spec'].get(LIMIT)}"
        message += "; a higher one, or the job's deletion, lets the training go on from its last checkpoint"
    return f"TrainJob {job['metadata']['name']} failed ({reason}): {message}"


def containers(pod: Any) -> list[Any]:
    """States of a pod's containers."""
    return [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]


def obstacles(job: dict[str, Any], pods: Iterable[Any], events: Iterable[Any]) -> dict[str, str]:
    """What keeps nodes from running: a line for each reason, by pods' states, else by the newest warning.

    Args:
        events: warnings of the job's namespace.
    """
    found: dict[str, str] = {}
    for pod in pods:
        waiting = [state.state.waiting for state in containers(pod) if state.state and state.state.waiting]
        missing = [entry for entry in pod.status.conditions or [] if entry.type == "PodScheduled"]
        for state in [*waiting, *(entry for entry in missing if entry.status == "False")]:
            if state.reason and state.reason not in STARTING:
                found[state.reason] = one_line(f"pod {pod.metadata.name}: {state.reason}: {state.message}")
    if found:
        return found
    name, since = job["metadata"]["name"], job["metadata"].get("creationTimestamp", "")
    own = [
        (time, event)
        for event in events
        if (event.involved_object.name or "").startswith((f"{name}-", f"{name}."))
        or event.involved_object.name == name
        if (time := event_time(event)) >= since
    ]
    if own:
        _, event = max(own, key=lambda entry: entry[0])
        where = f"{event.involved_object.kind} {event.involved_object.name}"
        found[event.reason] = one_line(f"{where}: {event.reason}: {event.message}")
    return found


def event_time(event: Any) -> str:
    """When an event was last seen, as Kubernetes writes times."""
    series = event.series and event.series.last_observed_time
    time = series or event.last_timestamp or event.event_time or event.metadata.creation_timestamp
    return time.strftime("%Y-%m-%dT%H:%M:%SZ") if time else ""


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.split())
