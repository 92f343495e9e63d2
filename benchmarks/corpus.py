"""Real text of this machine as a corpus of any size: its documentation, else its Python packages' sources."""

from __future__ import annotations

import gzip
import hashlib
import json
import site
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path

import pyarrow
import pyarrow.parquet

DOCUMENTATION = ("/usr/share/doc", "/usr/share/info", "/usr/share/man")
LEAST, MOST = 200, 50_000  # characters of a document; a longer file becomes several
FILE_BYTES = 10_000_000  # of text in one file of a corpus
GROUP_ROWS = 1000  # of a parquet file


def write_corpus(
    folder: Path, megabytes: float, format: str = "jsonl", file_bytes: int = FILE_BYTES
) -> list[Path]:
    """Write documents with about so many 10⁶ bytes of text; column `text`.

    Where the machine has less, its text is repeated, each document under the number of its copy.

    Args:
        folder: is made.
        format: jsonl or parquet.
        file_bytes: of text in each file, about.

    Returns:
        The files.
    """
    folder.mkdir(parents=True)
    files, texts = [], documents()
    left = megabytes * 1e6
    while left > 0:
        part = taken(texts, min(left, file_bytes))
        left -= sum(len(text.encode()) for text in part)
        files.append(folder / f"{len(files):05d}.{format}")
        _WRITERS[format](files[-1], part)
    return files


def taken(texts: Iterator[str], size: float) -> list[str]:
    """The next texts, as few as have `size` bytes of UTF-8."""
    found = []
    while size > 0:
        found.append(next(texts))
        size -= len(found[-1].encode())
    return found


def documents() -> Iterator[str]:
    """Texts without end, the same each time, in an order without meaning."""
    for copy in count(1):
        for file in _files():
            text = _text(file)
            for start in range(0, len(text), MOST):
                if len(part := text[start : start + MOST]) >= LEAST:
                    yield part if copy == 1 else f"Copy {copy}\n\n{part}"


@cache
def _files() -> list[Path]:
    """Files that may be texts."""
    found = [path for root in DOCUMENTATION for path in Path(root).rglob("*") if _is_plain(path)]
    if not found:
        roots = [sysconfig.get_path("stdlib"), *site.getsitepackages()]
        found = [path for root in roots for path in Path(root).rglob("*.py") if _is_plain(path)]
    return sorted(found, key=lambda path: hashlib.sha256(str(path).encode()).digest())


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _text(file: Path) -> str:
    """What a file says, decompressed; nothing where it is no text."""
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return ""
    return "" if "\0" in text else text


def _write_jsonl(file: Path, texts: list[str]) -> None:
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def _write_parquet(file: Path, texts: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=GROUP_ROWS)


_WRITERS = {"jsonl": _write_jsonl, "parquet": _write_parquet}
