"""Sources in shards, and the rows of each: embedded ones, files, or what only `datasets` can read."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import PurePath
from typing import Any, NamedTuple
from zipfile import BadZipFile

from dynamic_transformers.data import arithmetic, embedded
from dynamic_transformers.data.csv_rows import Csv
from dynamic_transformers.data.datatrove import Datatrove
from dynamic_transformers.data.fields import Fields, NoSuchColumnError
from dynamic_transformers.data.files import (
    FILE_BUILDERS,
    by_card,
    local_files,
    remote_files,
)
from dynamic_transformers.data.hub import URL, at_hand, fetched, hub_commit, hub_files
from dynamic_transformers.data.rows import (
    DAMAGE,
    Division,
    Json,
    Lines,
    Paragraphs,
    Part,
    Reader,
    Row,
    Text,
    UnreadableError,
    names_of,
)
from dynamic_transformers.data.tables import Arrow, Parquet, is_needed
from dynamic_transformers.refusals import one_line, reason_of
from dynamic_transformers.settings import EMBEDDED, SourceSettings, UserError

EMBEDDED_TEXTS: dict[str, Callable[[], Iterable[str]]] = {
    "prose": embedded.prose,
    "code": embedded.code,
    "math": arithmetic.documents,
}
TEXT_READERS = {"line": Lines(), "paragraph": Paragraphs(), "document": Text()}
READERS: dict[str, Reader] = {
    "arrow": Arrow(),
    "csv": Csv(","),
    "datatrove": Datatrove(),
    "json": Json(),
    "parquet": Parquet(),
}
TSV = Csv("\t")
READABLE = {"text", *READERS}
MOST_NAMES, NAME_LENGTH = 40, 60  # of columns, in a message
CHAT_COLUMNS = {"messages", "conversations", "prompt", "response", "instruction"}


@dataclass(frozen=True)
class Shard:
    """What one process reads at once: a file of a source, or a part of it.

    Attributes:
        source: its name.
        number: place among the shards of the source, from 0.
        file: path or URL; None: embedded, or what only `datasets` can read.
        builder: "embedded", "json", "csv", "parquet", "text", "arrow", "datatrove", or "datasets".
        part: first byte of a file of lines that is not compressed, and the one behind its last; of any other
            file, records in the same way; None: all of it.
        split: "train", or "validation": of the source's own validation split.
        size: bytes, about.
        before: lines of the file in front of a part that is counted in bytes.
    """

    source: str
    number: int
    file: str | None
    builder: str
    part: tuple[int, int] | None
    split: str = "train"
    size: int = 0
    before: int = 0


class SourceFiles(NamedTuple):
    """Path or URL, and bytes, of each file of each split; `builder` says how they are read."""

    builder: str
    splits: dict[str, list[tuple[str, int]]]


class Piece(NamedTuple):
    """Records of a file of `size` bytes, the first and the one behind the last; None: all."""

    file: str
    size: int
    records: Part | None


def shards_of(source: SourceSettings) -> list[Shard]:
    """The shards of a source, those of its own validation split last.

    A file of this machine of more than 16 MiB is divided where its format allows. `max_documents` is of
    `split` alone.

    Raises:
        UserError: no such source, path, configuration, file, split or column; a damaged file; a hub or server
            that refuses.
    """
    place = _place(source)
    files = _files(source, place)
    if source.sample_by != "line" and (files is None or files.builder != "text"):
        raise UserError(f"{place}.sample_by={source.sample_by}: only text files are divided so: leave it out")
    wanted = {"train": source.split, "validation": source.validation_split}
    found: list[Shard] = []
    for split, asked in wanted.items():
        if asked is None:
            continue
        most = source.max_documents if split == "train" else None
        if files is None:
            builder = EMBEDDED if source.path == EMBEDDED else "datasets"
            part = (0, most) if most else None
            found.append(Shard(source.name, len(found), None, builder, part, split))
            continue
        key = "split" if split == "train" else "validation_split"
        pieces = _pieces(source, files, f"{place}.{key}={asked}", asked)
        for piece in _first(source, files.builder, pieces, most):
            with _told(place, piece.file):
                parts = _parts(source, files.builder, piece)
            for part, size, before in parts:
                shard = Shard(source.name, len(found), piece.file, files.builder, part, split, size, before)
                found.append(shard)
    if files is not None and found:
        file = str(found[0].file)
        with _told(place, file):
            columns = _reader(source, files.builder, file).columns(_seen(source, file))
        _fields(source, columns, file)
    return found


def read_shard(source: SourceSettings, shard: Shard) -> Iterator[Row]:
    """The rows of a shard: sound and broken ones, and those that the source's filter drops.

    Raises:
        UserError: no such column; a damaged file; a hub or server that refuses or breaks off.
    """
    if shard.builder == EMBEDDED:
        texts = EMBEDDED_TEXTS[source.name]()
        rows = (Row(text, None, number) for number, text in enumerate(texts, 1))
        yield from islice(rows, *(shard.part or (None,)))
    elif shard.file is None:
        yield from _read_by_library(source, shard)
    else:
        yield from _read_file(source, shard, shard.file)


def _read_file(source: SourceSettings, shard: Shard, file: str) -> Iterator[Row]:
    place = _place(source)
    reader = _reader(source, shard.builder, file)
    last = Row(None, file, shard.before)
    with _told(place, file, lambda: f" after row {last.number}" if last.number else " before its first row"):
        copy = _copy(source, file)
        if shard.builder == "datatrove":  # tokens stand in no column
            yield from reader.rows(copy, shard.part, ())
            return
        fields = _fields(source, reader.columns(copy), file)
        for row in reader.rows(copy, shard.part, fields.needed):
            last = fields(row, file, shard.before)
            yield last


def _read_by_library(source: SourceSettings, shard: Shard) -> Iterator[Row]:
    # Not above: the other sources need nothing of it, and it takes seconds.
    from datasets import load_dataset

    path, data_files, revision = str(source.path), source.data_files, None
    if files := local_files(source):
        path = files.builder
        data_files = {
            name: [glob.escape(str(file)) for file in group] for name, group in files.splits.items()
        }
    elif source.path not in FILE_BUILDERS:
        revision = hub_commit(source) or source.revision
    number = 0
    try:
        dataset: Any = load_dataset(
            path,
            name=source.config,
            data_files=data_files,
            split=source.split if shard.split == "train" else source.validation_split,
            streaming=source.streaming or source.max_documents is not None,
            revision=revision,
        )
        first = next(iter(dataset), {})
        fields = _fields(source, names_of([first]), path)
        dataset = dataset.select_columns([name for name in first if is_needed(name, fields.needed)])
        batches = (zip(*batch.values(), strict=True) for batch in dataset.iter(256))
        names = dataset.column_names
        for values in islice(chain.from_iterable(batches), *(shard.part or (None,))):
            number += 1
            yield fields(Row(dict(zip(names, values, strict=True)), None, number), None, 0)
    except UserError:
        raise
    except Exception as error:  # whatever the library and the clients under it raise
        what = f"{path!r} breaks off after row {number}" if number else f"cannot read {path!r}"
        raise UserError(f"{_place(source)}: {what}: {reason_of(error)}") from error


def _place(source: SourceSettings) -> str:
    return f"data.dataset_configs.{source.name}"


def _reader(source: SourceSettings, builder: str, file: str) -> Reader:
    if builder == "text":
        return TEXT_READERS[source.sample_by]
    return TSV if builder == "csv" and ".tsv" in PurePath(file).suffixes else READERS[builder]


def _files(source: SourceSettings, place: str) -> SourceFiles | None:
    """The files of a source that our readers know; None: embedded, or left to `datasets`."""
    if source.path == EMBEDDED:
        if source.name not in EMBEDDED_TEXTS:
            raise UserError(f"{place}: path=embedded has only the names {', '.join(EMBEDDED_TEXTS)}")
        return None
    if files := local_files(source):
        splits = {
            split: [(str(file), file.stat().st_size) for file in found]
            for split, found in files.splits.items()
        }
        result = SourceFiles(files.builder, splits)
    elif source.path in FILE_BUILDERS:
        if source.path == "datatrove":
            raise UserError(
                f"{place}.data_files: files of datatrove are read from this machine's folders only"
            )
        if source.path not in READABLE:
            return None
        result = SourceFiles(str(source.path), remote_files(source))
    else:
        result = _hub_files(source, place)
    zipped = any(file.endswith(".zip") for files in result.splits.values() for file, _ in files)
    return None if result.builder not in READABLE or zipped else result


def _hub_files(source: SourceSettings, place: str) -> SourceFiles:
    path = str(source.path)
    try:
        found = hub_files(source)
    except Exception as error:  # whatever the hub's client raises
        raise UserError(f"{place}: cannot read {path!r}: {reason_of(error)}") from error
    if f"{PurePath(path).name}.py" in found.sizes:
        raise UserError(
            f"{place}: {path!r} is made by a script, which nobody runs any more: give one that consists of "
            "files, or its parquet files with revision: refs/convert/parquet"
        )
    files = {name: file if (file := found.folder / name).is_file() else None for name in found.sizes}
    try:
        builder, splits = by_card(place, source, files)
    except BadZipFile:  # which formats are in an archive is told once it is here
        return SourceFiles("datasets", {})
    return SourceFiles(
        builder,
        {
            split: [(found.url(path, name), found.sizes[name]) for name in names]
            for split, names in splits.items()
        },
    )


def _pieces(source: SourceSettings, files: SourceFiles, setting: str, asked: str) -> list[Piece]:
    """The files of a split, of several, `train+test`, or of parts of them, `train[:10%]`."""
    splits = files.splits
    names = [asked] if asked in splits else asked.split("+")
    if all(name in splits for name in names):
        return [Piece(file, size, None) for name in names for file, size in splits[name]]
    # Not above: the processes that read shards need nothing of it.
    from datasets import ReadInstruction

    counts = {
        split: [_count(source, files.builder, file) for file, _ in group] if split in asked else []
        for split, group in splits.items()
    }
    try:
        instruction = ReadInstruction.from_spec(asked)
        parts = instruction.to_absolute({split: sum(found) for split, found in counts.items()})
    except (ValueError, AssertionError) as error:
        raise UserError(f"{setting}: no such split; there are {', '.join(splits)}") from error
    pieces = []
    for part in parts:
        start = 0
        for (file, size), count in zip(splits[part.splitname], counts[part.splitname], strict=True):
            first, last = max(part.from_ - start, 0), min(part.to - start, count)
            if first < last:
                pieces.append(Piece(file, size, (first, last)))
            start += count
    return pieces


def _first(source: SourceSettings, builder: str, pieces: list[Piece], most: int | None) -> Iterator[Piece]:
    """Pieces with the first records, at most so many."""
    if most is None:
        yield from pieces
        return
    for piece in pieces:
        first, last = piece.records or (0, most)
        if piece.records is None and piece is not pieces[-1]:
            last = _count(source, builder, piece.file, most)
        yield piece._replace(records=(first, min(last, first + most)))
        most -= last - first
        if most <= 0:
            return


def _parts(source: SourceSettings, builder: str, piece: Piece) -> list[Division]:
    """The parts of a piece in shards; a file that is not of this machine is not divided."""
    file, size, records = piece
    reader = _reader(source, builder, file)
    if "://" not in file:
        return reader.parts(file, records, size)
    if records and isinstance(reader, Lines):  # has to be looked at for where they end
        return [reader.undivided(_copy(source, file), records, size)]
    return [Division(records, size)]


def _count(source: SourceSettings, builder: str, file: str, most: int | None = None) -> int:
    with _told(_place(source), file):
        # The footer of a table says it; anything else has to be here to be counted.
        copy = _seen(source, file) if builder == "parquet" else _copy(source, file)
        return _reader(source, builder, file).count(copy, most)


def _copy(source: SourceSettings, file: str) -> str:
    """Where a file is read: here, or behind its URL if the source is streamed and it is not here."""
    if "://" not in file:
        return file
    if source.streaming:
        return at_hand(file)
    if URL.fullmatch(file):
        return fetched(file)
    from datasets import DownloadManager

    return str(DownloadManager().download(file))


def _seen(source: SourceSettings, file: str) -> str:
    """Where a file's beginning or end can be looked at: the hub gives these without the whole."""
    return at_hand(file) if URL.fullmatch(file) else _copy(source, file)


