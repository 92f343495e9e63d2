"""What data are made of, by which is told whether that has changed since."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
from fsspec.exceptions import FSTimeoutError

from dynamic_transformers.data.files import FILE_BUILDERS, ask, digest_of, files_there, urls_of
from dynamic_transformers.data.hub import TOKENIZER_FILES, URL, hub_commit, tokenizer_folder
from dynamic_transformers.data.sources import Shard
from dynamic_transformers.manifest import digest
from dynamic_transformers.settings import EMBEDDED, DataSettings, SourceSettings, UserError

BENCHMARKS = "(decontaminate)"
TOKENIZER = "(tokenizer)"  # beside the sources, none of which can have this name
BESIDE = {"datatrove": (".index", ".metadata")}  # endings of files that belong to each file of a builder

SERVER_SECONDS = 10  # to wait for what a server tells of a file
SERVER_QUESTIONS = 16  # at the same time
# What tells one state of a file behind a URL from another, the best first; beside its size.
STATE = ("ETag", "etag", "blob_id", "Content-MD5", "LastModified", "Last-Modified", "mtime")

# SHA-256 of each file (of one behind a URL, of what its server tells of it), the commit of a hub data set, or
# the Python version; None: it cannot be told.
Fingerprint = dict[str, str | None]

_silent: set[str] = set()  # servers that have let this process wait in vain


def fingerprints(data: DataSettings) -> dict[str, Fingerprint | None]:
    """What each source and the tokenizer are made of; None where it cannot be told now: the hub is far."""
    found = {source.name: _of_source(source) for source in data.dataset_configs}
    if data.decontaminate is not None:
        found[BENCHMARKS] = {data.decontaminate: _of_file(Path(data.decontaminate))}
    if data.tokenizer_name is not None:
        found[TOKENIZER] = _of_tokenizer(data.tokenizer_name)
    return found


def shard_identity(source: SourceSettings, shard: Shard) -> str:
    """Digest of all that the rows of a shard depend on: what is read, which part, and how.

    Of a file of this machine it is the SHA-256, of the hub's the commit, of one behind another URL what the
    server tells of its state, or else the URL alone.
    """
    reading = {
        name: getattr(source, name) for name in ("type", "text_column", "columns", "filter", "sample_by")
    }
    content: object
    if shard.file is None:  # embedded, or read by `datasets`, which takes the source as a whole
        places = ("name", "path", "config", "data_files", "split", "validation_split")
        reading |= {name: getattr(source, name) for name in places}
        content = _of_source(source)
    elif "://" not in shard.file:
        names = [shard.file, *(f"{shard.file}{ending}" for ending in BESIDE.get(shard.builder, ()))]
        content = [_of_file(Path(name)) for name in names]
    else:
        content = shard.file if URL.fullmatch(shard.file) else [shard.file, _state_of(shard.file)]
    what = {"builder": shard.builder, "part": shard.part, "split": shard.split, "content": content}
    return digest({**reading, **what})


def first_change(made: Mapping[str, Fingerprint | None], now: Mapping[str, Fingerprint | None]) -> str | None:
    """What differs first between the fingerprints of two times, in words; what is unknown never does."""
    for name, before in made.items():
        after = now[name]
        if before is None or after is None:
            continue
        some_unknown = None in after.values()
        whose = "" if name in (BENCHMARKS, TOKENIZER) else f"source {name}: "
        for thing in sorted({*before, *after}):
            old, new = before.get(thing), after.get(thing)
            if old == new or (new is None and some_unknown):
                continue
            if "://" in thing and old is None and thing in before:  # of other files None is: not there
                continue
            if old is None:
                return f"{whose}{thing} is new"
            if new is None:
                return f"{whose}{thing} is gone"
            return f"{whose}{thing} has changed ({old:.12} became {new:.12})"
    return None


def _of_source(source: SourceSettings) -> Fingerprint | None:
    if source.path == EMBEDDED:
        # The standard library, hence the embedded documents, differ between Python versions.
        return {"Python": platform.python_version()}
    try:
        files = files_there(source)
    except (UserError, OSError):
        return None  # told when the source is read
    if files is not None:
        beside = [Path(f"{file}{ending}") for file in files.all for ending in BESIDE.get(files.builder, ())]
        return {str(file): _of_file(file) for file in (*files.all, *beside, *files.missing)}
    if source.path in FILE_BUILDERS:
        return _of_urls(source)
    commit = hub_commit(source)
    return {"commit": commit} if commit else None


def _of_urls(source: SourceSettings) -> Fingerprint | None:
    try:
        urls = urls_of(source, SERVER_SECONDS)
    except Exception:  # whatever the client of that protocol raises; told when the source is read
        return None

    def of(url: str) -> str | None:
        if "://" not in url:
            return _of_file(Path(url))
        state = _state_of(url)
        return digest(state) if state else None

    with ThreadPoolExecutor(SERVER_QUESTIONS) as pool:
        return dict(zip(urls, pool.map(of, urls), strict=True))


def _state_of(url: str) -> dict[str, str]:
    """What tells one state of a file behind a URL from another; empty where the server does not tell."""
    server = urlsplit(url).netloc
    if server in _silent:
        return {}
    try:
        system, path = fsspec.url_to_fs(url)
        facts = ask(system, "info", path, SERVER_SECONDS)
    except FSTimeoutError:
        _silent.add(server)
        return {}
    except Exception:  # whatever the client of that protocol raises; told when the file is read
        return {}
    best = next((key for key in STATE if facts.get(key)), None)
    return {key: str(facts[key]) for key in ("size", best) if key and facts.get(key)}


def _of_file(file: Path) -> str | None:
    try:
        return digest_of(file)
    except OSError:
        return None  # not there, or not to be read


def _of_tokenizer(name: str) -> Fingerprint | None:
    folder = Path(name) if Path(name).is_dir() else tokenizer_folder(name)
    if folder is None:
        return None
    files = (folder / file for file in TOKENIZER_FILES)
    digests: Fingerprint = {
        f"tokenizer {name}: {file.name}": _of_file(file) for file in files if file.is_file()
    }
    return digests or None
