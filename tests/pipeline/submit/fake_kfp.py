"""A loopback server of the part of Kubeflow Pipelines' REST API (v2beta1) that a submission uses.

It keeps what it gets, checks uploads and parameters as the real one does, and plays the states of runs that a
test gives it.
"""

import json
import random
import re
import ssl
import threading
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit
from zlib import crc32

import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

JSON_TYPES = {
    "STRING": str,
    "LIST": list,
    "STRUCT": dict,
    "BOOLEAN": bool,
    "NUMBER_INTEGER": (int, float),
    "NUMBER_DOUBLE": (int, float),
}


class RefusedError(Exception):
    def __init__(self, status, code, message):
        self.status, self.code, self.message = status, code, message


def invalid(message):
    return RefusedError(400, 3, f"Invalid input error: {message}")


@dataclass
class Step:
    """How a step stands: Argo's phase, as KFP calls it, and what else its nodes tell."""

    state: str
    message: str = ""  # of its last attempt
    end: str = ""
    attempts: int = 0  # 0: it is not retried, and has no `executor(0)`
    cached: bool = False
    driver: str = "SUCCEEDED"


WORKFLOW = "small-comparison-x7k2p"
EPOCH = datetime(2026, 9, 1, 10, tzinfo=UTC)


def pod_of(*path):
    """The pod's name of a node, `pod_of("train", 0, "executor(1)")`; its id ends with the same number."""
    return f"{WORKFLOW}-system-container-impl-{crc32(repr(path).encode())}"


def state(run_state, error=None, **steps):
    """What `GET runs/{id}` tells at a time of a pipeline: configure, (train → export) in a loop, compare.

    `configure="SUCCEEDED"`, `train_1=Step("FAILED")` for the second iteration; steps of the loop in their
    order, which may have other names. The details are Argo's nodes, as KFP 2.17 gives them: in no order, with
    a driver before each step, graphs as nodes of their own, children by their node's id while each node gives
    its pod's name.
    """
    details, held = [], "RUNNING" if run_state in ("PENDING", "RUNNING") else run_state
    steps = {name: Step(step) if isinstance(step, str) else step for name, step in steps.items()}

    def node(path, name, phase, after, message="", end=""):
        detail = {
            "run_id": "r", "task_id": str(uuid.uuid4()), "display_name": name, "state": phase,
            "pod_name": pod_of(*path) if path else WORKFLOW, "child_tasks": [],
            "start_time": (EPOCH + timedelta(seconds=len(details))).isoformat(),
        }  # fmt: skip
        detail |= {"end_time": end} if end else {}
        detail |= {"error": {"code": 13, "message": message}} if message else {}
        for parent in after:
            number = detail["pod_name"].rpartition("-")[2]
            parent["child_tasks"].append({"pod_name": f"{WORKFLOW}-{number}"})
        details.append(detail)
        return detail

    def task(name, index, step, after):
        path = (name,) if index is None else (name, index)
        driver = node((*path, "driver"), f"{name}-driver", step.driver, after)
        if step.driver != "SUCCEEDED":
            return [node(path, name, "OMITTED", [driver])]
        graph = node(path, name, step.state, [driver], end=step.end)
        executor = node(
            (*path, "executor"),
            "executor",
            "SKIPPED" if step.cached else step.state,
            [graph],
            message="No more retries left" if step.message and step.attempts else step.message,
        )
        last = [executor]
        for attempt in range(step.attempts):
            now = step.state if attempt == step.attempts - 1 else "FAILED"
            message = "main: Error (exit code 1)" if now == "FAILED" else ""
            name_of_it = f"executor({attempt})"
            last = [node((*path, name_of_it), name_of_it, now, [executor], message)]
        return last

    top = node((), WORKFLOW, held, [])
    root = node(("root",), "root", held, [node(("root-driver",), "root-driver", "SUCCEEDED", [top])])
    after = [root]
    if configure := steps.pop("configure", None):
        after = task("configure", None, configure, after)
    compare = steps.pop("compare", None)
    if steps:
        loop = node(("loop",), "for-loop-1", held, after)
        driver = node(("loop", "driver"), "iteration-driver", "SUCCEEDED", [loop])
        group = node(("loop", "group"), "iteration-iterations", held, [driver])
        after = []
        for index in sorted({int(name.rpartition("_")[2]) for name in steps}):
            item = node(("loop", index), f"iteration-iterations({index}:{index})", held, [group])
            item = node(("item-driver", index), "iteration-item-driver", "SUCCEEDED", [item])
            last = [node(("item", index), "iteration-item", held, [item])]
            for name in dict.fromkeys(name.rpartition("_")[0] for name in steps):
                if f"{name}_{index}" in steps:
                    last = task(name, index, steps[f"{name}_{index}"], last)
            after += last
    if compare:
        task("compare", None, compare, after)
    random.Random(0).shuffle(details)
    run = {"state": run_state, "run_details": {"task_details": details}}
    return run | ({"error": {"code": 13, "message": error}} if error else {})


