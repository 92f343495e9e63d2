"""Which files a source consists of: of this machine, or behind URLs."""

from __future__ import annotations

import glob
import logging
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.asyn import sync
from yaml import MarkedYAMLError, YAMLError

from dynamic_transformers.manifest import file_digest
from dynamic_transformers.refusals import one_line, reason_of
from dynamic_transformers.settings import EMBEDDED, SourceSettings, UserError

# These builders take the files of the working directory when no data_files are named.
FILE_BUILDERS = ("arrow", "csv", "datatrove", "json", "parquet", "text", "webdataset", "xml")
BUILDER_OF_SUFFIX = {
    ".arrow": "arrow",
    ".csv": "csv",
    ".ds": "datatrove",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".tsv": "csv",
    ".txt": "text",
    ".xml": "xml",
}

CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")  # which say what a folder's files are

Patterns = Mapping[str, Sequence[str]]

logger = logging.getLogger("dynamic_transformers")


class LocalFiles(NamedTuple):
    """Files of a source.

    builder: what `datasets` reads them with.
    splits: the files of each split, sorted.
    missing: patterns that no file matches.
    """

    builder: str
    splits: dict[str, list[Path]]
    missing: tuple[Path, ...] = ()

    @property
    def all(self) -> list[Path]:
        """Files of all splits."""
        return [file for files in self.splits.values() for file in files]


def local_files(source: SourceSettings) -> LocalFiles | None:
    """Files of a source of this machine; None for an embedded source, a hub data set, or files behind URLs.

    Raises:
        UserError: as `files_there`, or no file matches, or a file of 0 bytes.
    """
    files = files_there(source)
    if files is None:
        return None
    place = f"data.dataset_configs.{source.name}"
    for pattern in files.missing:
        hint = f"; it is a folder: name its files, as in {pattern}/*" if pattern.is_dir() else ""
        raise UserError(f"{place}.data_files: no file matches '{pattern}'{hint}")
    for file in files.all:
        if not file.stat().st_size:
            raise UserError(f"{place}: {file} is empty (0 bytes): remove it, or leave it out of data_files")
    return files


def files_there(source: SourceSettings) -> LocalFiles | None:
    """As `local_files`, whatever is missing or empty.

    Raises:
        UserError: no such file or folder, the wrong kind of setting, or files of several formats.
    """
    if source.path == EMBEDDED:
        return None
    place = f"data.dataset_configs.{source.name}"
    if not source.path:
        raise UserError(f"{place}.path is missing: give a hub name, a folder, or a builder such as json")
    patterns = _patterns(place, source.data_files)
    path = Path(source.path)
    if source.path == "datatrove":
        patterns = {split: [_datatrove_files(entry) for entry in group] for split, group in patterns.items()}
    if source.path in FILE_BUILDERS:
        if not patterns:
            raise UserError(f"{place}.data_files is missing: the builder {source.path!r} needs files to read")
        if any("://" in pattern for group in patterns.values() for pattern in group):
            return None
        splits, missing = _matching(patterns, Path())
        if source.path == "datatrove":
            splits = {
                split: [file for file in files if file.suffix == ".ds"] for split, files in splits.items()
            }
        return LocalFiles(source.path, splits, missing)
    if path.is_file():
        builder = _builder_of(path) or "text"
        raise UserError(
            f"{place}.path={source.path}: is a file; give path: {builder}, data_files: {source.path}"
        )
    if path.is_dir():
        return _files_of_folder(place, source, path, patterns)
    if known := BUILDER_OF_SUFFIX.get(f".{source.path}"):
        raise UserError(f"{place}.path={source.path}: is no builder; did you mean {known}?")
    if source.path[0] in "./~" or source.path.count("/") > 1 or _builder_of(path):
        raise UserError(f"{place}.path={source.path}: no such file or folder")
    return None


def remote_files(source: SourceSettings) -> dict[str, list[tuple[str, int]]]:
    """URL and bytes of each file of each split, where `data_files` name some behind URLs.

    Patterns are for those that fsspec can list: `s3://bucket/*.jsonl`. What is asked for by https is taken as
    it is written. Bytes are 0 where the server does not say.

    Raises:
        UserError: no such file, no package for this kind of URL, or the server refuses.
    """
    place = f"data.dataset_configs.{source.name}"
    found: dict[str, list[tuple[str, int]]] = {}
    for split, group in _patterns(place, source.data_files).items():
        found[split] = []
        for pattern in group:
            try:
                urls = _urls(pattern)
                if not urls:
                    raise UserError(f"{place}.data_files: no file matches '{pattern}'")
                found[split] += [(url, size_of(url)) for url in urls]  # which raises where there is none
            except UserError:
                raise
            except Exception as error:  # whatever the client of that protocol raises
                raise UserError(f"{place}.data_files: cannot read '{pattern}': {reason_of(error)}") from error
    return found


