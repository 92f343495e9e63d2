"""The first pass: shards of a source become token ids with an index, in a folder of their own.

A finished shard's folder holds:

- `index.bin`: one entry for each document, see INDEX, in the order of the digests' first 64 bits;
- `tokens.bin`: token ids, document after document, markers included, as `blocks.token_dtype` says;
- `widths.bin`: UTF-8 bytes of each token, in the smallest integers that hold those of a document;
- `targets.bin`: uint8, whether each token has a loss; only of conversations;
- `texts.bin`: UTF-8 texts of the documents of the test split, which tasks are made of;
- `account.json`: what became of the records.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dynamic_transformers.data import arithmetic
from dynamic_transformers.data.blocks import token_dtype
from dynamic_transformers.data.decontamination import Contamination
from dynamic_transformers.data.documents import QUARANTINED, SPLITS, Document, Rejected, document_of
from dynamic_transformers.data.encoding import DocumentEncoder, Encoded
from dynamic_transformers.data.files import digest_of
from dynamic_transformers.data.rows import Row
from dynamic_transformers.data.sources import Shard, read_shard
from dynamic_transformers.manifest import write_json
from dynamic_transformers.settings import DataSettings, SourceSettings

QUARANTINE_RECORDS = 10  # kept for each source
BATCH_CHARACTERS = 500_000  # tokenized at once, about

INDEX_FILE, ACCOUNT_FILE = "index.bin", "account.json"
TOKENS, WIDTHS, TARGETS, TEXTS = "tokens.bin", "widths.bin", "targets.bin", "texts.bin"
UNSORTED = "unsorted.bin"  # the index, until the last document is known
SORTED = 1 << 16  # entries of it in memory at once
# start: of the document's tokens, in tokens; width_start: of its widths, in bytes of that file, each of
# width_size bytes; text_start, text_bytes: of its text, in bytes.
INDEX = np.dtype(
    [
        ("digest", ">u8", 4),
        ("split", "u1"),
        ("tokens", "<u4"),
        ("start", "<u8"),
        ("width_size", "u1"),
        ("width_start", "<u8"),
        ("text_bytes", "<u4"),
        ("text_start", "<u8"),
    ]
)


@dataclass
class Account:
    """What became of the records of shards.

    Attributes:
        records: outcome → how many; their sum is the number of records.
        cut: documents that went on beyond `data.max_document_characters`.
        tokens: of all documents.
        quarantine: the first records that are broken.
        questions: arithmetic expressions in documents of the training split, as far as they could be asked.
    """

    records: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    tokens: int = 0
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    questions: set[arithmetic.Key] = field(default_factory=set)

    def add(self, other: Account) -> None:
        """Take over what became of the records of the next shard of the same source."""
        self.records += other.records
        self.cut, self.tokens = self.cut + other.cut, self.tokens + other.tokens
        self.quarantine = [*self.quarantine, *other.quarantine][:QUARANTINE_RECORDS]
        self.questions |= other.questions

    def reject(self, source: str, row: Row, why: Rejected) -> None:
        """Count a record that is no document, and keep it if it is one of the first that are broken."""
        self.records[why.outcome] += 1
        if why.outcome == QUARANTINED and len(self.quarantine) < QUARANTINE_RECORDS:
            place = {"source": source, "file": row.file and str(row.file), "row": row.number}
            self.quarantine.append({**place, "reason": why.reason, "record": repr(row.value)[:200]})

    def write(self, folder: Path) -> None:
        """Write it into a shard's folder."""
        values = vars(self) | {"questions": sorted(self.questions)}
        write_json(folder / ACCOUNT_FILE, values)

    @classmethod
    def read(cls, folder: Path) -> Account:
        """The account of a finished shard."""
        values = json.loads((folder / ACCOUNT_FILE).read_text(encoding="utf-8"))
        values["records"] = Counter(values["records"])
        values["questions"] = set(map(tuple, values["questions"]))
        return cls(**values)


