"""Servers that a client meets: one that takes its time, one that never answers, one of another kind."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


class SlowServer(BaseHTTPRequestHandler):
    """The one run of an MLflow server that takes its time to store and to fetch some files."""

    slow = "artifacts/model"
    seconds = 2
    stored: ClassVar[list[str]] = []  # what it was asked to store

    def answer(self):
        length = int(self.headers["Content-Length"] or 0)
        self.rfile.read(length)
        if self.command == "PUT":
            self.stored.append(self.path.rpartition("/")[2])
        if self.slow in self.path:
            time.sleep(self.seconds)
        run_id = f"at-{self.server.server_port}"  # MLflow's client remembers the server of a run's artifacts
        info = {
            "run_id": run_id,
            "experiment_id": "1",
            "artifact_uri": f"mlflow-artifacts:/1/{run_id}/artifacts",
            "lifecycle_stage": "active",
        }
        experiment = {"experiment_id": "1", "lifecycle_stage": "active"}
        answer = {"experiment": experiment, "run": {"info": info}, "run_info": info}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_GET = do_POST = do_PUT = answer  # noqa: N815 (names of http.server)

    def log_message(self, *_):
        pass


def answering(status, body):
    """A server that answers everything alike."""

    class Server(SlowServer):
        def answer(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer  # noqa: N815

    return Server


@contextmanager
def serving(handler):
    """Address of a server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@contextmanager
def hanging():
    """Address of a server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield f"127.0.0.1:{server.getsockname()[1]}"


def closed_port():
    """Address at which nothing answers."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{closed.getsockname()[1]}"
