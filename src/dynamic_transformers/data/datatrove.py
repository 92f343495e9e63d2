"""Token ids of the files that datatrove's DocumentTokenizer writes.

Beside `x.ds`, the tokens as uint16 or uint32, stand `x.ds.index`, the end of each document in tokens as
uint64, and `x.ds.metadata`, whose first line is `tokenizer|bytes of a token`. All are little-endian.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from dynamic_transformers.data.encoding import byte_lengths
from dynamic_transformers.data.files import digest_of
from dynamic_transformers.data.rows import Division, Part, Reader, Row, UnreadableError
from dynamic_transformers.data.tables import at_most, divided
from dynamic_transformers.refusals import reason_of

PIECE = 1024  # documents; no part is smaller


class Datatrove(Reader):
    """The documents of a file as token ids (N,), without what begins and ends them."""

    def columns(self, file: str) -> list[str]:
        """None: there are only tokens."""
        _borders(file)
        return []

    def rows(self, file: str, part: Part | None, columns: Sequence[str]) -> Iterator[Row]:
        """As `Reader.rows`; `value` is an array.

        Raises:
            UnreadableError: files that do not belong together, or no tokenizer that the metadata name.
        """
        borders, dtype = _borders(file)
        markers = _markers(file)
        first, last = part or (0, len(borders) - 1)
        with Path(file).open("rb") as stream:
            stream.seek(int(borders[first]) * dtype.itemsize)
            for number, size in enumerate(np.diff(borders[first : last + 1]), first + 1):
                document = np.empty(size, dtype)
                if stream.readinto(document.data) < document.nbytes:
                    raise UnreadableError(f"{file}: was cut while it was read: it ends in document {number}")
                inner = np.flatnonzero(~np.isin(document, markers))
                yield Row(document[inner[0] : inner[-1] + 1] if len(inner) else document[:0], file, number)

    def count(self, file: str, most: int | None = None) -> int:
        """As `Reader.count`, from the index."""
        return at_most(len(_borders(file)[0]) - 1, most)

    def parts(self, file: str, records: Part | None, size: int) -> list[Division]:
        """As `Reader.parts`, from the index."""
        borders, dtype = _borders(file)
        documents = len(borders) - 1
        pieces = np.array([*range(0, documents, PIECE), documents])
        sizes = np.diff(borders[pieces]) * dtype.itemsize
        return divided(records, np.diff(pieces).tolist(), sizes.tolist())


def tokenizer_of(file: str) -> str | None:
    """The tokenizer that a file's metadata name; None where there are none, or they name none."""
    metadata = Path(f"{file}.metadata")
    if not metadata.is_file():
        return None
    line = metadata.read_text(encoding="utf-8").partition("\n")[0]
    name = line.rpartition("|")[0] or line  # early versions write the name alone
    return None if name in ("", "Unknown Tokenizer") else name


def check_tokenizer(file: str, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer to which the tokens of a file mean something else.

    Raises:
        UnreadableError: says so, or that the file's tokenizer cannot be had.
    """
    own, given = _tokenizer_of(file).get_vocab(), tokenizer.get_vocab()
    if not own.items() <= given.items():
        raise UnreadableError(
            f"{file}: its tokens are those of {tokenizer_of(file)}, which data.tokenizer_name does not have: "
            "name that tokenizer there, or one that adds tokens to it"
        )
    if byte_lengths(tokenizer) is None:
        raise UnreadableError(
            f"{file}: tokens are read with byte-level tokenizers only; give the texts as a source"
        )


def _borders(file: str) -> tuple[np.ndarray, np.dtype]:
    """Where documents begin and end, in tokens, (documents + 1,) int64; the type of a token."""
    if Path(f"{file}.loss").exists():
        raise UnreadableError(f"{file}.loss: masks of datatrove are not read; write the folder without them")
    index = Path(f"{file}.index")
    if not index.is_file():
        raise UnreadableError(f"{index} is missing: datatrove writes it beside {file}")
    borders = np.concatenate([[0], np.fromfile(index, dtype="<u8").astype(np.int64)])
    size, tokens = Path(file).stat().st_size, int(borders[-1])
    width = size // tokens if tokens else 0
    if width not in (2, 4) or width * tokens != size or np.any(np.diff(borders) < 0):
        raise UnreadableError(
            f"{file}: {size} bytes do not fit the index beside it: one of them is cut off or another's"
        )
    return borders, np.dtype(f"<u{width}")


def _markers(file: str) -> np.ndarray:
    """Ids that begin and end documents: the special tokens of the tokenizer."""
    tokens = _tokenizer_of(file).get_added_tokens_decoder()
    return np.array([number for number, token in tokens.items() if token.special])


def _tokenizer_of(file: str) -> Tokenizer:
    name = tokenizer_of(file)
    if name is None:
        raise UnreadableError(f"{file}.metadata names no tokenizer: its tokens cannot be read")
    try:
        found = _file_of(name)
        return _load(found, digest_of(found))
    except OSError as error:
        raise UnreadableError(f"{file}.metadata: its tokenizer {name}: {reason_of(error)}") from error


def _file_of(name: str) -> Path:
    """The tokenizer.json of the hub, of a folder, or that this is."""
    if Path(name).is_file():
        return Path(name)
    # Not above: other sources need nothing of it.
    from transformers.utils.hub import cached_file

    return Path(str(cached_file(name, "tokenizer.json")))


@cache
def _load(file: Path, digest: str) -> Tokenizer:
    return Tokenizer.from_file(str(file))
