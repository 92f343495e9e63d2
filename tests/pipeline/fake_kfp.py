"""A loopback server of the part of Kubeflow Pipelines' REST API (v2beta1) that a submission uses.

It keeps what it gets, checks uploads and parameters as the real one does, and plays the states of runs that a
test gives it.
"""

import json
import re
import ssl
import threading
import uuid
from contextlib import contextmanager
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

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


def state(run_state, error=None, **tasks):
    """What `GET runs/{id}` tells at a time; tasks are `name="STATE"` or `name=("STATE", error, end time)`."""
    details = []
    for name, task in tasks.items():
        task_state, message, end_time = (task, None, None) if isinstance(task, str) else task
        detail = {"task_id": f"id-of-{name}", "display_name": name, "state": task_state}
        detail |= {"error": {"code": 13, "message": message}} if message else {}
        details.append(detail | ({"end_time": end_time} if end_time else {}))
    run = {"state": run_state, "run_details": {"task_details": details}}
    return run | ({"error": {"code": 13, "message": error}} if error else {})


class FakeKfp:
    def __init__(self, token=None):
        self.token = token
        self.requests, self.experiments, self.pipelines, self.versions, self.runs = [], [], [], [], []
        self.states = [state("PENDING")]  # one for each time that a run is asked for; the last one stays
        self.outages = 0  # so many requests for a run are answered by 503 first
        self.hang_ups = 0  # so many are not answered at all
        self.on_poll = lambda: None
        self.url = ""

    def answer(self, method, path, query, body, authorization):
        self.requests.append(f"{method} {path}")
        if self.token and authorization != f"Bearer {self.token}":
            raise RefusedError(401, 16, f"Request header error: {authorization} is not valid")
        *parents, last = path.removeprefix("/apis/v2beta1/").split("/")
        match method, parents, last:
            case "GET", [], "healthz":
                return {"commit_sha": "0" * 40, "tag_name": "2.17.0", "multi_user": False}
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
            case "POST", [], "runs":
                return self.create_run(json.loads(body))
            case "GET", ["runs"], run_id:
                return self.get_run(run_id)
        raise RefusedError(404, 5, "Not Found")

    def select(self, things, query):
        wanted = {"namespace": query["namespace"]} if query.get("namespace") else {}
        for predicate in json.loads(query.get("filter", "{}")).get("predicates", []):
            if predicate["operation"] not in (1, "EQUALS"):
                raise invalid(f"unsupported operation {predicate['operation']}")
            wanted[predicate["key"]] = predicate["stringValue"]
        return [thing for thing in things if wanted.items() <= thing.items()]

    def add(self, things, key, fields):
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
        return self.add(self.runs, "run_id", run)

    def get_run(self, run_id):
        (run,) = [run for run in self.runs if run["run_id"] == run_id]
        if self.outages:
            self.outages -= 1
            raise RefusedError(503, 14, "upstream connect error")
        if self.hang_ups:
            self.hang_ups -= 1
            return None
        now = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        self.on_poll()
        return run | now


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