class FakeKfp:
    def __init__(self, token=None):
        self.token, self.multi_user = token, False
        self.requests, self.experiments, self.pipelines, self.versions, self.runs = [], [], [], [], []
        self.states = [state("PENDING")]  # one for each time that a run is asked for; the last one stays
        self.outages = 0  # so many requests for a run are answered by `outage` first
        self.outage = 503
        self.starts = []  # of the next requests to begin a run: a status, or "lost": it begins, unanswered
        self.hang_ups = 0  # so many are not answered at all
        self.logs = {}  # by pod; the server tells others that the pod is gone
        self.on_poll = lambda: None
        self.url = ""

    def answer(self, method, path, query, body, authorization):
        self.requests.append(f"{method} {path}")
        if self.token and authorization != f"Bearer {self.token}":
            raise RefusedError(401, 16, f"Request header error: {authorization} is not valid")
        if log := re.fullmatch(r"/apis/v1alpha1/runs/([^/]+)/nodes/([^/]+)/log", path):
            return self.read_log(*log.groups())
        *parents, last = path.removeprefix("/apis/v2beta1/").split("/")
        match method, parents, last:
            case "GET", [], "healthz":
                return {"commit_sha": "0" * 40, "tag_name": "2.17.0", "multi_user": self.multi_user}
            case "GET", [], "experiments":
                return {"experiments": self.select(self.experiments, query)}
            case "POST", [], "experiments":
                return self.add(self.experiments, "experiment_id", json.loads(body))
            case "GET", [], "pipelines":
                return {"pipelines": self.select(self.pipelines, query)}
            case "POST", ["pipelines"], "upload":
                return self.upload_pipeline(query, body)
            case "POST", ["pipelines"], "upload_version":
                return self.upload_version(query["pipelineid"], query, body)
            case "GET", ["pipelines", pipeline_id], "versions":
                versions = [version for version in self.versions if version["pipeline_id"] == pipeline_id]
                return {"pipeline_versions": self.select(versions, query)}
            case "GET", [], "runs":
                return {"runs": self.select(self.runs, query)}
            case "POST", [], "runs":
                return self.create_run(json.loads(body))
            case "GET", ["runs"], run_id:
                return self.get_run(run_id)
        raise RefusedError(404, 5, "Not Found")

    def select(self, things, query):
        wanted = {"namespace": query["namespace"]} if query.get("namespace") and self.multi_user else {}
        for predicate in json.loads(query.get("filter", "{}")).get("predicates", []):
            if predicate["operation"] not in (1, "EQUALS"):
                raise invalid(f"unsupported operation {predicate['operation']}")
            wanted[predicate["key"]] = predicate["stringValue"]
        return [thing for thing in things if wanted.items() <= thing.items()]

    def add(self, things, key, fields):
        fields = {name: fields[name] for name in fields if name != "namespace" or self.multi_user}
        thing = {key: str(uuid.uuid4()), "created_at": "2026-09-01T10:00:00Z", **fields}
        things.append(thing)
        return thing

    def upload_pipeline(self, query, body):
        spec = pipeline_spec(body)
        named = {name: query[name] for name in ("description", "namespace") if name in query}
        pipeline = self.add(self.pipelines, "pipeline_id", {"display_name": query["name"], **named})
        fields = {"display_name": query["name"], "description": query.get("description", "")}
        self.add_version(pipeline["pipeline_id"], fields, spec)
        return pipeline

    def upload_version(self, pipeline_id, query, body):
        if any(version["display_name"] == query["name"] for version in self.versions):
            raise RefusedError(409, 6, "Failed to create a pipeline version")
        return self.add_version(pipeline_id, {"display_name": query["name"]}, pipeline_spec(body))

    def add_version(self, pipeline_id, fields, spec):
        fields = {"pipeline_id": pipeline_id, "pipeline_spec": spec, **fields}
        return self.add(self.versions, "pipeline_version_id", fields)

    def create_run(self, run):
        reference = run["pipeline_version_reference"].items()
        (version,) = [version for version in self.versions if reference <= version.items()]
        spec = version["pipeline_spec"]
        check_parameters(spec.get("pipeline_spec", spec), run["runtime_config"]["parameters"])
        start = self.starts.pop(0) if self.starts else None
        if start not in (None, "lost"):
            raise RefusedError(start, 14, "upstream connect error")
        begun = self.add(self.runs, "run_id", run)
        return None if start == "lost" else begun

    def get_run(self, run_id):
        (run,) = [run for run in self.runs if run["run_id"] == run_id]
        if self.outages:
            self.outages -= 1
            raise RefusedError(self.outage, 14, "upstream connect error")
        if self.hang_ups:
            self.hang_ups -= 1
            return None
        now = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        self.on_poll()
        return run | now

    def read_log(self, run_id, pod):
        if not any(run["run_id"] == run_id for run in self.runs) or pod not in self.logs:
            raise RefusedError(500, 13, f"error in opening log stream: pods {pod} not found")
        return self.logs[pod]


