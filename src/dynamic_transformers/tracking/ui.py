"""Opens MLflow at the newest comparison: `python -m dynamic_transformers.tracking.ui`.

Where MLFLOW_TRACKING_URI names a server its page is opened, else a server is started for the local store.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser

from dynamic_transformers.command_line import run_command
from dynamic_transformers.settings import TrackingSettings, UserError
from dynamic_transformers.tracking.search import view_of
from dynamic_transformers.tracking.store import local_database, tracking_uri
from dynamic_transformers.tracking.view import full_link

HOST = "127.0.0.1"
OUTPUTS = "outputs"
STARTS = 120  # seconds that a server may take to start, on a busy machine
# Its workers for jobs, eight idle processes, serve GenAI alone.
ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def open_ui(args: argparse.Namespace) -> int | None:
    """Print the link, open it where there is a display, and serve until the server ends.

    Raises:
        UserError: nothing was tracked, the server is away, or the port is taken.
    """
    settings = TrackingSettings()
    uri = tracking_uri(settings, OUTPUTS)
    database = local_database(uri)
    if database and not database.is_file():
        raise UserError(f"{database}: no such file; `make quickstart` tracks runs there")
    link = view_of(settings, OUTPUTS) or "#/experiments"
    if uri.startswith("http"):
        show(full_link(uri, link))
        return None
    address = f"http://{HOST}:{args.port}"
    if answers(address):
        raise UserError(f"port {args.port} is taken: end what listens there, or give another one (PORT=)")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", HOST]
    command += ["--port", str(args.port), "--workers", "1", "--uvicorn-opts", "--log-level warning"]
    server = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=sys.stderr)
    try:
        wait_for(server, address)
        show(full_link(address, link))
        return server.wait()
    finally:
        server.terminate()
        server.wait()


def show(link: str) -> None:
    """Print a link, and open it where there is a display."""
    print(f"all variants in charts: {link}", flush=True)
    if sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")):
        webbrowser.open(link)


def answers(address: str) -> bool:
    """Whether something listens there."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def wait_for(server: subprocess.Popen, address: str) -> None:
    """Wait for a server to answer.

    Raises:
        UserError: it ended, or does not.
    """
    end = time.monotonic() + STARTS
    while not answers(address):
        if server.poll() is not None or time.monotonic() > end:
            raise UserError(f"MLflow does not answer at {address}; its own lines above say why")
        time.sleep(0.3)


def main() -> None:
    """Entry of `python -m dynamic_transformers.tracking.ui`."""
    parser = argparse.ArgumentParser(prog="dynamic_transformers.tracking.ui", description=__doc__)
    parser.add_argument("--port", type=int, default=5000)
    run_command(open_ui, parser)


if __name__ == "__main__":
    sys.exit(main())
