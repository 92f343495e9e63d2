# pyright: reportArgumentType=false, reportOptionalOperand=false
# The server's API, generated for kfp, declares every field of an answer as optional.
"""A Kubeflow Pipelines server: its client, who asks, and what a refusal or a silence means."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import kfp
from kfp.client import (
    KF_PIPELINES_SA_TOKEN_ENV,
    KF_PIPELINES_SA_TOKEN_PATH,
    ServiceAccountTokenVolumeCredentials,
)
from kfp_server_api import ApiException
from urllib3.exceptions import HTTPError, MaxRetryError, SSLError

from dynamic_transformers.launch.patience import outage, patiently
from dynamic_transformers.settings import UserError

REQUEST_TIMEOUT = (3, 10)  # seconds to connect, which urllib3 tries four times, and to answer
LOG_VERSIONS = ("v1alpha1", "v2beta1")  # where KFP has logs up to 2.17, and after it


class Client(kfp.Client):
    """kfp's client, but it gives up within seconds where kfp's asks for minutes, or waits for ever."""

    multi_user: bool

    def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
        """Ask once, and refuse whatever else answers there: kfp takes any page for a healthy server."""
        try:
            health = self._healthz_api.healthz_service_get_healthz(_request_timeout=REQUEST_TIMEOUT)
            json.loads(self._healthz_api.api_client.last_response.data)
            return health
        except ApiException as error:
            if error.status != 404:
                raise
            reason = "it has no health page"
        except ValueError:
            reason = "its health page is not JSON; if it is one to log in, give a token"
        raise UserError(f"{self._existing_config.host} is no Kubeflow Pipelines server: {reason}")

    def state_of(self, run_id: str, seconds: float) -> Any:
        """The state of a run, also where the server is away for a while: at most for `seconds`."""
        request = partial(self._run_api.run_service_get_run, run_id=run_id, _request_timeout=REQUEST_TIMEOUT)
        return patiently(request, tell_away, seconds)

    def begin_run(self, name: str, experiment_id: str, **options: Any) -> str:
        """Start a run of this name, and give its id; also where the server is away for a while."""
        of_this_name = partial(self._runs_named, name, experiment_id)
        before = patiently(of_this_name, tell_away)

        def begin() -> str:
            # An attempt that got no answer may have begun it.
            if unheard_of := of_this_name() - before:
                return unheard_of.pop()
            with redirect_stdout(None):  # kfp prints a link of its own
                begun: Any = self.run_pipeline(experiment_id, name, **options)
            return begun.run_id

        return patiently(begin, tell_away)

    def _runs_named(self, name: str, experiment_id: str) -> set[str]:
        """The newest runs of this name."""
        answer: Any = self._run_api.run_service_list_runs(
            experiment_id=experiment_id,
            filter=named(name),
            sort_by="created_at desc",
            page_size=100,
            _request_timeout=REQUEST_TIMEOUT,
        )
        return {run.run_id for run in answer.runs or []}

    def log_of(self, run_id: str, pod: str) -> str:
        """The log of a run's pod; empty where the server has none, or does not show it."""
        api = self._run_api.api_client
        for version in LOG_VERSIONS:
            try:
                api.call_api(
                    f"/apis/{version}/runs/{run_id}/nodes/{pod}/log",
                    "GET",
                    auth_settings=["Bearer"],
                    _request_timeout=REQUEST_TIMEOUT,
                )
                return api.last_response.data
            except (ApiException, HTTPError, UnicodeDecodeError):
                continue
        return ""


def tell_away(reason: str) -> None:
    """Say that a request is repeated."""
    print(f"the server is away, trying again: {reason}", file=sys.stderr, flush=True)


def named(name: str) -> str:
    """The server's filter for things of this name."""
    equals = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    return json.dumps({"predicates": [equals]})


def server_address(host: str) -> str:
    """`host` without a slash at its end.

    Raises:
        UserError: empty, no URL, or one that holds a password, which would be printed.
    """
    if not host:
        raise UserError("no server: give --host https://... or set KFP_HOST")
    if not re.fullmatch(r"https?://[^/@\s]+(/[^@\s]*)?", host):
        raise UserError("--host: must be like https://host or https://host:8080/pipeline, without a password")
    return host.rstrip("/")


def token_place(token_file: Path | None) -> Path | None:
    """The file that holds the token: as asked, or in a cluster the service account's; None for KFP_TOKEN."""
    volume = Path(os.environ.get(KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH))
    if token_file is None and not os.environ.get("KFP_TOKEN") and volume.is_file():
        return volume
    return token_file


def read_token(token_file: Path | None) -> str:
    """The bearer token, empty if there is none.

    Raises:
        UserError: the file cannot be read, or what it or KFP_TOKEN holds is no token. Never shows it.
    """
    try:
        text = os.environ.get("KFP_TOKEN", "") if token_file is None else token_file.read_text("latin-1")
    except OSError as error:
        raise UserError(f"--token-file {token_file}: {error.strerror}") from error
    token = text.strip()
    if not re.fullmatch(r"[!-~]*", token) or (token_file and not token):
        raise UserError(f"{token_file or 'KFP_TOKEN'}: must hold one token, and nothing else")
    return token


def connect(host: str, token_file: Path | None, token: str) -> Client:
    """A client of a server that is there and well; it reads a token file again for each request."""
    credentials = ServiceAccountTokenVolumeCredentials(str(token_file)) if token_file else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # "only works with Kubeflow Pipelines 2"
        client = Client(
            host,
            existing_token=None if token_file else token or None,
            credentials=credentials,
            ssl_ca_cert=os.environ.get("SSL_CERT_FILE"),
        )
    client.multi_user = client.get_kfp_healthz().multi_user
    return client


@contextmanager
def plain_errors(host: str, token: str) -> Iterator[None]:
    """Turn what kfp's client raises into a UserError of one line, without the token."""
    try:
        yield
    except (ApiException, HTTPError) as error:
        line = refusal(host, error) if isinstance(error, ApiException) else silence(host, error)
        raise UserError(line.replace(token, "***") if token else line) from error


def refusal(host: str, error: ApiException) -> str:
    """What the server answered: `message` of its gateway, `error_message` of its uploads, or plain text."""
    try:
        answer = json.loads(error.body or "")
        message = answer.get("message") or answer.get("error_message") or error.reason
    except (ValueError, AttributeError):
        page = not error.body or "<" in error.body
        message = error.reason if page else error.body
    line = f"{host} answered {error.status}: {' '.join(str(message).split())}"
    if error.status in (401, 403):
        line += "; give a token that is valid there, by --token-file or KFP_TOKEN"
    return line


def silence(host: str, error: HTTPError) -> str:
    """Why there was no answer."""
    reason = error.reason if isinstance(error, MaxRetryError) else error
    if isinstance(reason, SSLError):
        return (
            f"{host}: no secure connection ({outage(error)}); "
            "SSL_CERT_FILE may name the certificates to trust"
        )
    return f"nothing answers at {host} ({outage(error)})"
