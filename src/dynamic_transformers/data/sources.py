"""Raw records of a source: embedded in the Python installation, or anything `datasets.load_dataset` reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from dynamic_transformers.data import arithmetic, embedded
from dynamic_transformers.settings import SourceSettings, UserError

EMBEDDED: dict[str, Callable[[], Iterable[str]]] = {
    "prose": embedded.prose,
    "code": embedded.code,
    "math": arithmetic.documents,
}
# These builders take the files of the working directory when no data_files are named.
_FILE_BUILDERS = ("arrow", "csv", "json", "parquet", "text", "webdataset", "xml")
_READ_ERRORS = (OSError, ValueError, RuntimeError, ImportError, DatasetsError)


def read_records(source: SourceSettings) -> Iterator[Any]:
    """What stands in the text column of each record: a str where the record is sound.

    Raises:
        UserError: no such source, path, configuration, file, split or column; an unreadable file.
    """
    if source.type == "hub":
        records = _read_hub(source)
    elif source.name in EMBEDDED:
        records = EMBEDDED[source.name]()
    else:
        known = ", ".join(EMBEDDED)
        raise UserError(
            f"data.dataset_configs.{source.name}: type=embedded has only {known}; others are type=hub"
        )
    return islice(records, source.max_documents)


def _read_hub(source: SourceSettings) -> Iterator[Any]:
    place = f"data.dataset_configs.{source.name}"
    if not source.path:
        raise UserError(f"{place}.path is missing: give a hub name, a folder, or a builder such as json")
    if source.path in _FILE_BUILDERS and not source.data_files:
        raise UserError(f"{place}.data_files is missing: the builder {source.path!r} needs files to read")
    try:
        dataset: Any = datasets.load_dataset(
            source.path,
            name=source.config,
            data_files=source.data_files,
            split=source.split,
            streaming=source.max_documents is not None,
        )
        columns = dataset.column_names or list(next(iter(dataset), {}))
    except _READ_ERRORS as error:
        raise UserError(f"{place}: cannot read {source.path!r}: {_one_line(error)}") from error
    if source.text_column not in columns:
        raise UserError(
            f"{place}.text_column={source.text_column}: no such column; there are {', '.join(columns)}"
        )
    try:
        for batch in dataset.select_columns([source.text_column]).iter(batch_size=256):
            yield from batch[source.text_column]
    except _READ_ERRORS as error:
        raise UserError(f"{place}: {source.path!r} breaks off: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    # "An error occurred while generating the dataset" says nothing; its cause does.
    cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
