"""A Kubernetes API on loopback, with Kubeflow Trainer v2: refuses what they refuse, and runs a job's nodes.

The account may do what the Role of cluster/train-job-rbac.yaml lets it do. A job's nodes are processes of
this machine (or what `start_node` starts), with the variables that the Trainer's torch runtime sets and no
others than a pod would have.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psutil
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from kubernetes.config import kube_config

from dynamic_transformers.launch import kubernetes_api, train_job
from dynamic_transformers.settings import PROJECT_ROOT

RBAC = PROJECT_ROOT / "cluster" / "train-job-rbac.yaml"
NAMESPACE, TOKEN = "team", "a-token"
GROUP = "trainer.kubeflow.org"
ROUTE = re.compile(
    r"/(?:api/v1|apis/(?P<group>[^/]+)/v1alpha1)/namespaces/(?P<namespace>[^/]+)/(?P<resource>[a-z]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<part>log))?"
)
RESERVED = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")


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
        patch.setattr(train_job, "LOOK_SECONDS", 0.01)
        path = fake.kubeconfig(folder / "kubeconfig")
        patch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        yield fake


class LocalNode:
    """A node of a job as a process of this machine."""

    @staticmethod
    def address(name):
        return "127.0.0.1"

    def __init__(self, name, container, environment, log):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*container["command"], *container["args"]],
                env={"PATH": path, "HOME": str(log.parent)} | environment,
                cwd=log.parent,
                stdout=output,
                stderr=output,
            )
        self.log = log

    def poll(self):
        return self.process.poll()

    def output(self):
        return self.log.read_text()

    def stop(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self.process.pid)
            for process in [agent, *agent.children(recursive=True)]:  # torchrun's workers are no group of its
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


class FakeKubernetes:
    """The API.

    Args:
        folder: for what nodes print.
        claims: folders that stand for PersistentVolumeClaims.

    Attributes:
        jobs: by name, as a client sees them.
        requests: all that were answered, as (verb, resource).
        rules: of the account's Role.
        outages: this many requests are answered by 503, and the last eight of them not at all.
        on_create: called in a thread with the name of a job that has been created; runs its nodes.
        unknown_fields: of a job's `spec`, those that this Trainer does not have.
    """

    def __init__(self, folder, claims):
        self.folder, self.claims = folder, claims
        self.jobs, self.pods, self.logs, self.nodes = {}, [], {}, []
        self.secrets = {}
        self.requests = []
        self.rules = next(yaml.safe_load_all(RBAC.read_text()))["rules"]
        self.outages = 0
        self.unknown_fields = set()
        self.on_create = self.run_nodes
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
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        for node in self.nodes:
            node.stop()
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
            if self.outages:
                self.outages -= 1
                if self.outages < 8:
                    handler.close_connection = True
                    handler.connection.shutdown(socket.SHUT_RDWR)
                    return
                code, answer = 503, {"message": "away"}
            else:
                try:
                    code, answer = 200, self.respond(handler, body)
                except RefusedError as refused:
                    code, answer = refused.code, {"kind": "Status", "message": refused.message}
        text = answer if isinstance(answer, str) else json.dumps(answer)
        handler.send_response(code)
        handler.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        handler.end_headers()
        handler.wfile.write(text.encode())

    def respond(self, handler, body):
        address = urlsplit(handler.path)
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        route = ROUTE.fullmatch(address.path)
        if route is None or route["namespace"] != NAMESPACE:
            raise RefusedError(404, f"no such path: {address.path}")
        if handler.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise RefusedError(401, "Unauthorized")
        group = route["group"] or ""
        resource = route["resource"] + (f"/{route['part']}" if route["part"] else "")
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
            name = query["labelSelector"].removeprefix("jobset.sigs.k8s.io/jobset-name=")
            found = [pod for pod in self.pods if pod["metadata"]["name"].startswith(f"{name}-")]
            return {"kind": "PodList", "apiVersion": "v1", "items": found}
        if resource == "pods/log":
            assert query["container"] == "node"
            return "\n".join(self.logs[route["name"]].splitlines()[-int(query["tailLines"]) :])
        if verb == "create":
            return self.create(body, query)
        return getattr(self, verb)(route["name"], query)

    def create(self, job, query):
        """Store a job that the API's schema and the Trainer's webhook accept."""
        name = job["metadata"]["name"]
        unknown = [f'unknown field "spec.{field}"' for field in job["spec"] if field in self.unknown_fields]
        if unknown and query.get("fieldValidation") == "Strict":
            raise RefusedError(
                400,
                'TrainJob in version "v1alpha1" cannot be handled as a TrainJob: '
                f"strict decoding error: {', '.join(unknown)}",
            )
        spec = {key: value for key, value in job["spec"].items() if key not in self.unknown_fields}
        job = job | {"spec": spec}
        if TrainerV1alpha1TrainJob.from_dict(job).to_dict() != job:
            raise RefusedError(400, "strict decoding error: unknown field")
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > 63:
            raise RefusedError(422, "metadata.name must match RFC 1035 DNS label format")
        names = [entry["name"] for entry in job["spec"]["trainer"].get("env", [])]
        if set(names) & set(RESERVED):
            said = 'admission webhook "validator.trainjob" denied the request: must not have reserved envs'
            raise RefusedError(403, said)
        if name in self.jobs:
            raise RefusedError(409, f'trainjobs "{name}" already exists')
        self.jobs[name] = job | {"status": {}}
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
        job = self.jobs[name]
        if "deletionTimestamp" in job["metadata"]:  # its pods end
            job["looks"] -= 1
            if not job["looks"]:
                del self.jobs[name]
        return job

    def delete(self, name, query):
        if name not in self.jobs:
            raise RefusedError(404, f'trainjobs "{name}" not found')
        if query.get("propagationPolicy") != "Foreground":
            raise RefusedError(422, "its pods would go on")  # which a real API does not mind
        self.jobs[name]["metadata"] |= {"deletionTimestamp": "2026-01-01T00:00:00Z"}
        self.jobs[name] |= {"looks": 3}
        return {}

    def status(self, name, condition="", reason="", message="", active=0, failed=0, succeeded=0):
        """Say how a job does."""
        counts = {"active": active, "ready": active, "failed": failed, "succeeded": succeeded, "suspended": 0}
        status = {"jobsStatus": [{"name": "node", **counts}]}
        if condition:
            entry = {"type": condition, "status": "True", "reason": reason, "message": message}
            status["conditions"] = [
                {"type": "Suspended", "status": "False", "reason": "Resumed", "message": ""},
                entry,
            ]
        with self.lock:
            self.jobs[name]["status"] = status

    def run_nodes(self, name, stop=lambda: False):
        """Run a job's nodes to their end, or until `stop`, which is the loss of its last node."""
        trainer = self.jobs[name]["spec"]["trainer"]
        (patch,) = self.jobs[name]["spec"]["runtimePatches"]
        (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        pod = replicated["template"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert replicated["name"] == container["name"] == "node"
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        (claim,) = [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
        # A node finds the volume where it is mounted, and here nothing is mounted anywhere.
        assert mounts[claim["name"]] == str(self.claims[claim["persistentVolumeClaim"]["claimName"]])
        environment = {}
        for entry in trainer.get("env", []):
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            value = self.secrets[reference["name"]][reference["key"]] if reference else entry["value"]
            environment[entry["name"]] = value
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        nodes = []
        for rank in range(trainer["numNodes"]):
            values = (
                trainer["numNodes"],
                trainer["numProcPerNode"],
                rank,
                self.start_node.address(f"{name}-node-0-0"),
                port,
            )
            torch = dict(zip(RESERVED, map(str, values), strict=True))
            node_name = f"{name}-node-0-{rank}"
            log = self.folder / f"{node_name}-{len(self.nodes)}.log"
            nodes.append(self.start_node(node_name, trainer, environment | torch, log))
            self.nodes.append(nodes[-1])
        self.status(name, active=1)
        while None in (codes := [node.poll() for node in nodes]) and not any(codes):
            if stop():
                nodes[-1].stop()
            time.sleep(0.02)
        for node in nodes:
            node.stop()
        codes = [node.poll() for node in nodes]
        if not any(codes):
            return self.status(name, "Complete", "AllJobsCompleted", "jobset completed", succeeded=1)
        for rank, (node, code) in enumerate(zip(nodes, codes, strict=True)):
            if code:
                self.fail_pod(f"{name}-node-0-{rank}", node.output())
        return self.status(name, "Failed", "FailedJobs", f"jobset failed due to {name}-node-0", failed=1)

    def fail_pod(self, name, log):
        """A failed pod and what it printed."""
        with self.lock:
            self.logs[name] = log
            self.pods.append(
                {"metadata": {"name": name}, "spec": {"containers": []}, "status": {"phase": "Failed"}}
            )
