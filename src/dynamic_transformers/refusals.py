"""Why a library, the hub or another server does not give what it was asked for, in one line."""

from __future__ import annotations

from collections.abc import Iterator

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def reason_of(error: BaseException) -> str:
    """Why something could not be had, and what helps.

    `datasets` and transformers tell of any fault that the data set or model was not found; what the hub
    answered is in the errors that theirs came from. Any other error is told by its first line.
    """
    chain = list(_chain(error))
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    response = next((r for link in chain if (r := getattr(link, "response", None)) is not None), None)
    # As the clients of the hub and those of fsspec have it.
    status = next((s for link in chain if (s := _status(link)) is not None), None)
    if "GatedRepoError" in kinds or "is a gated dataset" in str(error):
        return f"it is gated: accept its terms on its page of the hub, then {LOGIN}"
    if "RevisionNotFoundError" in kinds:
        return "no such revision: give a branch, a tag, or all 40 digits of a commit"
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return f"no such repository, or a private one: check its name; if it is private, {LOGIN}"
    if "RemoteEntryNotFoundError" in kinds:
        return "the repository has no such file"
    if status == 401:
        return f"the server does not take your token (401): {LOGIN}"
    if status == 403:
        return "the server forbids it (403): your account or token lacks the right to read it"
    if status == 404:
        return "the server has no such file (404): check the name"
    if status == 429:
        seconds = response.headers.get("Retry-After") if response is not None else None
        wait = f"wait {seconds} s" if seconds else "wait"
        return f"the server asks to {wait} (429): start again then; whole files are kept"
    if status is not None and status >= 500:
        return f"the server has a fault of its own ({status}): start again later; whole files are kept"
    if "OfflineModeIsEnabled" in kinds or ("LocalEntryNotFoundError" in kinds and _is_offline()):
        return "not on this machine, and HF_HUB_OFFLINE is set: bring it with `dynamic-transformers fetch`"
    if "RemoteProtocolError" in kinds or "ReadTimeout" in kinds:
        return "the hub broke off: start again; whole files are kept"
    if kinds & {"ConnectError", "ConnectTimeout", "LocalEntryNotFoundError"}:  # of the hub's client alone
        return "the hub cannot be reached from this machine: check network, proxies and HF_ENDPOINT"
    if kinds & {"ConnectionError", "ClientConnectorError"}:
        return "the server cannot be reached from this machine: check its name, network and proxies"
    if "range requests" in str(error):
        return "its server gives files as a whole only: set streaming: false"
    return one_line(error)


def one_line(error: BaseException) -> str:
    """First line of an error of a library."""
    # "An error occurred while generating the dataset" says nothing; its cause does.
    by_datasets = type(error).__module__.startswith("datasets.")
    cause = error.__cause__ if by_datasets and error.__cause__ else error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def _status(error: BaseException) -> int | None:
    """HTTP status of the answer that an error tells of."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()