def urls_of(source: SourceSettings, seconds: float) -> list[str]:
    """As `remote_files`, without asking for more than the patterns need, and each server only for so long."""
    patterns = _patterns(f"data.dataset_configs.{source.name}", source.data_files)
    return [url for pattern in chain(*patterns.values()) for url in _urls(pattern, seconds)]


def _urls(pattern: str, seconds: float | None = None) -> list[str]:
    if pattern.startswith("file://") or "://" not in pattern:
        return [str(path) for path in _glob(Path(pattern.removeprefix("file://")))]
    system, path = fsspec.url_to_fs(pattern)
    system.invalidate_cache()  # of what was there when it was last asked
    if pattern.startswith(("http://", "https://")) or not glob.has_magic(path):
        return [pattern]
    return [system.unstrip_protocol(name) for name in sorted(ask(system, "glob", path, seconds))]


def ask(system: Any, question: str, path: str, seconds: float | None) -> Any:
    """What a file system of fsspec answers, such as to "info"; most of them can be given so long."""
    if system.async_impl:
        return sync(system.loop, getattr(system, f"_{question}"), path, timeout=seconds)
    return getattr(system, question)(path)


def size_of(file: str) -> int:
    """Bytes of a file, 0 where that is not known."""
    if "://" not in file:
        return Path(file).stat().st_size
    system, path = fsspec.url_to_fs(file)
    return system.info(path).get("size") or 0


def digest_of(file: Path) -> str:
    """SHA-256 of a file; as long as its size and time stay it is read once."""
    status = file.stat()
    return _digest(file.absolute(), status.st_size, status.st_mtime_ns)


@cache
def _digest(file: Path, size: int, time: int) -> str:
    return file_digest(file)


def _patterns(place: str, data_files: Any) -> dict[str, list[str]]:
    groups = data_files if isinstance(data_files, Mapping) else {"train": data_files or []}
    patterns = {str(split): [group] if isinstance(group, str) else group for split, group in groups.items()}
    for group in patterns.values():
        if not isinstance(group, Sequence) or not all(isinstance(pattern, str) for pattern in group):
            raise UserError(
                f"{place}.data_files={data_files}: must be a pattern, a list of them, or these by split"
            )
    return {split: list(group) for split, group in patterns.items() if group}


def _matching(patterns: Patterns, base: Path) -> tuple[dict[str, list[Path]], tuple[Path, ...]]:
    """The files of each split, and the patterns that match none."""
    found = {
        split: {base / pattern: _glob(base / pattern) for pattern in group}
        for split, group in patterns.items()
    }
    missing = tuple(pattern for group in found.values() for pattern, files in group.items() if not files)
    return {split: sorted({*chain(*group.values())}) for split, group in found.items()}, missing


def _datatrove_files(pattern: str) -> str:
    """The files of a folder, which has others beside each."""
    return f"{pattern}/**/*.ds" if Path(pattern).is_dir() else pattern


def _glob(pattern: Path) -> list[Path]:
    """Files that a pattern names; what exists as it is written is no pattern, be it `exp[1]/a.jsonl`."""
    base = next(path for path in (pattern, *pattern.parents) if path.exists())
    if base == pattern:
        return [base] if base.is_file() else []
    # Unlike Path.glob, it leaves out hidden files.
    found = glob.glob(str(pattern.relative_to(base)), root_dir=base, recursive=True)  # noqa: PTH207
    return [base / name for name in found if (base / name).is_file()]


