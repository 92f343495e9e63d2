"""The second pass: documents of all shards, each once, chosen under quotas and put in the mixture's order.

Memory is bounded: documents are taken in parts, by the first bits of their hashes, and what is known of each
of them lies on the disk.
"""

from __future__ import annotations

import heapq
import os
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from dynamic_transformers.data.blocks import Piece, token_dtype
from dynamic_transformers.data.documents import RANKS, SPLITS, rank
from dynamic_transformers.data.pools import CANDIDATE, ORDERED, Choice, Pool
from dynamic_transformers.data.progress import Progress
from dynamic_transformers.data.shards import INDEX, INDEX_FILE, TARGETS, TEXTS, TOKENS, WIDTHS

COMPARED = 1 << 18  # documents at once, about
OPEN_FILES = 400


class ShardFolder(NamedTuple):
    """A finished shard.

    source: number of its source.
    wins: of equal documents, the one of the shard that wins most stays, then that of the first shard.
    masked: whether it says which tokens have a loss.
    """

    folder: Path
    source: int
    wins: int = 0
    masked: bool = False


class Shards:
    """Finished shards, of which a few are open at a time.

    Args:
        shards: in the order of their sources.
        vocab_size: every token id is below it.
    """

    def __init__(self, shards: Sequence[ShardFolder], vocab_size: int):
        self.shards, self.dtype = shards, token_dtype(vocab_size)
        self.documents = [_size(shard.folder / INDEX_FILE) // INDEX.itemsize for shard in shards]
        self._open: OrderedDict[tuple[int, str], BinaryIO] = OrderedDict()

    def __len__(self) -> int:
        return len(self.shards)

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close()

    def index(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Some rows of a shard's index, of dtype INDEX."""
        data = self._read(shard, INDEX_FILE, start * INDEX.itemsize, (stop - start) * INDEX.itemsize)
        return np.frombuffer(data, INDEX)

    def row_of(self, shard: int, bound: int) -> int:
        """Row of a shard's first document whose digest's first 64 bits are not below `bound`."""
        rows = range(self.documents[shard])
        return bisect_left(rows, bound, key=lambda row: int(self.index(shard, row, row + 1)["digest"][0, 0]))

    def piece(self, shard: int, row: int, tokens: int) -> Piece:
        """The first `tokens` tokens of a document."""
        (entry,) = self.index(shard, row, row + 1)
        of, size = self.shards[shard], self.dtype.itemsize
        start, width, width_start = (int(entry[name]) for name in ("start", "width_size", "width_start"))
        ids = np.frombuffer(self._read(shard, TOKENS, start * size, tokens * size), self.dtype)
        widths = np.frombuffer(self._read(shard, WIDTHS, width_start, tokens * width), f"<u{width}")
        targets = np.frombuffer(self._read(shard, TARGETS, start, tokens), bool) if of.masked else None
        return Piece(ids, widths, targets, of.source)

    def text(self, shard: int, row: int) -> str:
        """Text of a document of the test split."""
        (entry,) = self.index(shard, row, row + 1)
        return self._read(shard, TEXTS, int(entry["text_start"]), int(entry["text_bytes"])).decode()

    def _read(self, shard: int, name: str, start: int, size: int) -> bytes:
        key = (shard, name)
        if key not in self._open:
            self._open[key] = (self.shards[shard].folder / name).open("rb", buffering=0)
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(key)
        data = os.pread(self._open[key].fileno(), size, start)
        if len(data) != size:
            raise OSError(f"{self.shards[shard].folder / name}: cut off")
        return data


@dataclass
class Duplicates:
    """Documents that another one is equal to."""

    documents: int = 0
    tokens: int = 0


def each_once(
    shards: Shards, sources: int, seed: int, folder: Path
) -> tuple[dict[str, list[Pool]], list[Duplicates]]:
    """Of equal documents only one, by split and source.

    Args:
        shards: as pass 1 wrote them.
        sources: their number.
        seed: of the training split's order; the others' is always the same, so that runs that differ in
            their seed are judged on the same text.
        folder: is made; holds the pools' files.

    Returns:
        Split → pool of each source, and what was left out of each source.
    """
    folder.mkdir()
    pools = {split: [Pool(folder / f"{split}-{source}") for source in range(sources)] for split in SPLITS}
    left_out = [Duplicates() for _ in range(sources)]
    parts = 1 + sum(shards.documents) // COMPARED
    rows = [0] * len(shards)
    with Progress("looking for duplicates", sum(shards.documents), "documents") as progress:
        for part in range(1, parts + 1):
            ends = [
                shards.documents[shard] if part == parts else shards.row_of(shard, RANKS * part // parts)
                for shard in range(len(shards))
            ]
            found = _documents_between(shards, rows, ends)
            rows = ends
            order = np.lexsort((found["shard"], -found["wins"], *found["digest"].T[::-1]))
            found = found[order]
            again = np.zeros(len(found), dtype=bool)
            again[1:] = (found["digest"][1:] == found["digest"][:-1]).all(axis=1)
            for source in range(sources):
                extra = found[again & (found["source"] == source)]
                left_out[source].documents += len(extra)
                left_out[source].tokens += int(extra["tokens"].sum(dtype=np.int64))
            found = found[~again]
            for number, split in enumerate(SPLITS):
                for source in range(sources):
                    own = found[(found["split"] == number) & (found["source"] == source)]
                    if len(own):
                        pools[split][source].add(_candidates(own, seed if split == "train" else 0))
            progress.add(sum(ends) - progress.done)
    return pools, left_out


def mixture(shards: Shards, pools: Sequence[Pool], choices: Sequence[Sequence[Choice]]) -> Iterator[Piece]:
    """The chosen documents of all sources, shuffled together.

    Args:
        pools: of each source.
        choices: of each source, one for each time that it is read.
    """
    chosen = [choice for epochs in choices for choice in epochs]
    if not chosen:
        return
    parts = 1 + sum(choice.documents for choice in chosen) // ORDERED
    tokens = sum(choice.tokens for choice in chosen)
    with Progress("packing", tokens, "tokens") as progress:
        for part in range(parts):
            bounds = RANKS * part // parts, RANKS * (part + 1) // parts - 1
            for entry in _in_order(pools, choices, *bounds):
                yield shards.piece(int(entry["shard"]), int(entry["row"]), int(entry["tokens"]))
                progress.add(int(entry["tokens"]))


def _in_order(pools: Sequence[Pool], choices: Sequence[Sequence[Choice]], low: int, high: int) -> np.ndarray:
    """The chosen documents whose places in the mixture are from `low` to `high`."""
    here = []
    for pool, epochs in zip(pools, choices, strict=True):
        for candidates in pool.parts() if epochs else ():
            for epoch, choice in enumerate(epochs):
                places = _place(candidates["place"], epoch)
                taken = (candidates["choose"] <= choice.last) & (places >= low) & (places <= high)
                here.append(np.copy(candidates[taken]))
                here[-1]["place"] = places[taken]
                if choice.cut_tokens:
                    here[-1]["tokens"][here[-1]["choose"] == choice.last] = choice.last_tokens
    return np.sort(np.concatenate(here), order=("place", "shard", "row"))


def lowest(shards: Shards, pool: Pool, purpose: str, count: int, shortest: int) -> list[str]:
    """Texts of the test split that come first by a hash of purpose and text.

    Args:
        shortest: bytes that a text has at least.
    """

    def ranked() -> Iterator[tuple[int, int, int]]:
        for part in pool.parts():
            for shard, row in zip(part["shard"].tolist(), part["row"].tolist(), strict=True):
                (entry,) = shards.index(shard, row, row + 1)
                if entry["text_bytes"] >= shortest:
                    yield rank(entry["digest"].tobytes(), 0, purpose), shard, row

    return [shards.text(shard, row) for _, shard, row in heapq.nsmallest(count, ranked())]


# What `each_once` compares.
_FOUND = np.dtype(
    [("digest", ">u8", 4), ("source", "<u4"), ("wins", "i1"), *CANDIDATE.descr[2:], ("split", "u1")]
)


def _documents_between(shards: Shards, starts: Sequence[int], ends: Sequence[int]) -> np.ndarray:
    found = np.empty(sum(ends) - sum(starts), _FOUND)
    place = 0
    for shard, (start, end) in enumerate(zip(starts, ends, strict=True)):
        index, rows = shards.index(shard, start, end), found[place : place + end - start]
        for name in ("digest", "split", "tokens"):
            rows[name] = index[name]
        rows["row"] = np.arange(start, end)
        rows["shard"], rows["source"] = shard, shards.shards[shard].source
        rows["wins"] = shards.shards[shard].wins
        place += end - start
    return found


def _candidates(found: np.ndarray, seed: int) -> np.ndarray:
    candidates = np.empty(len(found), CANDIDATE)
    for name in ("shard", "row", "tokens"):
        candidates[name] = found[name]
    digests = [digest.tobytes() for digest in found["digest"]]
    # A purpose of its own: ranked as they were chosen, scarcely used sources would all come first.
    for column, purpose in (("choose", "choose"), ("place", "interleave")):
        ranks = (rank(digest, seed, purpose) for digest in digests)
        candidates[column] = np.fromiter(ranks, "<u8", len(found))
    return candidates


def _place(places: np.ndarray, epoch: int) -> np.ndarray:
    """Ranks in the mixture of documents that are read once more: others for each epoch (splitmix64)."""
    if not epoch:
        return places
    mixed = places + np.uint64(epoch * 0x9E3779B97F4A7C15 % RANKS)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _size(file: Path) -> int:
    return file.stat().st_size
