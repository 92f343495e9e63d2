"""Records of one file, read one by one, so that a broken one is a row and not the end of the file."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice, pairwise, repeat
from pathlib import Path
from typing import IO, Any, NamedTuple

import fsspec
import pyarrow

FIRST_ROWS = 100  # a column that none of them has is a mistake, not a broken row
SHARD_BYTES = 16 * 2**20  # of a file that can be divided
CHUNK_BYTES = 2**20  # read at once where nothing is parsed

Part = tuple[int, int]


class Division(NamedTuple):
    """A part of a file that one process reads.

    part: None: all of the file.
    size: bytes, about.
    before: lines of the file in front of it, where a part is counted in bytes.
    """

    part: Part | None
    size: int
    before: int = 0


class Row(NamedTuple):
    """One record of a source.

    value: of a reader of this file, the columns of the record by name; of a source, a text, a conversation
        or token ids. Bytes that are no UTF-8 become lone surrogates, by Python's `surrogateescape`.
    file: path or URL.
    number: from 1, the line of a file of lines, else the record's number. A reader that was given a part in
        bytes counts lines from there.
    fault: why there is no value; `value` is then what was read.
    dropped: the source's filter leaves it out; there is no value.
    """

    value: Any
    file: str | None
    number: int
    fault: str | None = None
    dropped: bool = False


class UnreadableError(ValueError):
    """A file that cannot be read by its format's rules; the message is one line that names it."""


class Reader:
    """How files of one format are read: as a whole, unless a subclass knows how to divide them.

    A part of a file is a pair of its first record and the one behind its last, from 0; the subclass `Lines`
    counts bytes where a file is no compressed one.
    """

    def columns(self, file: str) -> list[str]:
        """Names of the columns, nested ones with dots; none where no record has any."""
        return names_of(row.value for row in islice(self.rows(file, None, ()), FIRST_ROWS) if not row.fault)

    def rows(self, file: str, part: Part | None, columns: Sequence[str]) -> Iterator[Row]:
        """The records of a part, or of all; `columns` are those that are needed, none means all."""
        raise NotImplementedError

    def count(self, file: str, most: int | None = None) -> int:
        """Number of records, or `most` where there are at least as many."""
        return sum(1 for _ in islice(self.rows(file, None, ()), most))

    def undivided(self, file: str, records: Part | None, size: int) -> Division:
        """Some records of a file of `size` bytes, or all."""
        return Division(records, size)

    def parts(self, file: str, records: Part | None, size: int) -> list[Division]:
        """The same in what one process each may read."""
        return [self.undivided(file, records, size)]


class Text(Reader):
    """A text file as one record, its column `text`."""

    def columns(self, file: str) -> list[str]:
        """`text`."""
        return ["text"]

    def rows(self, file: str, part: Part | None, columns: Sequence[str]) -> Iterator[Row]:
        """As `Reader.rows`."""
        if part is None or part[0] == 0:
            with open_text(file) as stream:
                yield Row({"text": stream.read()}, file, 1)


class Lines(Text):
    """The lines of a text file, without their ends. Parts are bytes, unless the file is compressed."""

    def rows(self, file: str, part: Part | None, columns: Sequence[str]) -> Iterator[Row]:
        """As `Reader.rows`."""
        if part is None or self.in_bytes(file):
            return (self.row(file, *record) for record in self.records(_lines(file, part)))
        return islice(self.rows(file, None, columns), *part)

    def row(self, file: str, number: int, begin: int, text: str) -> Row:
        """The record that stands from the byte `begin` on."""
        return Row({"text": text.rstrip("\r\n")}, file, number)

    def records(self, lines: Iterable[tuple[int, int, str]]) -> Iterable[tuple[int, int, str]]:
        """Number, first byte and text of each record."""
        return lines

    def in_bytes(self, file: str) -> bool:
        """Whether a part of this file is counted in bytes."""
        return _opener(file) is None

    def to_end_of_record(self, stream: IO[bytes]) -> None:
        """Read on to where a new record, or nothing, begins."""
        stream.readline()

    def count(self, file: str, most: int | None = None) -> int:
        """As `Reader.count`; nothing is parsed."""
        return sum(1 for _ in islice(self.records(_lines(file, None)), most))

    def undivided(self, file: str, records: Part | None, size: int) -> Division:
        """As `Reader.undivided`."""
        if records is None or not self.in_bytes(file):
            return Division(records, size)
        first, last = records
        places = ((number, begin) for number, begin, _ in self.records(_lines(file, None)))
        number, begin = next(islice(places, first, None), (1, size)) if first else (1, 0)
        _, end = next(islice(places, last - first - (first > 0), None), (0, size))
        return Division((begin, max(begin, end)), max(begin, end) - begin, number - 1)

    def parts(self, file: str, records: Part | None, size: int) -> list[Division]:
        """As `Reader.parts`, cut at ends of records."""
        whole = self.undivided(file, records, size)
        if whole.size <= SHARD_BYTES or not self.in_bytes(file):
            return [whole]
        begin, end = whole.part or (0, size)
        cuts = [begin]
        with Path(file).open("rb") as stream:
            while end - cuts[-1] > SHARD_BYTES:
                stream.seek(cuts[-1] + SHARD_BYTES - 1)
                self.to_end_of_record(stream)
                if stream.tell() >= end:
                    break
                cuts.append(stream.tell())
        befores = accumulate(map(_line_ends, repeat(file), pairwise(cuts)), initial=whole.before)
        borders = zip(cuts, [*cuts[1:], end], befores, strict=True)
        return [Division((cut, after), after - cut, before) for cut, after, before in borders]


