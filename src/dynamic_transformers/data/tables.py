"""Records of parquet and Arrow files, of which only the columns that are needed are read."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from dynamic_transformers.data.rows import SHARD_BYTES, Division, Part, Reader, Row, open_binary

BATCH_ROWS = 256  # held at once


class Parquet(Reader):
    """The rows of a parquet file, divided at row groups."""

    def columns(self, file: str) -> list[str]:
        """As `Reader.columns`, of the schema."""
        with _parquet(file) as table:
            return names_of_schema(table.schema_arrow)

    def rows(self, file: str, part: Part | None, columns: Sequence[str]) -> Iterator[Row]:
        """As `Reader.rows`."""
        with _parquet(file) as table:
            ends = _ends(table.metadata.row_group(i).num_rows for i in range(table.num_row_groups))
            first, last = part or (0, ends[-1])
            groups = [i for i, (begin, end) in enumerate(pairwise(ends)) if end > first and begin < last]
            if groups:
                batches = table.iter_batches(BATCH_ROWS, groups, columns=list(columns) or None)
                yield from table_rows(file, batches, ends[groups[0]], first, last)

    def count(self, file: str, most: int | None = None) -> int:
        """As `Reader.count`, from the footer."""
        with _parquet(file) as table:
            return at_most(table.metadata.num_rows, most)

    def parts(self, file: str, records: Part | None, size: int) -> list[Division]:
        """As `Reader.parts`."""
        if size <= SHARD_BYTES:
            return [Division(records, size)]
        with _parquet(file) as table:
            groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
            sizes = [
                sum(group.column(i).total_compressed_size for i in range(group.num_columns))
                for group in groups
            ]
            return divided(records, [group.num_rows for group in groups], sizes)


class Arrow(Reader):
    """The rows of an Arrow file, or of a stream as `datasets` writes it, divided at record batches."""

    def columns(self, file: str) -> list[str]:
        """As `Reader.columns`, of the schema."""
        with _arrow(file) as (schema, _):
            return names_of_schema(schema)

    def rows(self, file: str, part: Part | None, columns: Sequence[str]) -> Iterator[Row]:
        """As `Reader.rows`."""
        with _arrow(file, BATCH_ROWS) as (schema, batches):
            top = [name for name in schema.names if is_needed(name, columns)]
            first, last = part or (0, None)
            yield from table_rows(file, (batch.select(top) for batch in batches), 0, first, last)

    def count(self, file: str, most: int | None = None) -> int:
        """As `Reader.count`, from the heads of the batches."""
        with _arrow(file) as (_, batches):
            return at_most(sum(batch.num_rows for batch in batches), most)

    def parts(self, file: str, records: Part | None, size: int) -> list[Division]:
        """As `Reader.parts`."""
        if size <= SHARD_BYTES:
            return [Division(records, size)]
        with _arrow(file) as (_, batches):
            sizes = [(batch.num_rows, batch.nbytes) for batch in batches]
        return divided(records, [rows for rows, _ in sizes], [size for _, size in sizes])


def divided(records: Part | None, lengths: Sequence[int], sizes: Sequence[int]) -> list[Division]:
    """Parts of about SHARD_BYTES of a file in pieces.

    Args:
        records: those of the file that are asked for; None: all.
        lengths, sizes: records and bytes of each piece.
    """
    ends = _ends(lengths)
    first, last = records or (0, ends[-1])
    last = min(last, ends[-1])
    found: list[Division] = []
    begin, size = first, 0
    for (start, end), piece in zip(pairwise(ends), sizes, strict=True):
        if end <= first or start >= last:
            continue
        size += piece
        if size >= SHARD_BYTES or end >= last:
            found.append(Division((begin, min(end, last)), size))
            begin, size = end, 0
    return found


def table_rows(
    file: str | None, batches: Iterable[pyarrow.RecordBatch], start: int, first: int, last: int | None
) -> Iterator[Row]:
    """The rows `first` to `last` of a table whose batches begin with the row `start`."""
    for batch in batches:
        skipped = min(max(first - start, 0), batch.num_rows)
        kept = batch.slice(skipped, None if last is None else max(last - start - skipped, 0))
        for number, (value, fault) in enumerate(_records(kept), start + skipped + 1):
            yield Row(value, file, number, fault)
        start += batch.num_rows
        if last is not None and start >= last:
            return


def names_of_schema(fields: Iterable[pyarrow.Field], prefix: str = "") -> list[str]:
    """Names of the columns of a schema, and of what is nested in them, with dots."""
    names = []
    for field in fields:
        names.append(f"{prefix}{field.name}")
        if pyarrow.types.is_struct(field.type):
            names += names_of_schema(field.type, f"{prefix}{field.name}.")
    return names


def _records(batch: pyarrow.RecordBatch) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Each row as Python has it, and what is wrong with it."""
    names = batch.schema.names
    try:
        columns = [column.to_pylist() for column in batch.columns]
    except UnicodeDecodeError:  # one wrong byte refuses the whole batch: value by value then
        for index in range(batch.num_rows):
            try:
                values = [_value(column, index) for column in batch.columns]
            except UnicodeDecodeError as error:
                yield {}, f"no valid UTF-8 ({error.reason})"
            else:
                yield dict(zip(names, values, strict=True)), None
        return
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True)), None


def _value(column: pyarrow.Array, index: int) -> Any:
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        value = column[index : index + 1].cast(pyarrow.large_binary())[0].as_py()
        return value and value.decode(errors="surrogateescape")
    return column[index].as_py()


def is_needed(column: str, names: Sequence[str]) -> bool:
    """Whether a column is, or holds, one of these; no names mean all."""
    return not names or any(name == column or name.startswith(f"{column}.") for name in names)


def _ends(lengths: Iterable[int]) -> list[int]:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return ends


def at_most(count: int, most: int | None) -> int:
    """A number of records, or `most` where there are more."""
    return count if most is None else min(count, most)


@contextmanager
def _parquet(file: str) -> Iterator[pyarrow.parquet.ParquetFile]:
    with open_binary(file) as stream:
        # Buffers of their own: otherwise all that is read of a row group, however large, is held at once.
        yield pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=2**20)


@contextmanager
def _arrow(
    file: str, most: int = sys.maxsize
) -> Iterator[tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]]:
    """Schema and batches of an Arrow file, cut where they have more than `most` rows."""
    remote = "://" in file
    # Mapped, a batch takes no memory, however large, and one that is not needed is not read.
    with (
        open_binary(file) as opened,
        pyarrow.PythonFile(opened, "r") if remote else pyarrow.memory_map(file) as stream,
    ):
        try:
            table = pyarrow.ipc.open_file(stream)
        except pyarrow.ArrowInvalid:
            stream.seek(0)
            table = pyarrow.ipc.open_stream(stream)
            batches = iter(table)
        else:
            batches = map(table.get_batch, range(table.num_record_batches))
        pieces = (batch.slice(row, most) for batch in batches for row in range(0, batch.num_rows, most))
        yield table.schema, pieces if remote else _while_whole(opened, stream.size(), pieces)


def _while_whole(
    opened: IO[bytes], size: int, pieces: Iterator[pyarrow.RecordBatch]
) -> Iterator[pyarrow.RecordBatch]:
    """Pieces of a mapped file, which is looked at before each: behind a new end, a map kills the process."""
    while True:
        if (left := os.fstat(opened.fileno()).st_size) < size:
            raise OSError(f"{left} of its {size} bytes are left since it was opened")
        if (piece := next(pieces, None)) is None:
            return
        yield piece
