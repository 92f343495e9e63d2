"""Documents: sound records, each once, assigned to a split by the hash of their text."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from typing import Any

from dynamic_transformers.data.sources import read_records
from dynamic_transformers.settings import DataSettings, SourceSettings, UserError

SPLITS = ("train", "validation", "test")
QUARANTINE_RECORDS = 10  # kept for each source

logger = logging.getLogger("dynamic_transformers")


@dataclass(frozen=True, slots=True)
class Document:
    """One text; `digest` is the SHA-256 of its UTF-8 bytes."""

    text: str
    source: str
    digest: bytes


@dataclass
class SourceCounts:
    """What became of the records of one source."""

    documents_in: int = 0
    filtered: int = 0
    duplicates: int = 0
    quarantined: int = 0


@dataclass
class Corpus:
    """All documents by split and source (in configuration order), and the account of them."""

    splits: dict[str, dict[str, list[Document]]]
    counts: dict[str, SourceCounts] = field(default_factory=dict)
    quarantine: list[dict[str, Any]] = field(default_factory=list)

    def held_out(self, source: str) -> int:
        """Documents of a source that are not trained on, since their hash puts them into another split."""
        return sum(len(self.splits[split][source]) for split in SPLITS if split != "train")


def collect(data: DataSettings) -> Corpus:
    """Read every source; the first of equal texts, in configuration order, is the one that stays.

    Raises:
        UserError: a source cannot be read, has too many broken records, or leaves a split empty.
    """
    corpus = Corpus({split: {source.name: [] for source in data.dataset_configs} for split in SPLITS})
    seen: set[bytes] = set()
    for source in data.dataset_configs:
        _read_source(source, data, corpus, seen)
        _check_splits(source.name, data, corpus)
    return corpus


def split_of(digest: bytes, data: DataSettings) -> str:
    """Split of a text: its hash as a fraction of 2^256, so neither order, seed nor source matter."""
    percentage = 100 * int.from_bytes(digest) / 2**256
    if percentage < data.test_split_percentage:
        return "test"
    if percentage < data.test_split_percentage + data.validation_split_percentage:
        return "validation"
    return "train"


def _read_source(source: SourceSettings, data: DataSettings, corpus: Corpus, seen: set[bytes]) -> None:
    counts = corpus.counts[source.name] = SourceCounts()
    broken = []
    for row in read_records(source):
        record = row.value
        counts.documents_in += 1
        if reason := row.fault or _broken(record):
            counts.quarantined += 1
            if len(broken) < QUARANTINE_RECORDS:
                place = {"source": source.name, "file": row.file and str(row.file), "row": row.number}
                broken.append({**place, "reason": reason, "record": repr(record)[:200]})
            continue
        if len(record) < data.min_characters:
            counts.filtered += 1
            continue
        digest = hashlib.sha256(record.encode()).digest()
        if digest in seen:
            counts.duplicates += 1
            continue
        seen.add(digest)
        corpus.splits[split_of(digest, data)][source.name].append(Document(record, source.name, digest))
    corpus.quarantine += broken
    if broken and counts.quarantined > data.max_broken_fraction * counts.documents_in:
        first = broken[0]
        raise UserError(
            f"data.dataset_configs.{source.name}: {counts.quarantined} of {counts.documents_in} records are "
            f"broken, more than data.max_broken_fraction={data.max_broken_fraction}; "
            f"the first is {first['file'] or 'the source'}, row {first['row']}, {first['reason']}: "
            f"{first['record'][:60]}"
        )
    logger.info(
        "source %s: %d records read, %d too short, %d duplicates, %d quarantined",
        source.name,
        counts.documents_in,
        counts.filtered,
        counts.duplicates,
        counts.quarantined,
    )


def _broken(record: Any) -> str | None:
    if not isinstance(record, str):
        return f"{type(record).__name__} instead of str"
    try:
        record.encode()
    except UnicodeEncodeError:
        return "no valid UTF-8"
    return None


def _check_splits(name: str, data: DataSettings, corpus: Corpus) -> None:
    percentages = {
        "validation": data.validation_split_percentage,
        "test": data.test_split_percentage,
        "train": 100 - data.validation_split_percentage - data.test_split_percentage,
    }
    usable = sum(len(corpus.splits[split][name]) for split in SPLITS)
    for split, percentage in percentages.items():
        if percentage > 0 and not corpus.splits[split][name]:
            raise UserError(
                f"data.dataset_configs.{name}: none of its {usable} usable documents falls into the {split} "
                f"split ({percentage:g} %); give it more documents or that split another percentage"
            )
