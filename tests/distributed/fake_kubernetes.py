"""A Kubernetes API on loopback, with Kubeflow Trainer v2: refuses what they refuse, and runs a job's nodes.

The account may do what the Role of cluster/train-job-rbac.yaml lets it do. A job's nodes are processes of
this machine (or what `start_node` starts), with the variables that the Trainer's torch runtime sets and no
others than a pod would have.

As seen of the real ones (Trainer 2.3, Kubernetes 1.36): a job that is deleted in the foreground is built
anew; the JobSet of a job that was deleted stays for a while, and a new job of the name takes over its state.
"""

import contextlib
import json
import re
import socket
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from kubernetes.config import kube_config

from dynamic_transformers.launch import kubernetes_api, patience, train_job
from dynamic_transformers.settings import PROJECT_ROOT
from tests.distributed.fake_trainer import NOW, RESERVED, Controllers, LocalNode

RBAC = PROJECT_ROOT / "cluster" / "train-job-rbac.yaml"
NAMESPACE, TOKEN = "team", "a-token"
ROUTE = re.compile(
    r"/(?:api/v1|apis/(?P<group>[^/]+)/v1alpha[12])/namespaces/(?P<namespace>[^/]+)/(?P<resource>[a-z]+)"
    r"(?:/(?P<name>[^/]+))?"
)
DOMAIN_AND_PATH = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9/._~%!$&'()*+,;=:-]+")
WEBHOOK = 'admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request: '


class RefusedError(Exception):
    """An answer other than 200."""

    def __init__(self, code, message):
        self.code, self.message = code, message


