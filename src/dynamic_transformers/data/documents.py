"""What becomes of a record: a document of one split, or a reason why it is none."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamic_transformers.data.decontamination import Contamination
from dynamic_transformers.data.rows import Row
from dynamic_transformers.data.sources import Shard
from dynamic_transformers.settings import DataSettings, SourceSettings

SPLITS = ("train", "validation", "test")
# What becomes of a record that is no document, as the account of a source names it.
QUARANTINED, FILTERED, UNUSED, CONTAMINATED = "quarantined", "filtered", "unused", "contaminated"
RANKS = 1 << 64  # different ranks


@dataclass(frozen=True, slots=True)
class Document:
    """A text, a conversation (messages) or token ids.

    digest: SHA-256 of that alone: texts that are equal once they are cut are the same.
    cut: whether there was more of it.
    """

    value: str | list[dict[str, Any]] | np.ndarray
    digest: bytes
    split: str
    cut: bool = False

    @property
    def text(self) -> str:
        """What it says; nothing for token ids."""
        if isinstance(self.value, str):
            return self.value
        return "" if isinstance(self.value, np.ndarray) else text_of_messages(self.value)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that is no document.

    outcome: QUARANTINED, FILTERED, UNUSED or CONTAMINATED.
    reason: in words.
    """

    outcome: str
    reason: str


def document_of(
    row: Row,
    shard: Shard,
    source: SourceSettings,
    data: DataSettings,
    contamination: Contamination | None = None,
) -> Document | Rejected:
    """What a row becomes; neither order, seed nor the other rows matter."""
    if row.dropped:
        return Rejected(FILTERED, "left out by the source's filter")
    if row.fault:
        return Rejected(QUARANTINED, row.fault)
    value = row.value
    if isinstance(value, str) and len(value) < data.min_characters:
        return Rejected(FILTERED, "too short")
    limit, cut = data.max_document_characters, False
    if limit is not None and _characters(value) > limit:
        if data.long_documents == "filter" or not isinstance(value, str):
            return Rejected(FILTERED, "too long")
        value, cut = value[:limit], True
    digest = hashlib.sha256(_content(value)).digest()
    split = "validation" if shard.split == "validation" else split_of(digest, data)
    ratio = source.train_subset_ratio
    if split == "train" and ratio is not None and rank(digest, 0, "subset") >= ratio * RANKS:
        return Rejected(UNUSED, "not of the part that train_subset_ratio asks for")
    document = Document(value, digest, split, cut)
    if contamination and (task := contamination.overlaps(document.text)):
        return Rejected(CONTAMINATED, f"quotes {task}")
    return document


def text_of_messages(messages: list[dict[str, Any]]) -> str:
    """What the messages of a conversation say."""
    return "\n".join(str(message.get("content") or "") for message in messages)


def split_of(digest: bytes, data: DataSettings) -> str:
    """Split of a document: its hash as a fraction of 2^256, so neither order, seed nor source matter."""
    percentage = 100 * int.from_bytes(digest) / 2**256
    if percentage < data.test_split_percentage:
        return "test"
    if percentage < data.test_split_percentage + data.validation_split_percentage:
        return "validation"
    return "train"


def rank(digest: bytes, seed: int, purpose: str) -> int:
    """The first 64 bits of a hash that orders documents: adding one does not reorder the others."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{purpose}:".encode() + digest).digest()[:8])


def _characters(value: str | list[dict[str, Any]] | np.ndarray) -> int:
    """Characters of a text or of messages; of token ids their number, which is less."""
    return len(text_of_messages(value)) if isinstance(value, list) else len(value)


def _content(value: Any) -> bytes:
    """The bytes by which two documents are the same."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, np.ndarray):
        return value.astype("<u4").tobytes()
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
