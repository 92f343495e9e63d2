"""How long to wait for a server that is away: the Kubernetes API, and Kubeflow Pipelines."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from urllib3.exceptions import HTTPError, MaxRetryError

Answer = TypeVar("Answer")

OUTAGE_SECONDS = 1800.0  # an upgrade of a cluster's control plane takes minutes
PAUSE_SECONDS = 10.0  # between two attempts
TOO_MANY_REQUESTS = 429


def outage(error: Exception) -> str:
    """Why a request got no answer that counts; '' if the server refused it, or it failed here.

    Args:
        error: of urllib3, or an ApiException of either client, which has the answer's `status`.
    """
    if isinstance(error, HTTPError):
        cause = error.reason if isinstance(error, MaxRetryError) else error
        return str(cause).rpartition(": ")[2]  # what comes before names an object's address, anew each time
    status = getattr(error, "status", None) or 0
    if status == TOO_MANY_REQUESTS or status >= 500:
        return f"{status} {getattr(error, 'reason', '')}"
    return ""


def patiently(
    request: Callable[[], Answer], tell: Callable[[str], None], seconds: float | None = None
) -> Answer:
    """Repeat a request for as long as the server is away.

    Args:
        tell: is given each new reason.
        seconds: how long; None: OUTAGE_SECONDS.

    Raises:
        Exception: what `request` raised: a refusal at once, an outage that lasts longer at its end.
    """
    deadline = time.monotonic() + (OUTAGE_SECONDS if seconds is None else seconds)
    told = ""
    while True:
        try:
            return request()
        except Exception as error:
            reason = outage(error)
            if not reason or time.monotonic() >= deadline:
                raise
        if reason != told:
            tell(reason)
            told = reason
        time.sleep(PAUSE_SECONDS)