def pipeline_spec(body):
    """An uploaded package as the server gives it back; refused when it is no pipeline."""
    try:
        spec, *more = yaml.safe_load_all(body)
        json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
        for platforms in more:
            json_format.ParseDict(platforms, pipeline_spec_pb2.PlatformSpec())
    except (yaml.YAMLError, json_format.ParseError) as error:
        raise invalid(f"invalid v2 pipeline spec: {error}") from error
    return {"pipeline_spec": spec, "platform_spec": more[0]} if more else spec


def check_parameters(spec, parameters):
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    for name in parameters.keys() - inputs.keys():
        raise invalid(f"parameter {name} is not an input of the pipeline")
    for name, definition in inputs.items():
        if name not in parameters:
            if not definition.get("isOptional") and "defaultValue" not in definition:
                raise invalid(f"parameter {name} is not optional, yet has neither default nor value")
        elif not isinstance(parameters[name], JSON_TYPES[definition["parameterType"]]):
            raise invalid(f"input parameter {name} requires type {definition['parameterType']}")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: two cost 40 ms each time

    def do_GET(self):
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        uploaded = "multipart" in self.headers.get("Content-Type", "")
        if uploaded:
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            (file,) = BytesParser().parsebytes(head + body).get_payload()
            assert re.search('name="uploadfile"', file["Content-Disposition"])
            body = file.get_payload(decode=True)
        query = dict(parse_qsl(url.query))
        try:
            answer = self.server.fake.answer(
                self.command, url.path, query, body, self.headers.get("Authorization")
            )
            if answer is None:
                self.close_connection = True
            else:
                self.send(200, answer)
        except RefusedError as error:
            told = {"error_message": error.message, "error_details": error.message}
            gateway = {"code": error.code, "message": error.message, "details": []}
            self.send(error.status, told if uploaded else gateway)

    do_POST = do_GET  # noqa: N815

    def send(self, status, answer):
        if isinstance(answer, str):
            self.send_text(status, "text/plain", answer)
        else:
            self.send_text(status, "application/json", json.dumps(answer))

    def send_text(self, status, content_type, text):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(handler, certificate=None):
    """A server on a free port of the loopback, its URL in `url`; https with `certificate`, a PEM file."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.url = f"http{'s' if certificate else ''}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def fake_kfp(token=None, certificate=None):
    with serving(Handler, certificate) as server:
        server.fake = FakeKfp(token)
        server.fake.url = server.url
        yield server.fake