class Paragraphs(Lines):
    """Runs of lines between empty ones."""

    def records(self, lines: Iterable[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
        """As `Lines.records`."""
        number, begin, found = 0, 0, []
        for place, start, line in lines:
            if line.strip():
                if not found:
                    number, begin = place, start
                found.append(line.rstrip("\r\n"))
            elif found:
                yield number, begin, "\n".join(found)
                found = []
        if found:
            yield number, begin, "\n".join(found)

    def to_end_of_record(self, stream: IO[bytes]) -> None:
        """As `Lines.to_end_of_record`; the rest of the first line does not say whether that was empty."""
        stream.readline()
        while (line := stream.readline()) and line.strip():
            pass


class Json(Lines):
    """The objects of a file with one on each line, or of a file that is one JSON list."""

    def columns(self, file: str) -> list[str]:
        """As `Reader.columns`."""
        return Reader.columns(self, file)

    def rows(self, file: str, part: Part | None, columns: Sequence[str]) -> Iterator[Row]:
        """As `Reader.rows`."""
        rows = None if self.in_bytes(file) else _json_list(file)
        if rows is None:
            return super().rows(file, part, columns)
        return islice(rows, *(part or (None,)))

    def row(self, file: str, number: int, begin: int, text: str) -> Row:
        """As `Lines.row`."""
        try:
            return _json_row(json.loads(text), file, number)
        except (ValueError, RecursionError) as error:
            return Row(text, file, number, f"broken JSON ({str(error).removesuffix(': line 1')})")

    def records(self, lines: Iterable[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
        """As `Lines.records`."""
        return (line for line in lines if line[2] and not line[2].isspace())

    def in_bytes(self, file: str) -> bool:
        """As `Lines.in_bytes`; what may be a list is not cut."""
        return super().in_bytes(file) and not _begins_list(file)

    def count(self, file: str, most: int | None = None) -> int:
        """As `Reader.count`."""
        return super().count(file, most) if self.in_bytes(file) else Reader.count(self, file, most)


# What a cut or damaged file raises, of whatever format and compression.
DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException)


def _open_zstd(stream: IO[bytes]) -> Any:
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), "zstd")


_OPENERS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _open_zstd,
    **{bytes([kind]) + b"\x2a\x4d\x18": _open_zstd for kind in range(0x50, 0x60)},  # of frames to be skipped
}
WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")


def names_of(records: Iterable[Any]) -> list[str]:
    """Keys of all records, nested ones with dots, in the order in which they come."""
    names: dict[str, None] = {}

    def add(record: Any, prefix: str) -> None:
        for key, value in record.items():
            names[f"{prefix}{key}"] = None
            if isinstance(value, dict):
                add(value, f"{prefix}{key}.")

    for record in records:
        add(record, "")
    return list(names)


def open_binary(file: str) -> IO[bytes]:
    """A file of this machine, or one behind a URL, as it is."""
    if "://" in file:
        return fsspec.open(file, "rb").open()  # type: ignore[return-value]
    return Path(file).open("rb")


def _opener(file: str) -> Any:
    """What decompresses a file; None where nothing need."""
    with open_binary(file) as stream:
        start = stream.read(6)
    return next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)


def _open(file: str) -> io.BufferedReader:
    """The bytes of a text file, decompressed.

    Raises:
        UnreadableError: they are no UTF-8, by the mark with which they begin.
    """
    opener = _opener(file)
    stream = open_binary(file)
    raw: Any = stream if opener is None else opener(stream)
    # A buffer of its own: pyarrow's streams and some of fsspec's know no lines, or are slow at them.
    reader = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)
    if reader.peek(4).startswith(WIDE_MARKS):
        raise UnreadableError(f"{file}: is text in UTF-16 or UTF-32: save it as UTF-8")
    return reader


def open_text(file: str) -> IO[str]:
    """A file as text, its line ends as they are; a byte order mark is skipped."""
    return io.TextIOWrapper(_open(file), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _lines(file: str, part: Part | None) -> Iterator[tuple[int, int, str]]:
    """Number, first byte and text of each line, its end included."""
    begin, end = part or (0, None)
    with _open(file) as reader:
        if begin:
            reader.seek(begin)
        for number, line in enumerate(reader, 1):
            if end is not None and begin >= end:
                return
            encoding = "utf-8-sig" if begin == 0 else "utf-8"
            yield number, begin, line.decode(encoding, "surrogateescape")
            begin += len(line)


def _line_ends(file: str, part: Part) -> int:
    """Lines that end in a part of a file."""
    begin, end = part
    with Path(file).open("rb") as stream:
        stream.seek(begin)
        chunks = (stream.read(min(CHUNK_BYTES, end - place)) for place in range(begin, end, CHUNK_BYTES))
        return sum(chunk.count(b"\n") for chunk in chunks)


def _begins_list(file: str) -> bool:
    with _open(file) as stream:
        return stream.read(64).decode("utf-8-sig", "replace").lstrip().startswith("[")


def _json_list(file: str) -> Iterator[Row] | None:
    """None unless the whole file is one list."""
    if not _begins_list(file):
        return None
    with open_text(file) as stream:
        try:
            values = json.loads(stream.read())
        except (ValueError, RecursionError):
            return None
    return (_json_row(value, file, number) for number, value in enumerate(values, 1))


def _json_row(value: Any, file: str, number: int) -> Row:
    fault = None if isinstance(value, dict) else f"{type(value).__name__} instead of an object"
    return Row(value, file, number, fault)
