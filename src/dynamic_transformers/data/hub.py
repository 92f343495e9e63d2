"""Data sets and tokenizers of the hub as files: which there are at a commit, and where they are once here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import (
    HfApi,
    get_cached_repo_tree,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RevisionResolutionError,
)

from dynamic_transformers.data.files import CARDS
from dynamic_transformers.settings import SourceSettings

HUB_SECONDS = 10  # to wait for the hub's answer to which commit is the newest
# The last one says nothing, but nearly every data set has it: the hub's client warns where there is nothing
# to fetch.
HUB_CARDS = (*CARDS, ".gitattributes")
URL = re.compile("hf://datasets/([^@]+)@([0-9a-f]{40})/(.+)")
# What transformers makes a tokenizer of. What it makes differs between its versions; these do not.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)

# Addresses of a hub that did not answer: asked again, each file would take its clients half a minute or more.
_silent: set[str] = set()


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
    return _ask_for_commit("dataset", str(source.path), source.revision)


def how_to_load(name: str) -> dict[str, Any]:
    """Arguments with which transformers loads a tokenizer: at the commit that `tokenizer_folder` gives."""
    if Path(name).is_dir():
        return {}
    return {"revision": _ask_for_commit("model", name, None), "local_files_only": _is_silent()}


@cache
def tokenizer_folder(name: str) -> Path | None:
    """Folder in the hub's cache with the files of a tokenizer; None where it cannot be had."""
    try:
        return _folder("model", name, None, TOKENIZER_FILES)
    except (OSError, ValueError):
        return None  # told when the tokenizer is loaded


@cache
def _ask_for_commit(kind: str, path: str, revision: str | None) -> str | None:
    if re.fullmatch("[0-9a-f]{40}", revision or ""):
        return revision
    api = HfApi()
    if not _is_silent():
        try:
            return api.repo_info(path, repo_type=kind, revision=revision, timeout=HUB_SECONDS).sha
        except (HfHubHTTPError, OfflineModeIsEnabled, ValueError):
            pass  # refused, or no name of a repository; told when it is read
        except Exception:  # whatever the hub's HTTP client raises
            _silent.add(api.endpoint)
    try:
        return api.resolve_revision(path, repo_type=kind, revision=revision, local_files_only=True).resolved
    except (RevisionResolutionError, ValueError):
        return None


def _is_silent() -> bool:
    """Whether this process has found that the hub cannot be reached: then only its cache is asked."""
    return HfApi().endpoint in _silent


def _folder(kind: str, path: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Folder in the hub's cache of the commit that a revision names, with the files of these names."""

    def at(revision: str | None) -> Path:
        found = snapshot_download(
            path,
            repo_type=kind,
            revision=revision,
            allow_patterns=list(patterns),
            local_files_only=_is_silent(),
        )
        return Path(found)

    commit = _ask_for_commit(kind, path, revision)
    folder = at(revision)  # by its name first: then the cache knows, without the hub, which commit that is
    if commit in (None, folder.name):
        return folder
    return at(commit)  # a newer one has come: a process stays at the first


def hub_files(source: SourceSettings) -> HubFiles:
    """The files of a data set at the commit that its revision names; only the cards are fetched.

    Without the hub it is what the cache knows of it.

    Raises:
        OSError: the hub refuses or cannot be reached, and the cache does not have it.
    """
    path = str(source.path)
    folder = _folder("dataset", path, source.revision, HUB_CARDS)
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
    return hf_hub_download(path, file, repo_type="dataset", revision=commit, local_files_only=_is_silent())


def at_hand(file: str) -> str:
    """Path of a file of a hub data set if it is in the hub's cache; else, and for any other file, `file`."""
    match = URL.fullmatch(file)
    if not match:
        return file
    path, commit, name = match.groups()
    found = try_to_load_from_cache(path, name, repo_type="dataset", revision=commit)
    return found if isinstance(found, str) else file
