"""Records of a source: embedded in the Python installation, local files, or what `datasets` reads."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import datasets

from dynamic_transformers.data import arithmetic, embedded
from dynamic_transformers.data.files import (
    FILE_BUILDERS,
    READ_ERRORS,
    LocalFiles,
    hub_commit,
    local_files,
    one_line,
)
from dynamic_transformers.data.rows import DAMAGE, READERS, NoSuchColumnError, Row
from dynamic_transformers.settings import SourceSettings, UserError

EMBEDDED: dict[str, Callable[[], Iterable[str]]] = {
    "prose": embedded.prose,
    "code": embedded.code,
    "math": arithmetic.documents,
}


def read_records(source: SourceSettings) -> Iterator[Row]:
    """The records of a source, sound and broken ones.

    Raises:
        UserError: no such source, path, configuration, file, split or column; a cut or unreadable file.
    """
    place = f"data.dataset_configs.{source.name}"
    if source.type == "embedded":
        if source.name not in EMBEDDED:
            known = ", ".join(EMBEDDED)
            raise UserError(f"{place}: type=embedded has only {known}; others are type=hub")
        rows = (Row(text, None, number) for number, text in enumerate(EMBEDDED[source.name](), 1))
    elif (files := local_files(source)) is None:
        by_name = source.path not in FILE_BUILDERS
        revision = (hub_commit(source) or source.revision) if by_name else None
        rows = _read_hub(source, place, str(source.path), source.data_files, revision)
    elif files.builder in READERS and not any(file.suffix == ".zip" for file in files.all):
        rows = _read_files(source, place, files)
    else:
        named = {split: [glob.escape(str(file)) for file in paths] for split, paths in files.splits.items()}
        rows = _read_hub(source, place, files.builder, named, None)
    return islice(rows, source.max_documents)


def _read_files(source: SourceSettings, place: str, files: LocalFiles) -> Iterator[Row]:
    read = READERS[files.builder]

    def rows_of(split: str) -> Iterator[Row]:
        for file in files.splits[split]:
            row = None
            try:
                for row in read(file, source.text_column):
                    yield row
            except NoSuchColumnError as error:
                raise UserError(
                    f"{place}.text_column={source.text_column}: no such column in {file}; there are {error}"
                ) from error
            except DAMAGE as error:
                after = f"after row {row.number}" if row else "before its first row"
                raise UserError(
                    f"{place}: {file} is cut off or damaged {after}: {one_line(error)}"
                ) from error

    if source.split in files.splits:
        yield from rows_of(source.split)
        return
    try:  # a part, such as train[:10%] or train+test
        instruction = datasets.ReadInstruction.from_spec(source.split)
        sizes = {split: sum(1 for _ in rows_of(split)) for split in files.splits}
        parts = instruction.to_absolute(sizes)
    except UserError:
        raise
    except (ValueError, AssertionError) as error:
        known = ", ".join(files.splits)
        raise UserError(f"{place}.split={source.split}: no such split; there are {known}") from error
    for part in parts:
        yield from islice(rows_of(part.splitname), part.from_, part.to)


def _read_hub(
    source: SourceSettings, place: str, path: str, data_files: Any, revision: str | None
) -> Iterator[Row]:
    try:
        dataset: Any = datasets.load_dataset(
            path,
            name=source.config,
            data_files=data_files,
            split=source.split,
            streaming=source.max_documents is not None,
            revision=revision,
        )
        columns = dataset.column_names or list(next(iter(dataset), {}))
    except READ_ERRORS as error:
        raise UserError(f"{place}: cannot read {source.path!r}: {one_line(error)}") from error
    if source.text_column not in columns:
        raise UserError(
            f"{place}.text_column={source.text_column}: no such column; there are {', '.join(columns)}"
        )
    number = 0
    try:
        for batch in dataset.select_columns([source.text_column]).iter(batch_size=256):
            for value in batch[source.text_column]:
                number += 1
                yield Row(value, None, number)
    except READ_ERRORS as error:
        raise UserError(
            f"{place}: {source.path!r} breaks off after row {number}: {one_line(error)}"
        ) from error
