"""Why a library, the hub or another server does not give what it was asked for, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus

from datasets.exceptions import DatasetsError
from huggingface_hub import is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LOG_IN = "log in (`hf auth login`, or HF_TOKEN)"


def why(error: BaseException) -> str:
    """What went wrong and what helps."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, GatedRepoError):
            return f"the hub asks to accept its terms first: do so on its page, and {LOG_IN}"
        if isinstance(cause, RevisionNotFoundError):
            return "the hub has no such revision: check `revision`"
        if isinstance(cause, RepositoryNotFoundError):
            return f"no such data set on the hub, or a private one: check the name, or {LOG_IN}"
        if reason := _of_status(_status(cause)):
            return reason
    if any(isinstance(cause, OfflineModeIsEnabled | LocalEntryNotFoundError) for cause in causes):
        if is_offline_mode():
            return "not in the hub's cache, and HF_HUB_OFFLINE is set: fetch it first, or unset that"
        return f"not in the hub's cache, and the hub cannot be reached: {one_line(causes[-1])}"
    if any(isinstance(cause, EntryNotFoundError) for cause in causes):
        return "the hub has no such file"
    if "range requests" in str(error):
        return "its server gives files as a whole only: set streaming: false"
    return one_line(error)


def one_line(error: BaseException) -> str:
    """First line of an error of a library."""
    # "An error occurred while generating the dataset" says nothing; its cause does.
    cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """HTTP status of an answer, as the clients that fsspec and the hub use have it."""
    return getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)


def _of_status(status: int | None) -> str | None:
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return f"the server refuses ({status}): {LOG_IN}, or ask for access"
    if status == HTTPStatus.NOT_FOUND:
        return "the server has no such file (404): check the name"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return (
            f"the server has had too many requests (429): start again in some minutes, or {LOG_IN} for more"
        )
    if isinstance(status, int) and status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return f"the server fails ({status}): start again later"
    return None
