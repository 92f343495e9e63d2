"""Data sets of the hub as files: which there are at a commit, and where they are once they are here."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import (
    HfApi,
    get_cached_repo_tree,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import CachedRepoTreeNotFoundError, RevisionResolutionError

from dynamic_transformers.settings import SourceSettings

HUB_SECONDS = 10  # to wait for the hub's answer to which commit is the newest
# What says which files belong to which configuration and split. The last one says nothing, but nearly every
# data set has it: where there is nothing to fetch the hub's client warns.
CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json", ".gitattributes")
URL = re.compile("hf://datasets/([^@]+)@([0-9a-f]{40})/(.+)")


class HubFiles(NamedTuple):
    """A data set at a commit.

    folder: the hub's cache of it, with the cards.
    sizes: bytes of each file, by its path in the data set.
    """

    commit: str
    folder: Path
    sizes: dict[str, int]

    def url(self, path: str, file: str) -> str:
        """Address of a file of the data set `path`."""
        return f"hf://datasets/{path}@{self.commit}/{file}"


def hub_commit(source: SourceSettings) -> str | None:
    """Commit that a hub data set's `revision` names, as the hub or else its cache says; asked once.

    None where neither does.
    """
    if re.fullmatch("[0-9a-f]{40}", source.revision or ""):
        return source.revision
    return _ask_for_commit(str(source.path), source.revision)


@cache
def _ask_for_commit(path: str, revision: str | None) -> str | None:
    try:
        return HfApi().dataset_info(path, revision=revision, timeout=HUB_SECONDS).sha
    except Exception:  # offline, refused, or whatever the hub's HTTP client raises; told when the set is read
        pass
    try:
        api = HfApi()
        return api.resolve_revision(
            path, repo_type="dataset", revision=revision, local_files_only=True
        ).resolved
    except (RevisionResolutionError, ValueError):  # or no name of a data set
        return None


def _cards(path: str, revision: str | None) -> Path:
    """Folder of a commit in the hub's cache, with its cards."""
    return Path(snapshot_download(path, repo_type="dataset", revision=revision, allow_patterns=list(CARDS)))


def hub_files(source: SourceSettings) -> HubFiles:
    """The files of a data set at the commit that its revision names; only the cards are fetched.

    Without the hub it is what the cache knows of it.

    Raises:
        OSError: the hub refuses or cannot be reached, and the cache does not have it.
    """
    path = str(source.path)
    # By its name first: then the cache knows, without the hub, which commit that is.
    folder = _cards(path, source.revision)
    if (commit := hub_commit(source)) not in (None, folder.name):
        folder = _cards(path, commit)  # a newer one has come: a process stays at the first
    try:
        tree = get_cached_repo_tree(path, repo_type="dataset", revision=folder.name)
        sizes = {file.path: file.size for file in tree}
    except CachedRepoTreeNotFoundError:  # the folder was filled by others: what is in it is all we know
        files = (file for file in folder.rglob("*") if file.is_file())
        sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    return HubFiles(folder.name, folder, sizes)


def fetched(url: str) -> str:
    """Path of a file of a hub data set in the hub's cache, downloaded where it is not there.

    Raises:
        OSError: the hub refuses, breaks off or cannot be reached.
    """
    match = URL.fullmatch(url)
    assert match, url
    path, commit, file = match.groups()
    return hf_hub_download(path, file, repo_type="dataset", revision=commit)


def at_hand(file: str) -> str:
    """Path of a file of a hub data set if it is in the hub's cache; else, and for any other file, `file`."""
    match = URL.fullmatch(file)
    if not match:
        return file
    path, commit, name = match.groups()
    found = try_to_load_from_cache(path, name, repo_type="dataset", revision=commit)
    return found if isinstance(found, str) else file
