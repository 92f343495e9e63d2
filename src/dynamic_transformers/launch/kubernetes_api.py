"""TrainJobs of Kubeflow Trainer v2, through the Kubernetes API."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException
from urllib3.exceptions import HTTPError

from dynamic_transformers.settings import UserError

logger = logging.getLogger("dynamic_transformers")

GROUP, VERSION = "trainer.kubeflow.org", "v1alpha1"
LIMIT, LATE = "activeDeadlineSeconds", "DeadlineExceeded"
POLL_SECONDS = 10.0
REQUEST_SECONDS = 30.0
OUTAGE_SECONDS = 600.0  # how long the API may be away
DELETION_SECONDS = 600.0  # how long a job's pods may take to end
LAST_LINES = 30
OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class TrainJobs:
    """The TrainJobs of the namespace that this pod, or else kubeconfig's context, is in.

    Raises:
        UserError: neither in a pod nor with a kubeconfig.
    """

    def __init__(self):
        self.namespace = connect()
        self.jobs, self.pods = client.CustomObjectsApi(), client.CoreV1Api()
        self.place = (GROUP, VERSION, self.namespace, "trainjobs")

    def run(self, manifest: dict[str, Any]) -> None:
        """Create a job, or take up the one of its name that runs already, and follow it to its end.

        A job of its name that has ended is deleted before: what it left on the volume is gone on with. But
        one that has used up its time has failed for good, unless the limit is another now.

        Raises:
            UserError: the API refuses something.
            RuntimeError: the job failed or was deleted, or the API has been away too long.
        """
        name = manifest["metadata"]["name"]
        job = self.get(name)
        if job is not None and is_replaced(job, manifest):
            logger.info("TrainJob %s has ended before: it is created again", name)
            self.delete(name)
        self.create(manifest)
        self.follow(name)

    def get(self, name: str) -> dict[str, Any] | None:
        """The job; None: there is none."""
        try:
            return self.request(self.jobs.get_namespaced_custom_object, *self.place, name)
        except ApiException as error:
            if error.status == 404:
                return None
            raise refusal("get", error) from error

    def create(self, manifest: dict[str, Any]) -> None:
        """Create the job, unless there is one of its name."""
        create = self.jobs.create_namespaced_custom_object
        try:
            # Else an API that does not know a field drops it, and the job starts without its claim.
            self.request(create, *self.place, manifest, field_validation="Strict")
        except ApiException as error:
            if error.status != 409:
                raise refusal("create", error) from error

    def delete(self, name: str) -> None:
        """Delete the job, and wait until it and its pods are gone.

        Raises:
            RuntimeError: they stay.
        """
        delete = self.jobs.delete_namespaced_custom_object
        try:
            # Foreground: the job goes after its pods, so that none of them still writes to the run.
            self.request(delete, *self.place, name, propagation_policy="Foreground")
        except ApiException as error:
            if error.status != 404:
                raise refusal("delete", error) from error
        deadline = time.monotonic() + DELETION_SECONDS
        while self.get(name) is not None:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"TrainJob {name} is still there {DELETION_SECONDS:.0f} s after its deletion"
                )
            time.sleep(POLL_SECONDS)

    def follow(self, name: str) -> None:
        """Log every change of the job's state, until it is complete.

        Raises:
            RuntimeError: it failed or was deleted.
        """
        shown = ""
        while True:
            job = self.get(name)
            if job is None:
                raise RuntimeError(f"TrainJob {name} was deleted before it was complete")
            if (state := describe(job)) != shown:
                logger.info("TrainJob %s/%s: %s", self.namespace, name, state)
                shown = state
            if end := outcome(job):
                break
            time.sleep(POLL_SECONDS)
        if end["type"] == "Complete":
            return
        self.log_failed_pods(name)
        reason, message = end["reason"], end["message"]
        if reason == LATE:
            reason += f", timeout_seconds={job['spec'].get(LIMIT)}"
            message += (
                "; a higher one, or the job's deletion, lets the training go on from its last checkpoint"
            )
        raise RuntimeError(f"TrainJob {name} failed ({reason}): {message}")

    def log_failed_pods(self, name: str) -> None:
        """Log the last lines that the failed nodes of a job printed, where they can be had."""
        try:
            selector = f"jobset.sigs.k8s.io/jobset-name={name}"
            pods = self.request(self.pods.list_namespaced_pod, self.namespace, label_selector=selector)
            for pod in pods.items:
                if pod.status.phase != "Failed":
                    continue
                lines = self.request(
                    self.pods.read_namespaced_pod_log,
                    pod.metadata.name,
                    self.namespace,
                    container="node",
                    tail_lines=LAST_LINES,
                )
                logger.info("last lines of %s:\n%s", pod.metadata.name, lines)
        except (ApiException, RuntimeError) as error:
            logger.warning("no logs of the failed nodes: %s", str(error).splitlines()[0])

    def request(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call the API, which may be away for a while.

        Raises:
            ApiException: it refuses.
            RuntimeError: it has been away for too long.
        """
        deadline = time.monotonic() + OUTAGE_SECONDS
        while True:
            try:
                return call(*arguments, _request_timeout=REQUEST_SECONDS, **options)
            except ApiException as error:
                if (error.status or 0) < 500 and error.status != 429:
                    raise
                reason = f"{error.status} {error.reason}"
            except HTTPError as error:
                reason = str(error)
            if time.monotonic() > deadline:
                raise RuntimeError(f"no Kubernetes API for {OUTAGE_SECONDS:.0f} s: {reason}")
            logger.warning("the Kubernetes API is away, trying again: %s", reason)
            time.sleep(POLL_SECONDS)


