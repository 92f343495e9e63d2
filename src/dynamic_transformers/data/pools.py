"""Documents of a source in a split, and which of them a mixture takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dynamic_transformers.data.documents import RANKS

ORDERED = 1 << 20  # documents in memory at once, about
BUCKET_BITS = 16
BUCKETS = 1 << BUCKET_BITS  # of ranks, by their first bits

# A document that stays: its rank among those of its source, its rank in the mixture, where its tokens are.
CANDIDATE = np.dtype(
    [("choose", "<u8"), ("place", "<u8"), ("shard", "<u4"), ("row", "<u4"), ("tokens", "<u4")]
)


class Choice(NamedTuple):
    """Documents of a pool up to a rank.

    last: `choose` of the last one.
    documents, tokens: their numbers.
    last_tokens: so many of the last one are taken, from its beginning.
    cut_tokens: so many of it are not.
    """

    last: int
    documents: int
    tokens: int
    last_tokens: int
    cut_tokens: int = 0


@dataclass
class Pool:
    """Documents of one source in one split, each once, in a file of CANDIDATE.

    Attributes:
        documents, tokens: their numbers.
        bucket_tokens: tokens by the first bits of `choose`, (BUCKETS,).
    """

    file: Path
    documents: int = 0
    tokens: int = 0
    bucket_tokens: np.ndarray = field(default_factory=lambda: np.zeros(BUCKETS, dtype=np.int64))

    def add(self, candidates: np.ndarray) -> None:
        """Append documents."""
        with self.file.open("ab") as file:
            file.write(candidates.data)  # not tofile: it hides that a disk is full
        self.documents += len(candidates)
        self.tokens += int(candidates["tokens"].sum(dtype=np.int64))
        np.add.at(self.bucket_tokens, _bucket_of(candidates["choose"]), candidates["tokens"])

    def parts(self) -> Iterator[np.ndarray]:
        """All documents, some at a time."""
        if not self.documents:
            return
        with self.file.open("rb") as file:
            while len(part := np.fromfile(file, CANDIDATE, ORDERED)):
                yield part

    def first(self, quota: float) -> Choice:
        """The documents of the lowest ranks, as few as have `quota` tokens, or all where there are fewer."""
        sums = np.cumsum(self.bucket_tokens)
        bucket = int(np.searchsorted(sums, min(quota, self.tokens), side="left"))
        inside = [part[_bucket_of(part["choose"]) == bucket] for part in self.parts()]
        ordered = np.sort(np.concatenate(inside), order="choose")
        reached = sums[bucket] - self.bucket_tokens[bucket] + np.cumsum(ordered["tokens"], dtype=np.int64)
        place = int(np.searchsorted(reached, min(quota, self.tokens), side="left"))
        last = int(ordered["choose"][place])
        documents = sum(int((part["choose"] <= last).sum()) for part in self.parts())
        return Choice(last, documents, int(reached[place]), int(ordered["tokens"][place]))

    def times(self, quota: float, limit: int | None, tolerance: float, whole: bool) -> list[Choice]:
        """The choices that have `quota` tokens together: more than one where documents are taken again.

        Args:
            limit: tokens of different documents, at most; None for all that there are.
            tolerance: by which fraction of the quota the last document may pass it; otherwise it is cut.
            whole: it is not cut, but left out where that comes nearer to the quota.
        """
        if not self.documents or quota < 0.5:
            return []
        everything = self.first(self.tokens if limit is None else limit)
        if limit is not None:
            everything = _trimmed(everything, limit, 0, whole)
        # Whole documents end beside the limit: what is missing to it is not read twice.
        rounds, rest = divmod(quota, self.tokens if limit is None else min(limit, self.tokens))
        if rest < 0.5:
            return [everything] * int(rounds)
        excess = min(tolerance * quota, everything.tokens - rest)
        last = _trimmed(self.first(rest), rest, excess, whole)
        # The only source of a kind is not left out for being long, but need not be read once more.
        again = rounds == 0 or not whole or last.tokens - rest <= last.last_tokens / 2
        return [everything] * int(rounds) + [last] * bool(last.documents and again)


def _trimmed(choice: Choice, quota: float, excess: float, whole: bool) -> Choice:
    """A choice whose last document does not pass the quota by more than `excess` tokens."""
    over = choice.tokens - quota
    if over <= excess:
        return choice
    if not whole:
        kept = max(1, choice.last_tokens - int(over))
        cut = choice.last_tokens - kept
        return choice._replace(tokens=choice.tokens - cut, last_tokens=kept, cut_tokens=cut)
    if over <= choice.last_tokens / 2 or choice.documents == 1:
        return choice
    return Choice(choice.last - 1, choice.documents - 1, choice.tokens - choice.last_tokens, 0)


def _bucket_of(ranks: np.ndarray) -> np.ndarray:
    return (ranks >> np.uint64(RANKS.bit_length() - 1 - BUCKET_BITS)).astype(np.int64)