def write_shards(
    folder: Path,
    shards: Sequence[Shard],
    source: SourceSettings,
    data: DataSettings,
    encoder: DocumentEncoder,
) -> int:
    """Read shards of one source and split, and write their folder, which is there and empty.

    Returns:
        The number of tokens.

    Raises:
        UserError: a shard cannot be read to its end.
    """
    account = Account()
    writer = ShardWriter(folder, encoder)
    for row, document in documents_of(shards, source, data, account):
        try:
            writer.add(document)
        except ValueError as error:  # the chat template refuses it
            account.reject(source.name, row, Rejected(QUARANTINED, str(error)))
            continue
        account.records["documents"] += 1
        account.cut += document.cut
        if document.split == "train" and data.arithmetic_examples:
            text = encoder.text_of(document)
            account.questions.update(filter(arithmetic.could_be_asked, arithmetic.expressions(text)))
    account.tokens = writer.close()
    account.write(folder)
    return account.tokens


def documents_of(
    shards: Sequence[Shard], source: SourceSettings, data: DataSettings, account: Account
) -> Iterator[tuple[Row, Document]]:
    """The documents of shards; what becomes of the other records goes into the account."""
    texts = data.decontaminate and Path(data.decontaminate)
    contamination = _contamination(texts, digest_of(texts)) if texts else None
    for shard in shards:
        for row in read_shard(source, shard):
            found = document_of(row, shard, source, data, contamination)
            if isinstance(found, Rejected):
                account.reject(source.name, row, found)
            else:
                yield row, found


@cache
def _contamination(file: Path, digest: str) -> Contamination:
    return Contamination.read(file)


class ShardWriter:
    """Tokenizes documents and writes them with their index.

    Args:
        folder: is there and empty.
    """

    def __init__(self, folder: Path, encoder: DocumentEncoder):
        self.folder, self.encoder = folder, encoder
        self.dtype = token_dtype(encoder.texts.vocab_size)
        names = (TOKENS, WIDTHS, TARGETS, TEXTS, UNSORTED)
        self._files = {name: (folder / name).open("wb") for name in names}
        self._waiting: list[Document] = []
        self._waiting_characters = self._tokens = 0

    def add(self, document: Document) -> None:
        """Take one more document.

        Raises:
            ValueError: it is a conversation that the chat template refuses.
        """
        if not isinstance(document.value, str):
            self._write(document, self.encoder.other(document.value))
            return
        self._waiting.append(document)
        self._waiting_characters += len(document.value)
        if self._waiting_characters >= BATCH_CHARACTERS:
            self._write_texts()

    def close(self) -> int:
        """Write what is left, and the index; returns the number of tokens."""
        self._write_texts()
        for file in self._files.values():
            file.close()
        unsorted = self.folder / UNSORTED
        size = unsorted.stat().st_size
        index = np.memmap(unsorted, INDEX, "r") if size else np.empty(0, INDEX)
        order = np.argsort(index["digest"][:, 0], kind="stable")
        with (self.folder / INDEX_FILE).open("wb") as file:
            for start in range(0, len(order), SORTED):
                file.write(index[order[start : start + SORTED]].data)  # not tofile: it hides a full disk
        unsorted.unlink()
        return self._tokens

    def _write_texts(self) -> None:
        encoded = self.encoder.texts([document.text for document in self._waiting])
        for document, tokens in zip(self._waiting, encoded, strict=True):
            self._write(document, tokens)
        self._waiting, self._waiting_characters = [], 0

    def _write(self, document: Document, encoded: Encoded) -> None:
        ids, widths, targets = encoded
        size = np.min_scalar_type(widths.max()).itemsize
        text = b""
        if document.split == "test":
            text = self.encoder.text_of(document).encode()
        entry = (
            np.frombuffer(document.digest, ">u8"),
            SPLITS.index(document.split),
            len(ids),
            self._tokens,
            size,
            self._files[WIDTHS].tell(),
            len(text),
            self._files[TEXTS].tell(),
        )
        self._files[UNSORTED].write(np.array(entry, INDEX).data)
        self._files[TOKENS].write(ids.astype(self.dtype).data)
        self._files[WIDTHS].write(widths.astype(f"<u{size}").data)
        if targets is not None:
            self._files[TARGETS].write(targets.astype("u1").data)
        self._files[TEXTS].write(text)
        self._tokens += len(ids)