def _fields(source: SourceSettings, columns: Sequence[str], file: str) -> Fields:
    try:
        return Fields(source, columns)
    except NoSuchColumnError as error:
        known = ", ".join(f"{name:.{NAME_LENGTH}}" for name in columns[:MOST_NAMES])
        known += ", …" if len(columns) > MOST_NAMES else ""
        if source.type == "pretrain" and not CHAT_COLUMNS.isdisjoint(columns):
            known += "; conversations are read with type: finetune"
        raise UserError(
            f"{_place(source)}.{error.setting}: {error.reason} in {file}; there are {known}"
        ) from error


@contextmanager
def _told(place: str, file: str, when: Callable[[], str] = str) -> Iterator[None]:
    """What goes wrong with a file is told in one line; `when` says how far it was read."""
    try:
        yield
    except UserError:
        raise
    except UnreadableError as error:
        raise UserError(f"{place}: {error}") from error
    except Exception as error:
        if "://" in file:  # whatever the client of that protocol raises
            raise UserError(f"{place}: cannot read {file}{when()}: {reason_of(error)}") from error
        if not isinstance(error, DAMAGE):
            raise
        damaged = not isinstance(error, OSError) or error.errno is None
        what = "is cut off or damaged" if damaged else "cannot be read"
        raise UserError(f"{place}: {file} {what}{when()}: {one_line(error)}") from error
