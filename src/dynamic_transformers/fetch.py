"""What a configuration and its benchmarks need of the hub, in one folder for machines without one.

The folder is an HF_HOME: with `HF_HOME=FOLDER HF_HUB_OFFLINE=1` every step finds there what it would ask the
hub for. `fetched.json` in it says what was brought, from which commits.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from dynamic_transformers.caches import CACHES, OLD_NAMES
from dynamic_transformers.folders import sole_writer
from dynamic_transformers.manifest import write_json
from dynamic_transformers.refusals import one_line, reason_of
from dynamic_transformers.settings import EMBEDDED, Settings, SourceSettings, UserError

RECORD = "fetched.json"
LINE_SECONDS = 30  # between two lines of progress
# What a model is loaded from; weights in other formats are pickles, which nothing here loads.
WEIGHTS = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")

logger = logging.getLogger("dynamic_transformers")

# What is asked for, and with commit, bytes and files (path in the folder → bytes) what was brought.
Item = dict[str, Any]


def use_folder(folder: Path) -> None:
    """Make a folder the home of the Hugging Face libraries; it must run before they are imported.

    Raises:
        UserError: the environment forbids the network, or `datasets` does not take such a path.
    """
    home = str(folder.resolve())
    if re.search(r"[*?[]|::", home):
        raise UserError(f"--output_dir {folder}: `datasets` finds nothing in a path with *, ?, [ or :: in it")
    on = [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    if on:
        raise UserError(f"{on[0]} is set, but fetch needs the hub: unset it")
    before = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    token = os.path.expanduser(f"{before}/token")  # noqa: PTH111  Path.expanduser raises where there is no home
    os.environ.setdefault("HF_TOKEN_PATH", token)
    for name in (*CACHES, *OLD_NAMES.values()):  # which win over HF_HOME
        os.environ.pop(name, None)
    os.environ |= {"HF_HOME": home, "HF_EVALUATE_OFFLINE": "0"}
    if not sys.stderr.isatty():
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def offline_environment(folder: Path) -> str:
    """What stands before a command, so that it uses the folder."""
    return f"HF_HOME={shlex.quote(str(folder))} HF_HUB_OFFLINE=1"


def fetch(settings: Settings, folder: Path) -> list[Item]:
    """Bring what `settings` need into `folder`; what is there stays as it is, of whatever commit.

    Args:
        settings: their sources, tokenizer, pretrained weights, and `evaluation.tasks`.
        folder: which `use_folder` was given.

    Returns:
        What is there now, as in `fetched.json`.

    Raises:
        UserError: something cannot be had; files that have arrived stay, and a second call goes on.
    """
    folder = folder.resolve()
    wanted = [*_models(settings), *_sources(settings.data.dataset_configs), *_tasks(settings)]
    with sole_writer(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob("hub/*/blobs/*.incomplete"):  # of a process that was killed; never taken up
            part.unlink()
        brought = read_fetched(folder)
        for number, asked in enumerate(wanted, 1):
            name = f"[{number}/{len(wanted)}] {asked['for']}: {asked['repository']}"
            item = next((item for item in brought if asked.items() <= item.items()), None)
            if item is None or not _is_there(folder, item):
                with _progress(folder, name):
                    made = asked | _BRING[asked["kind"]](settings, asked, folder)
                brought = [*(other for other in brought if other is not item), made]
                write_json(folder / RECORD, {"schema_version": 1, "items": brought})
                logger.info("%s: %s, commit %s", name, in_units(made["bytes"]), made["commit"])
            else:
                logger.info("%s: here already, commit %s", name, item["commit"])
    return brought


def read_fetched(folder: Path) -> list[Item]:
    """What `fetched.json` says was brought; nothing where there is none.

    Raises:
        UserError: it is damaged.
    """
    file = folder / RECORD
    try:
        return json.loads(file.read_text(encoding="utf-8"))["items"] if file.is_file() else []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged; remove it: what is there is found again") from error


def in_units(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _models(settings: Settings) -> Iterator[Item]:
    for kind, key, name in (
        ("tokenizer", "data.tokenizer_name", settings.data.tokenizer_name),
        ("weights", "model.pretrained", settings.model.pretrained),
    ):
        if name is not None and not Path(name).exists():
            yield {"kind": kind, "for": key, "repository": name}


def _sources(sources: Sequence[SourceSettings]) -> Iterator[Item]:
    """Sources that are sets of the hub; of those behind other addresses a line tells."""
    from dynamic_transformers.data.files import FILE_BUILDERS

    for source in sources:
        if source.path in (None, EMBEDDED, *FILE_BUILDERS) or Path(source.path).exists():
            if "://" in str(source.data_files):
                logger.warning(
                    "source %s: not of the hub, and not brought: %s", source.name, source.data_files
                )
            continue
        asked = {"config": source.config, "revision": source.revision, "split": source.split}
        asked |= {"validation_split": source.validation_split}
        limits = {"data_files": source.data_files, "max_documents": source.max_documents}
        yield {"kind": "source", "for": source.name, "repository": source.path, **asked, **limits}


def _tasks(settings: Settings) -> Iterator[Item]:
    from dynamic_transformers.evaluation.suites import SUITES, expand_tasks, needs_data_folder

    names = [name for name in settings.evaluation.tasks if not needs_data_folder([name])]
    datasets = {task: dataset for suite in SUITES.values() for task, dataset in suite.items()}
    for task in expand_tasks(names, None) if names else []:
        yield {"kind": "task", "for": task, "repository": datasets.get(task, "as lm-eval names it")}


def _bring_tokenizer(settings: Settings, asked: Item, folder: Path) -> Item:
    """Its files, and in the cache which of those that transformers looks for do not exist."""
    from transformers import AutoTokenizer

    from dynamic_transformers.data.hub import TOKENIZER_FILES

    item = _bring_model(asked, (*TOKENIZER_FILES, "config.json"), folder)
    load = partial(
        AutoTokenizer.from_pretrained, asked["repository"], revision=item["commit"], trust_remote_code=False
    )
    with _told(asked):
        load()
    try:
        load(local_files_only=True)
    except Exception as error:  # whatever transformers raises
        what = f"{asked['for']}: {asked['repository']}"
        raise UserError(f"{what}: is here, but does not load without the hub: {one_line(error)}") from error
    return item


def _bring_weights(settings: Settings, asked: Item, folder: Path) -> Item:
    item = _bring_model(asked, WEIGHTS, folder)
    if not any(file.endswith(".safetensors") for file in item["files"]):
        raise UserError(f"{asked['for']}: {asked['repository']} has no *.safetensors")
    return item


def _bring_model(asked: Item, patterns: Sequence[str], folder: Path) -> Item:
    from huggingface_hub import HfApi

    with _told(asked):
        info = HfApi().model_info(asked["repository"])
    names = [file.rfilename for file in info.siblings or []]
    # Folders hold a model in other formats.
    matching = [name for name in names if "/" not in name and any(fnmatch(name, each) for each in patterns)]
    return _bring_files("model", asked, "main", matching, folder)


def _bring_source(settings: Settings, asked: Item, folder: Path) -> Item:
    """The files of its shards; the cache then knows the names of all files of the set, too."""
    from dynamic_transformers.data.hub import HUB_CARDS, URL, hub_files
    from dynamic_transformers.data.sources import shards_of

    source = next(each for each in settings.data.dataset_configs if each.name == asked["for"])
    urls = dict.fromkeys(str(shard.file) for shard in shards_of(source))
    matches = [URL.fullmatch(url) for url in urls]
    if not all(matches):
        raise UserError(
            f"{source.name}: {source.path}: only `datasets` can read its files: name them as a source"
        )
    known = hub_files(source)
    cards = [card for card in HUB_CARDS if (known.folder / card).is_file()]
    return _bring_files(
        "dataset", asked, known.commit, [*cards, *(match[3] for match in matches if match)], folder
    )


def _bring_files(repo_type: str, asked: Item, revision: str, names: Sequence[str], folder: Path) -> Item:
    """Files of a repository, all of one commit, into the cache, which notes the commit of `revision`."""
    from huggingface_hub import hf_hub_download

    files = []
    with _told(asked):
        for name in names:
            path = Path(hf_hub_download(asked["repository"], name, repo_type=repo_type, revision=revision))
            files.append(path)
            revision = path.parents[name.count("/")].name  # of COMMIT/NAME
    return {"commit": revision, **_account(folder, files)}


def _bring_task(settings: Settings, asked: Item, folder: Path) -> Item:
    """As evaluation loads it, by lm-eval, which makes tables of all the splits of the task's data set."""
    from dynamic_transformers.evaluation.harness import load_tasks

    options = settings.evaluation
    task = {asked["for"]: asked["for"]}
    manager, loaded = load_tasks(task, options.confirm_run_unsafe_code, options.own_tasks)
    splits = [split for each in manager.load(loaded)["tasks"].values() for split in each.dataset.values()]
    tables = [Path(file["filename"]) for split in splits for file in split.cache_files]
    # `datasets` keeps the tables of a commit in a folder of its name.
    commits = dict.fromkeys(table.parent.name for table in tables)
    return {"commit": ", ".join(commits) or None, **_account(folder, tables)}