def connect() -> str:
    """Configure the client from the pod's service account, else from kubeconfig; returns the namespace."""
    try:
        config.load_incluster_config()
        return OWN_NAMESPACE.read_text().strip()
    except ConfigException:
        pass
    try:
        config.load_kube_config()
        _, context = config.list_kube_config_contexts()
    except ConfigException as error:
        raise UserError(f"launch.nodes: no Kubernetes cluster to be found ({error})") from error
    return context["context"].get("namespace", "default")


def outcome(job: dict[str, Any]) -> dict[str, Any] | None:
    """The condition that ended the job, `Complete` or `Failed`; None: it goes on."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return condition
    return None


def is_replaced(job: dict[str, Any], manifest: dict[str, Any]) -> bool:
    """Whether a job that is there makes way for the one of a manifest."""
    if "deletionTimestamp" in job["metadata"]:
        return True
    end = outcome(job)
    if end is None:
        return False
    return end["reason"] != LATE or job["spec"].get(LIMIT) != manifest["spec"].get(LIMIT)


def describe(job: dict[str, Any]) -> str:
    """State of a job in one line."""
    status = job.get("status", {})
    holding = [entry["type"] for entry in status.get("conditions", []) if entry["status"] == "True"]
    parts = [", ".join(holding) or "Created"]
    for child in status.get("jobsStatus", []):
        counts = ("active", "ready", "succeeded", "failed")
        parts.append(f"{child['name']}: " + ", ".join(f"{child[count]} {count}" for count in counts))
    return "; ".join(parts)


def refusal(verb: str, error: ApiException) -> UserError:
    """What to tell a person about a request that the API has refused."""
    try:
        message = json.loads(error.body or "")["message"]
    except (ValueError, KeyError, TypeError):
        message = f"{error.status} {error.reason}"
    text = f"the Kubernetes API refuses to {verb} a TrainJob: {message}"
    if "unknown field" in message:
        text += "; Kubeflow Trainer 2.2 or newer is needed"
    if error.status == 404:
        text += "; is Kubeflow Trainer v2 installed, and is there such a namespace?"
    # Admission webhooks, too, answer 403: then it is the job, not the account.
    if error.status in (401, 403) and "admission webhook" not in message:
        text += "; the task's service account needs the rules of cluster/train-job-rbac.yaml"
    return UserError(" ".join(text.split()))
