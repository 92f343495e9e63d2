"""Records of CSV files, of which a broken one ends with its first line."""

from __future__ import annotations

import csv
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import IO

from dynamic_transformers.data.rows import Part, Reader, Row, UnreadableError, open_text

RECORD_CHARACTERS = 2**26  # a quote that nobody closes shall not hold the whole file

csv.field_size_limit(sys.maxsize)


class Csv(Reader):
    """Records under a header."""

    def __init__(self, delimiter: str) -> None:
        self.delimiter = delimiter

    def columns(self, file: str) -> list[str]:
        """The header."""
        with open_text(file) as stream:
            return self._header(self._reader(stream), file)

    def rows(self, file: str, part: Part | None, columns: Sequence[str]) -> Iterator[Row]:
        """As `Reader.rows`."""
        yield from islice(self._all(file), *(part or (None,)))

    def _reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        # Strict: a quote that nobody closes would make one text of all rows behind it.
        return csv.reader(lines, delimiter=self.delimiter, strict=True)

    def _header(self, reader: Iterator[list[str]], file: str) -> list[str]:
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise UnreadableError(f"{file}: its first line is no header: {error}") from error
        if twice := [name for name, count in Counter(header).items() if count > 1]:
            raise UnreadableError(f"{file}: several columns have the name {twice[0]!r}")
        return header

    def _all(self, file: str) -> Iterator[Row]:
        with open_text(file) as stream:
            lines = RecordLines(stream)
            reader = self._reader(lines)
            header = self._header(reader, file)
            while True:
                number = lines.begin()
                try:
                    record = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield Row(lines.first.rstrip("\r\n"), file, number, str(error))
                    lines.again()
                    reader = self._reader(lines)
                    continue
                if len(record) == len(header):
                    yield Row(dict(zip(header, record, strict=True)), file, number)
                elif record:
                    fault = f"{len(record)} columns instead of {len(header)}"
                    yield Row(self.delimiter.join(record), file, number, fault)


class RecordLines:
    """The lines of a file, of which those of a broken record can be read again, but for its first."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._waiting = stream, deque[str]()
        self._of_record: list[str] = []
        self._characters = self._number = 0

    def begin(self) -> int:
        """Begin a record; returns the number of its first line."""
        self._of_record.clear()
        self._characters = 0
        return self._number + 1

    @property
    def first(self) -> str:
        """The first line of the record."""
        return self._of_record[0]

    def again(self) -> None:
        """Give the lines behind the first once more."""
        behind = self._of_record[1:]
        self._waiting.extendleft(reversed(behind))
        self._number -= len(behind)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._characters > RECORD_CHARACTERS:
            raise csv.Error(f"no end within {RECORD_CHARACTERS} characters")
        line = self._waiting.popleft() if self._waiting else next(self._stream)
        self._number += 1
        self._of_record.append(line)
        self._characters += len(line)
        return line