_BRING: dict[str, Callable[[Settings, Item, Path], Item]] = {
    "tokenizer": _bring_tokenizer,
    "weights": _bring_weights,
    "source": _bring_source,
    "task": _bring_task,
}


def _account(folder: Path, files: Sequence[Path]) -> Item:
    # A part of the folder may be a link to another place.
    sizes = {os.path.relpath(file, folder): file.stat().st_size for file in sorted(files)}
    return {"bytes": sum(sizes.values()), "files": sizes}


def _is_there(folder: Path, item: Item) -> bool:
    files = {folder / name: size for name, size in item["files"].items()}
    return all(file.is_file() and file.stat().st_size == size for file, size in files.items())


@contextmanager
def _told(asked: Item) -> Iterator[None]:
    """What the hub or a library refuses becomes one line."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{asked['for']}: {asked['repository']}: {reason_of(error)}") from error


@contextmanager
def _progress(folder: Path, name: str) -> Iterator[None]:
    """A line at once, and one every `LINE_SECONDS`, for those who see no bars."""

    def tell() -> None:
        before = _size(folder)
        while not done.wait(LINE_SECONDS):
            logger.info("%s: %s so far", name, in_units(_size(folder) - before))

    logger.info("%s ...", name)
    done = threading.Event()
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def _size(folder: Path) -> int:
    """Bytes of the files in a folder that others write meanwhile."""
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # it was renamed
            total += file.stat().st_size if file.is_file() and not file.is_symlink() else 0
    return total
