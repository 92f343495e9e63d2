"""What data are made of, by which is told whether that has changed since."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

from transformers.utils.hub import cached_file

from dynamic_transformers.data.files import FILE_BUILDERS, digest_of, files_there, hub_commit
from dynamic_transformers.settings import DataSettings, SourceSettings, UserError

TOKENIZER = "(tokenizer)"  # beside the sources, none of which can have this name
# What transformers makes a tokenizer of. What it makes differs between its versions; these do not.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)
NOT_FOUND = ("gated_repo", "missing_entries", "connection_errors")

# SHA-256 of each file, the commit of a hub data set, or the Python version; None: it cannot be told.
Fingerprint = dict[str, str | None]


def fingerprints(data: DataSettings) -> dict[str, Fingerprint | None]:
    """What each source and the tokenizer are made of; None where it cannot be told now: the hub is far."""
    found = {source.name: _of_source(source) for source in data.dataset_configs}
    if data.tokenizer_name is not None:
        found[TOKENIZER] = _of_tokenizer(data.tokenizer_name)
    return found


def first_change(made: Mapping[str, Fingerprint | None], now: Mapping[str, Fingerprint | None]) -> str | None:
    """What differs first between the fingerprints of two times, in words; what is unknown never does."""
    for name, before in made.items():
        after = now[name]
        if before is None or after is None:
            continue
        some_unknown = None in after.values()
        whose = "" if name == TOKENIZER else f"source {name}: "
        for thing in sorted({*before, *after}):
            old, new = before.get(thing), after.get(thing)
            if old == new or (new is None and some_unknown):
                continue
            if old is None:
                return f"{whose}{thing} is new"
            if new is None:
                return f"{whose}{thing} is gone"
            return f"{whose}{thing} has changed ({old:.12} became {new:.12})"
    return None


def _of_source(source: SourceSettings) -> Fingerprint | None:
    if source.type == "embedded":
        # The standard library, hence the embedded documents, differ between Python versions.
        return {"Python": platform.python_version()}
    try:
        files = files_there(source)
    except (UserError, OSError):
        return None  # told when the source is read
    if files is not None:
        return {str(file): _of_file(file) for file in (*files.all, *files.missing)}
    if source.path in FILE_BUILDERS:
        return {}  # behind URLs
    commit = hub_commit(source)
    return {"commit": commit} if commit else None


def _of_file(file: Path) -> str | None:
    try:
        return digest_of(file)
    except OSError:
        return None  # not there, or not to be read


def _of_tokenizer(name: str) -> Fingerprint | None:
    found = (_tokenizer_file(name, file) for file in TOKENIZER_FILES)
    digests: Fingerprint = {
        f"tokenizer {name}: {file.name}": digest_of(file) for file in found if file is not None
    }
    return digests or None


def _tokenizer_file(name: str, file: str) -> Path | None:
    try:
        found = cached_file(name, file, **{f"_raise_exceptions_for_{what}": False for what in NOT_FOUND})
    except OSError:
        return None  # told when the tokenizer is loaded
    return Path(found) if found else None