def _files_of_folder(place: str, source: SourceSettings, folder: Path, patterns: Patterns) -> LocalFiles:
    if patterns:
        splits, missing = _matching(patterns, folder)
        return LocalFiles(_one_builder(place, [*chain(*splits.values())]), splits, missing)
    # Path.rglob would give hidden files and follow no links.
    found = glob.glob("**/*", root_dir=folder, recursive=True)  # noqa: PTH207  for this reason
    names = [name for name in found if (folder / name).is_file()]
    builders = {name: _builder_of(Path(name)) for name in names}
    readable = [name for name in names if builders[name] or name.endswith(".zip")]
    if names and not readable:
        known = ", ".join(BUILDER_OF_SUFFIX)
        raise UserError(
            f"{place}.path={source.path}: none of its files ends in {known}; others are read as text with "
            f"path: text, data_files: {source.path}/**/*"
        )
    cards = [name for name in CARDS if (folder / name).is_file()]
    builder, splits = by_card(place, source, {name: folder / name for name in (*readable, *cards)})
    taken = {name for found in splits.values() for name in found}
    left = sorted(name for name in names if name not in taken)
    same = [name for name in left if builders[name] == builder and not name.endswith(".json")]
    if same and not _divides(folder):
        divided = "; ".join(f"{split}: {found[0]}" for split, found in splits.items())
        raise UserError(
            f"{place}.path={source.path}: names make splits of some of its files ({divided}) and leave out "
            f"{_some(same)}; name those that are meant with data_files"
        )
    # Beside a set of another format, JSON files are about it.
    others = [name for name in left if builders[name] != builder and not name.endswith((".json", *CARDS))]
    if others:
        _warn_once(f"{place}.path={source.path}: read as {builder}; other files are not: {_some(others)}")
    return LocalFiles(builder, {split: [folder / name for name in found] for split, found in splits.items()})


def _divides(folder: Path) -> bool:
    """Whether a folder's card says which files belong to which split."""
    card = folder / "README.md"
    head = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0] if card.is_file() else ""
    return head.startswith("---") and "\nconfigs:" in head


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@cache
def _warn_once(message: str) -> None:
    """Log a warning that is due each time that the files of a source are looked up."""
    logger.warning(message)


def by_card(
    place: str, source: SourceSettings, files: Mapping[str, Path | None]
) -> tuple[str, dict[str, list[str]]]:
    """What `datasets` makes of a folder by its card or the names in it: the builder, and files by split.

    Args:
        files: path of each file, by its name in the folder; None: it is not here, its name must do.

    Raises:
        UserError: no such configuration, or no files of a known format.
    """
    # Not above: the processes that read shards need nothing of it.
    from datasets import get_dataset_config_names, load_dataset_builder
    from datasets.exceptions import DatasetsError

    # `datasets` takes a folder's own name for a pattern: it is shown a copy that consists of links, under a
    # name without special characters.
    with tempfile.TemporaryDirectory() as temporary:
        mirror = Path(temporary).resolve() / "data"
        mirror.mkdir()
        names = {
            mirror / name.replace("::", "--"): name for name in files
        }  # to `datasets`, :: chains addresses
        try:
            for link, name in names.items():
                link.parent.mkdir(parents=True, exist_ok=True)
                if file := files[name]:
                    link.symlink_to(file.absolute())
                else:
                    link.touch()
            built = load_dataset_builder(
                str(mirror), name=source.config, data_files=source.data_files, cache_dir=temporary
            )
        except YAMLError as error:
            mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
            line = f" in line {mark.line + 2}" if mark else ""  # behind the first line of dashes
            raise UserError(f"{place}: {source.path}/README.md: its YAML is damaged{line}") from error
        except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
            if "Config name is missing" in str(error):
                known = ", ".join(get_dataset_config_names(str(mirror)))
                raise UserError(f"{place}.config is missing: there are {known}") from error
            reason = one_line(error).replace(str(mirror), str(source.path))
            raise UserError(f"{place}: cannot read {source.path!r}: {reason}") from error
        splits = {
            str(split): sorted(names[Path(name)] for name in found)
            for split, found in (built.config.data_files or {}).items()
        }
        # It takes the first configuration's format for that of all.
        formats = {_builder_of(Path(name)) for found in splits.values() for name in found}
        by_module = type(built).__module__.rpartition(".")[2]
        return (formats.pop() if len(formats) == 1 else None) or by_module, splits


def _one_builder(place: str, files: Sequence[Path]) -> str:
    """What reads all of these files; empty where there is none."""
    builders = {}
    for file in files:
        builder = _builder_of(file)
        if builder is None:
            known = ", ".join(BUILDER_OF_SUFFIX)
            raise UserError(
                f"{place}.data_files: {file}: the ending says no format; known are {known}; "
                f"others are read as text with path: text, data_files: {file}"
            )
        builders.setdefault(builder, file)
    if len(builders) > 1:
        (one, first), (other, second) = list(builders.items())[:2]
        raise UserError(
            f"{place}.data_files: {first} is {one} and {second} is {other}: name files of one format, and "
            "those of another in a source of their own"
        )
    return next(iter(builders), "")


def _builder_of(path: Path) -> str | None:
    """Builder that the ending names, `.jsonl` and `.jsonl.gz` alike."""
    builders = map(BUILDER_OF_SUFFIX.get, reversed(path.suffixes[-2:]))
    return next(filter(None, builders), None)
