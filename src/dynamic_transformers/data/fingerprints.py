"""What data are made of, by which is told whether that has changed since."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

from dynamic_transformers.data.files import FILE_BUILDERS, digest_of, files_there, hub_commit
from dynamic_transformers.data.tokenization import load_pretrained_tokenizer
from dynamic_transformers.manifest import digest
from dynamic_transformers.settings import DataSettings, SourceSettings, UserError

TOKENIZER = "(tokenizer)"  # beside the sources, none of which can have this name

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
    try:
        tokenizer = load_pretrained_tokenizer(name)
    except UserError:
        return None
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template]
    return {f"tokenizer {name}": digest(parts)}
