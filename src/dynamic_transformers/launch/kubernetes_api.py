"""TrainJobs of Kubeflow Trainer v2, through the Kubernetes API."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException
from urllib3.exceptions import HTTPError

from dynamic_transformers.launch.job_state import describe, holding, is_ready, outcome, why_replaced
from dynamic_transformers.launch.job_watch import JobWatch
from dynamic_transformers.launch.patience import outage, patiently
from dynamic_transformers.settings import UserError

logger = logging.getLogger("dynamic_transformers")

GROUP, VERSION = "trainer.kubeflow.org", "v1alpha1"
POLL_SECONDS = 10.0
REQUEST_SECONDS = 30.0
DELETION_SECONDS = 600.0  # how long a job's pods may take to end
OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
# Fields without which nothing can be trained, and the first Trainer that has them all.
NEEDED_FIELDS, NEEDED_TRAINER = {"runtimePatches", "terminationGracePeriodSeconds"}, "2.3"


class TrainJobs:
    """The TrainJobs of the namespace that this pod, or else kubeconfig's context, is in.

    Raises:
        UserError: neither in a pod nor with a kubeconfig.
    """

    def __init__(self):
        self.namespace = connect()
        self.objects, self.core = client.CustomObjectsApi(), client.CoreV1Api()
        self.place = (GROUP, VERSION, self.namespace, "trainjobs")

    def run(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Create a job, or take up the one of its name that runs already, and follow it to its end.

        A job of this name is deleted first if it has ended: the new one goes on from what it left on the
        volume. A job that has used up its time limit stays as it is, unless the limit has changed. A job
        that still waits for its nodes is deleted if the settings of `launch` have changed.

        Returns:
            The job as it ended, complete or failed.

        Raises:
            UserError: the API refuses something, or a node found a mistake.
            RuntimeError: the job was deleted, or the API has been away too long.
        """
        name = manifest["metadata"]["name"]
        job = self.get(name)
        if job is None:
            self.create(manifest)
        elif why := why_replaced(job, manifest):
            logger.info("TrainJob %s %s: it is created again", name, why)
            self.delete(name)
            self.create(manifest)
        else:
            logger.info("TrainJob %s is there already: this task follows it", name)
        return self.follow(name)

    def get(self, name: str) -> dict[str, Any] | None:
        """The job; None: there is none."""
        return self._get("a TrainJob", *self.place, name)

    def create(self, manifest: dict[str, Any]) -> None:
        """Create the job, unless there is one of its name."""
        create = self.objects.create_namespaced_custom_object
        try:
            # Else an API that does not know a field drops it, and the job starts without its claim.
            self.request(create, *self.place, manifest, field_validation="Strict")
        except ApiException as error:
            if error.status != 409:
                raise refusal("create a TrainJob", error) from error

    def delete(self, name: str) -> None:
        """Delete the job, and wait until nothing is left that could write to its run, or answer for it.

        Raises:
            RuntimeError: its pods stay.
        """
        delete = self.objects.delete_namespaced_custom_object
        try:
            # In the background: a Trainer builds a job anew as long as it is still there.
            self.request(delete, *self.place, name, propagation_policy="Background")
        except ApiException as error:
            if error.status != 404:
                raise refusal("delete a TrainJob", error) from error
        deadline = time.monotonic() + DELETION_SECONDS
        while left := self._left_of(name):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{left} is still there {DELETION_SECONDS:.0f} s after its deletion")
            time.sleep(POLL_SECONDS)

    def _left_of(self, name: str) -> str:
        """What is left of a job; the Trainer takes the state of an old JobSet for that of a new job."""
        if self.get(name) is not None:
            return f"TrainJob {name}"
        place = ("jobset.x-k8s.io", "v1alpha2", self.namespace, "jobsets")
        if self._get("a JobSet", *place, name) is not None:
            return f"JobSet {name}"
        return ", ".join(f"pod {pod.metadata.name}" for pod in self.pods(name))

    def follow(self, name: str) -> dict[str, Any]:
        """Log every change of the job's state, restarts, and what it waits for; returns it as it ended.

        A job whose nodes find a mistake of the user's is deleted: they would find it at each restart.

        Raises:
            UserError: that mistake.
            RuntimeError: it was deleted.
        """
        shown, watch = "", None
        while True:
            job = self.get(name)
            if job is None:
                raise RuntimeError(f"TrainJob {name} was deleted before it was complete")
            if (state := describe(job)) != shown:
                logger.info("TrainJob %s/%s: %s", self.namespace, name, state)
                shown = state
            watch = watch or JobWatch(job)
            if not holding(job, "Complete") and (mistake := watch.mistake()):
                self.delete(name)
                raise UserError(mistake)
            if outcome(job):
                watch.end(job)
                return job
            self._look(watch, job)
            time.sleep(POLL_SECONDS)

    def _look(self, watch: JobWatch, job: dict[str, Any]) -> None:
        """Let a watch see pods and events, where the account may read them."""
        try:
            pods = self.pods(job["metadata"]["name"])
            watch.restarts(pods)
            if is_ready(job):
                watch.ready()
            elif watch.is_late():
                watch.explain(
                    job, pods, self._list(self.core.list_namespaced_event, field_selector="type=Warning")
                )
        except UserError as error:
            watch.blind(str(error))

    def pods(self, name: str) -> list[Any]:
        """The pods of a job."""
        return self._list(
            self.core.list_namespaced_pod, label_selector=f"jobset.sigs.k8s.io/jobset-name={name}"
        )

    def _list(self, call: Callable[..., Any], **options: Any) -> list[Any]:
        try:
            return self.request(call, self.namespace, **options).items
        except ApiException as error:
            what = call.__name__.removeprefix("list_namespaced_")
            raise refusal(f"list {what}s", error) from error

    def _get(self, what: str, *place: str) -> dict[str, Any] | None:
        try:
            return self.request(self.objects.get_namespaced_custom_object, *place)
        except ApiException as error:
            if error.status == 404:
                return None
            raise refusal(f"get {what}", error) from error

    def request(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call the API, which may be away for a while.

        Raises:
            ApiException: it refuses.
            RuntimeError: it has been away for too long.
        """

        def away(reason: str) -> None:
            logger.warning("the Kubernetes API is away, trying again: %s", reason)

        try:
            return patiently(lambda: call(*arguments, _request_timeout=REQUEST_SECONDS, **options), away)
        except (ApiException, HTTPError) as error:
            if reason := outage(error):
                raise RuntimeError(f"the Kubernetes API is still away: {reason}") from error
            raise


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


def refusal(what: str, error: ApiException) -> UserError:
    """What to tell a person about a request that the API has refused."""
    try:
        message = json.loads(error.body or "")["message"]
    except (ValueError, KeyError, TypeError):
        message = f"{error.status} {error.reason}"
    text = f"the Kubernetes API refuses to {what}: {message}"
    unknown = {path.split(".")[-1] for path in re.findall(r'unknown field "([^"]*)"', message)}
    if unknown & NEEDED_FIELDS:
        text += f"; Kubeflow Trainer {NEEDED_TRAINER} or newer is needed"
    if error.status == 404:
        text += "; is Kubeflow Trainer v2 installed, and is there such a namespace?"
    # Admission webhooks, too, answer 403: then it is the job, not the account.
    if error.status in (401, 403) and "admission webhook" not in message:
        text += "; the task's service account needs the rules of cluster/train-job-rbac.yaml"
    return UserError(" ".join(text.split()))