@contextlib.contextmanager
def fake_cluster(folder):
    """A cluster with a claim `shared`, which this process's client finds and looks at without a pause."""
    volume = folder / "volume"
    volume.mkdir()
    with pytest.MonkeyPatch.context() as patch, FakeKubernetes(folder, {"shared": volume}) as fake:
        for name in ("KUBERNETES_SERVICE_HOST", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            patch.delenv(name, raising=False)
        patch.setattr(kubernetes_api, "POLL_SECONDS", 0.01)
        patch.setattr(patience, "PAUSE_SECONDS", 0.01)
        patch.setattr(kubernetes_api, "DELETION_SECONDS", 10.0)
        patch.setattr(train_job, "LOOK_SECONDS", 0.01)
        patch.setattr(train_job, "VISIBLE_SECONDS", 5.0)
        path = fake.kubeconfig(folder / "kubeconfig")
        patch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        yield fake


class FakeKubernetes(Controllers):
    """The API.

    Args:
        folder: for what nodes print.
        claims: folders that stand for PersistentVolumeClaims.

    Attributes:
        jobs: by name, as a client sees them.
        pods: by name, with the job's name as their label.
        events: of the namespace, all of them warnings.
        left: of a job that was deleted: how often its JobSet, then its pods, are still seen.
        requests: all that were answered, as (verb, resource).
        rules: of the account's Role.
        on_create: called in a thread with the name of a job that has been created; runs its nodes.
        disturb: called with a job's name as long as its nodes run.
        backoff_limit: how many containers may fail before the job does.
        unknown_fields: of a job, those that this Trainer does not have.
    """

    def __init__(self, folder, claims):
        self.folder, self.claims = folder, claims
        self.jobs, self.pods, self.events, self.nodes = {}, {}, [], []
        self.left = {}
        self.secrets = {}
        self.requests = []
        self.rules = next(yaml.safe_load_all(RBAC.read_text()))["rules"]
        self.away = (0.0, 0.0)
        self.unknown_fields = set()
        self.on_create = self.run_nodes
        self.disturb = lambda name: None
        self.backoff_limit = 6
        self.start_node = LocalNode
        self.threads = []
        self.lock = threading.RLock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def answer(self):
                fake.answer(self)

            do_GET = do_POST = do_DELETE = answer  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.jobs.clear()  # which ends their threads, and these their nodes
        for thread in self.threads:
            thread.join()
        self.server.shutdown()
        self.server.server_close()

    def kubeconfig(self, path):
        """Write the file by which a client finds this server."""
        host = f"http://127.0.0.1:{self.server.server_address[1]}"
        context = {"cluster": "fake", "user": "task", "namespace": NAMESPACE}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": host}}],
            "users": [{"name": "task", "user": {"token": TOKEN}}],
            "contexts": [{"name": "fake", "context": context}],
        }
        path.write_text(yaml.safe_dump(content))
        return path

    def answer(self, handler):
        length = int(handler.headers.get("Content-Length", 0))
        body = json.loads(handler.rfile.read(length)) if length else None
        with self.lock:
            if time.monotonic() < self.away[1]:
                if time.monotonic() > self.away[0]:
                    handler.close_connection = True
                    handler.connection.shutdown(socket.SHUT_RDWR)
                    return
                code, answer = 503, {"message": "away"}
            else:
                try:
                    code, answer = 200, self.respond(handler, body)
                except RefusedError as refused:
                    code, answer = refused.code, {"kind": "Status", "message": refused.message}
            text = json.dumps(answer)
        handler.send_response(code)
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        handler.wfile.write(text.encode())

    def go_away(self, seconds):
        """For half of this, answer by 503, then break all connections."""
        self.away = (time.monotonic() + seconds / 2, time.monotonic() + seconds)

    def respond(self, handler, body):
        address = urlsplit(handler.path)
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        route = ROUTE.fullmatch(address.path)
        if route is None or route["namespace"] != NAMESPACE:
            raise RefusedError(404, f"no such path: {address.path}")
        if handler.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise RefusedError(401, "Unauthorized")
        group = route["group"] or ""
        resource = route["resource"]
        verb = {"GET": "get" if route["name"] else "list", "POST": "create", "DELETE": "delete"}[
            handler.command
        ]
        self.requests.append((verb, resource))
        if not any(
            group in rule["apiGroups"] and resource in rule["resources"] and verb in rule["verbs"]
            for rule in self.rules
        ):
            raise RefusedError(
                403, f'{resource} is forbidden: User "task" cannot {verb} resource "{resource}"'
            )
        if resource == "pods":
            return {"kind": "PodList", "apiVersion": "v1", "items": self.list_pods(query["labelSelector"])}
        if resource == "events":
            assert query["fieldSelector"] == "type=Warning"
            return {"kind": "EventList", "apiVersion": "v1", "items": self.events}
        if resource == "jobsets":
            return self.get_jobset(route["name"])
        if verb == "create":
            return self.create(body, query)
        return getattr(self, verb)(route["name"], query)

    def create(self, job, query):
        """Store a job that the API's schema and the Trainer's webhook accept."""
        name = job["metadata"]["name"]
        known = without(TrainerV1alpha1TrainJob.from_dict(job).to_dict(), self.unknown_fields)
        unknown = [f'unknown field "{path}"' for path in paths_beyond(job, known)]
        if unknown and query.get("fieldValidation") == "Strict":
            said = 'TrainJob in version "v1alpha1" cannot be handled as a TrainJob: strict decoding error: '
            raise RefusedError(400, said + ", ".join(unknown))
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > 63:
            raise RefusedError(422, "metadata.name must match RFC 1035 DNS label format")
        names = [entry["name"] for entry in known["spec"]["trainer"].get("env", [])]
        if set(names) & set(RESERVED):
            raise RefusedError(403, WEBHOOK + "spec.trainer.env: must not have reserved envs")
        for index, patch in enumerate(known["spec"].get("runtimePatches", [])):
            if not DOMAIN_AND_PATH.fullmatch(patch["manager"]):
                said = f'Invalid value: "{patch["manager"]}": must be a domain-prefixed path'
                where = f"spec.runtimePatches[{index}].manager: "
                raise RefusedError(403, f'{WEBHOOK}{where}{said} (such as "acme.io/foo")')
        if name in self.jobs:
            raise RefusedError(409, f'trainjobs "{name}" already exists')
        made = {"creationTimestamp": NOW, "uid": str(uuid.uuid4())}
        self.jobs[name] = known | {"metadata": known["metadata"] | made, "status": {}}
        if self.left.get(name, [0])[0] > 0 or any(pod.startswith(f"{name}-") for pod in self.pods):
            self.status(name, "Failed", "FailedJobs", "taken from the JobSet of the job before")
        else:
            self.start(name)
        return job

    def start(self, name):
        """Let `on_create` have a job that is stored; what it raises fails the job."""

        def run():
            try:
                self.on_create(name)
            except Exception as error:
                self.status(name, "Failed", type(error).__name__, str(error))
                raise

        thread = threading.Thread(target=run)
        self.threads.append(thread)
        thread.start()

    def get(self, name, _query):
        if name not in self.jobs:
            raise RefusedError(404, f'trainjobs "{name}" not found')
        return self.jobs[name]

    def delete(self, name, query):
        if name not in self.jobs:
            raise RefusedError(404, f'trainjobs "{name}" not found')
        if query["propagationPolicy"] == "Foreground":
            self.jobs[name]["metadata"]["deletionTimestamp"] = NOW
            self.start(name)  # and so again and again
        else:
            del self.jobs[name]
            self.left[name] = [4, 2]  # looks: its JobSet, then its pods
        return {}

    def get_jobset(self, name):
        left = self.left.get(name, [0, 0])
        if name not in self.jobs and not left[0]:
            raise RefusedError(404, f'jobsets "{name}" not found')
        left[0] -= 1
        return {"metadata": {"name": name}}

    def list_pods(self, selector):
        key, name = selector.split("=")
        if name in self.left:
            if self.left[name][1]:
                self.left[name][1] -= 1
            else:
                self.remove_pods(name)
        return [pod for pod in self.pods.values() if pod["metadata"]["labels"][key] == name]


def without(value, names):
    """The value without fields of these names, at any depth."""
    if isinstance(value, dict):
        return {key: without(entry, names) for key, entry in value.items() if key not in names}
    return [without(entry, names) for entry in value] if isinstance(value, list) else value


def paths_beyond(given, known, path=""):
    """Where `given` has fields that `known` has not, as Kubernetes writes it."""
    if isinstance(given, dict) and isinstance(known, dict):
        for key in given:
            inner = f"{path}.{key}".lstrip(".")
            yield from paths_beyond(given[key], known[key], inner) if key in known else [inner]
    elif isinstance(given, list) and isinstance(known, list):
        for index, (one, other) in enumerate(zip(given, known, strict=True)):
            yield from paths_beyond(one, other, f"{path}[{index}]")
