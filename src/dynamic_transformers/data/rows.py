"""Rows of local files, read one by one, so that a broken one is a row and not the end of the file."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow
import pyarrow.parquet

FIRST_ROWS = 100  # a column that none of them has is a mistake, not a broken row

csv.field_size_limit(sys.maxsize)


class Row(NamedTuple):
    """One record of a source.

    value: what stands in the text column, a str where the record is sound; bytes that are no UTF-8 become
        lone surrogates, as Python's `surrogateescape` makes them.
    number: the line of a text file, else the number of the record, from 1.
    fault: why there is no value; `value` is then what was read.
    """

    value: Any
    file: Path | None
    number: int
    fault: str | None = None


class NoSuchColumnError(ValueError):
    """The text column is not there; the message names those that are."""

    def __init__(self, columns: Iterable[str]) -> None:
        super().__init__(", ".join(columns))


def text_rows(file: Path, column: str) -> Iterator[Row]:
    """Each line of a text file, without its end."""
    if column != "text":
        raise NoSuchColumnError(["text"])
    with _open_text(file, "\n") as stream:
        for number, line in enumerate(stream, 1):
            yield Row(line.rstrip("\r\n"), file, number)


def json_rows(file: Path, column: str) -> Iterator[Row]:
    """The objects of a file with one on each line, or of a file that is one JSON list."""
    rows = _json_list(file)
    if rows is None:
        rows = _json_lines(file)
    first = list(islice(rows, FIRST_ROWS))
    columns = list(dict.fromkeys(key for row in first if isinstance(row.value, dict) for key in row.value))
    if columns and column not in columns:
        raise NoSuchColumnError(columns)
    for row in chain(first, rows):
        if row.fault:
            yield row
        elif not isinstance(row.value, dict):
            yield row._replace(fault=f"{type(row.value).__name__} instead of an object")
        elif column not in row.value:
            yield row._replace(fault=f"no {column!r}")
        else:
            yield row._replace(value=row.value[column])


def csv_rows(file: Path, column: str) -> Iterator[Row]:
    """The records of a file with a header; `.tsv` is separated by tabs, everything else by commas."""
    with _open_text(file, "") as stream:
        # Strict: a quote that nobody closes would make one text of all rows behind it.
        reader = csv.reader(stream, delimiter="\t" if ".tsv" in file.suffixes else ",", strict=True)
        header = next(reader, [])
        if column not in header:
            raise NoSuchColumnError(header)
        place = header.index(column)
        while True:
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row("", file, reader.line_num, str(error))
                continue
            if len(record) == len(header):
                yield Row(record[place], file, reader.line_num)
            elif record:
                fault = f"{len(record)} columns instead of {len(header)}"
                yield Row(",".join(record), file, reader.line_num, fault)


def parquet_rows(file: Path, column: str) -> Iterator[Row]:
    """The rows of a parquet file."""
    with file.open("rb") as stream:
        table = pyarrow.parquet.ParquetFile(stream)
        _check_column(table.schema_arrow, column)
        yield from _column_rows(file, column, table.iter_batches(1024, columns=[column]))


def arrow_rows(file: Path, column: str) -> Iterator[Row]:
    """The rows of an Arrow file, or of a stream as `datasets` writes it."""
    with pyarrow.memory_map(str(file)) as stream:
        try:
            table = pyarrow.ipc.open_file(stream)
            batches = map(table.get_batch, range(table.num_record_batches))
        except pyarrow.ArrowInvalid:
            stream.seek(0)
            batches = table = pyarrow.ipc.open_stream(stream)
        _check_column(table.schema, column)
        yield from _column_rows(file, column, batches)


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    "text": text_rows,
    "json": json_rows,
    "csv": csv_rows,
    "parquet": parquet_rows,
    "arrow": arrow_rows,
}
OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda file: pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd"),
}
# What a cut or damaged file raises, of whatever format and compression.
DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException)


def _json_lines(file: Path) -> Iterator[Row]:
    with _open_text(file, "\n") as stream:
        for number, line in enumerate(stream, 1):
            if line.isspace():
                continue
            try:
                yield Row(json.loads(line), file, number)
            except (ValueError, RecursionError) as error:
                yield Row(line, file, number, f"broken JSON ({str(error).removesuffix(': line 1')})")


def _json_list(file: Path) -> Iterator[Row] | None:
    """None unless the whole file is one list."""
    with _open_text(file, "\n") as stream:
        if not (start := stream.readline()).lstrip().startswith("["):
            return None
        try:
            values = json.loads(start + stream.read())
        except (ValueError, RecursionError):
            return None
    return (Row(value, file, number) for number, value in enumerate(values, 1))


def _check_column(schema: pyarrow.Schema, column: str) -> None:
    if column not in schema.names:
        raise NoSuchColumnError(schema.names)


def _column_rows(file: Path, column: str, batches: Iterable[pyarrow.RecordBatch]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        array = batch.column(column)
        text = pyarrow.types.is_string(array.type) or pyarrow.types.is_large_string(array.type)
        # As bytes: converted as text, one wrong byte would refuse the whole batch.
        for value in (array.cast(pyarrow.large_binary()) if text else array).to_pylist():
            number += 1
            decoded = value.decode(errors="surrogateescape") if text and value is not None else value
            yield Row(decoded, file, number)


def _open_text(file: Path, newline: str) -> IO[str]:
    """A file, compressed or not, as text; a byte order mark is skipped."""
    with file.open("rb") as stream:
        start = stream.read(6)
    opener = next((opener for magic, opener in OPENERS.items() if start.startswith(magic)), io.FileIO)
    return io.TextIOWrapper(opener(file), encoding="utf-8-sig", errors="surrogateescape", newline=newline)
