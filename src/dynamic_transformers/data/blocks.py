"""Blocks of tokens on the disk: flat files that are mapped into memory.

A split is a folder with these little-endian files, N blocks of T tokens:

- `tokens.bin`: token ids, N·T, uint16 where the vocabulary fits, else uint32;
- `ends.bin`: int64, for each piece, which is a document or a part of one, the place behind its last token;
- `sources.bin`: uint16, the number of each piece's source, or PADDING for what only fills a block;
- `bytes.bin`: uint32, N, UTF-8 bytes of each block's targets;
- `targets.bin`: one bit for each token (the first is the highest of a byte), where documents have tokens
  without a loss; there is no such file where all but the first tokens are targets.

Positions and documents follow from the ends.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from copy import copy
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dynamic_transformers.manifest import digest

if TYPE_CHECKING:
    import torch

IGNORED = -100  # label of a token without a loss, as in transformers
PADDING = np.iinfo(np.uint16).max
FLUSH_TOKENS = 1 << 20  # that wait in memory, about

TOKENS, ENDS, SOURCES, BYTES, TARGETS = "tokens.bin", "ends.bin", "sources.bin", "bytes.bin", "targets.bin"


class Piece(NamedTuple):
    """Tokens that follow each other in one document, n of them.

    input_ids: (n,), any integers.
    num_bytes: (n,), UTF-8 bytes that each token stands for.
    targets: (n,) bool, which tokens have a loss; None: all that something in front predicts.
    source: number of its source, or PADDING.
    """

    input_ids: np.ndarray
    num_bytes: np.ndarray
    targets: np.ndarray | None
    source: int

    def part(self, start: int, stop: int) -> Piece:
        """Its tokens from `start` up to `stop`."""
        targets = None if self.targets is None else self.targets[start:stop]
        return Piece(self.input_ids[start:stop], self.num_bytes[start:stop], targets, self.source)


def token_dtype(vocab_size: int) -> np.dtype:
    """What token ids are written as."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class BlockWriter:
    """Writes pieces one after the other and cuts them into blocks; a tail shorter than a block is dropped.

    Args:
        folder: is made.
        block_size: T.
        vocab_size: every token id is below it.
        masked: whether pieces may say which tokens have a loss.
    """

    def __init__(self, folder: Path, block_size: int, vocab_size: int, masked: bool = False):
        folder.mkdir()
        self.block_size, self.dtype = block_size, token_dtype(vocab_size)
        self.target_counts = np.zeros(vocab_size, dtype=np.int64)  # how often each id is a target
        self.added = self.written = self.bytes = self.padding = 0
        names = [TOKENS, ENDS, SOURCES, BYTES, *([TARGETS] if masked else [])]
        self._files = {name: HashedFile(folder / name) for name in names}
        self._waiting: list[Piece] = []
        self._ends: list[tuple[int, int]] = []  # end and source of pieces whose end is not written

    def add(self, piece: Piece) -> None:
        """Write a piece behind those before."""
        size = len(piece.input_ids)
        self._ends.append((self.added + size, piece.source))
        self.padding += size if piece.source == PADDING else 0
        for start in range(0, size, FLUSH_TOKENS):
            part = piece.part(start, start + FLUSH_TOKENS)
            self._waiting.append(part)
            self.added += len(part.input_ids)
            if self.added - self.written >= FLUSH_TOKENS:
                self._write(8 * self.block_size)  # targets are whole bytes

    def close(self) -> dict[str, Any]:
        """Write what is left and return the split's facts for the manifest."""
        self._write(self.block_size)
        if self._ends and self.written:  # of the piece that goes on behind the last block
            self._write_ends([(self.written, self._ends[0][1])])
        files = {name: file.close() for name, file in self._files.items()}
        return {
            "blocks": self.written // self.block_size,
            "tokens": self.written,
            "target_tokens": int(self.target_counts.sum()),
            "bytes": self.bytes,
            "padding_tokens": self.padding,
            "dropped_tokens": self.added - self.written,
            "token_dtype": self.dtype.str,
            "sha256": digest(files),
            "files": files,
        }

    def _write(self, unit: int) -> None:
        """Write the waiting tokens but for what goes over a multiple of `unit`."""
        count = (self.added - self.written) // unit * unit
        if not count:
            return
        ids, widths, targets = (
            np.concatenate(columns) for columns in zip(*map(_columns, self._waiting), strict=True)
        )
        self._waiting = [Piece(ids[count:], widths[count:], targets[count:], PADDING)]
        starts = np.array([end for end, _ in self._ends]) - self.written
        ids, widths, targets = ids[:count], widths[:count], targets[:count]
        predicted = targets.copy()
        predicted[starts[starts < count]] = False
        predicted[:: self.block_size] = False
        self.target_counts += np.bincount(ids[predicted], minlength=len(self.target_counts))
        block_bytes = (widths * predicted).reshape(-1, self.block_size).sum(axis=1)
        self.bytes += int(block_bytes.sum())
        self._files[TOKENS].write(ids.astype(self.dtype))
        self._files[BYTES].write(block_bytes.astype("<u4"))
        if TARGETS in self._files:
            self._files[TARGETS].write(np.packbits(targets))
        self.written += count
        done = bisect_right(self._ends, self.written, key=itemgetter(0))
        self._write_ends(self._ends[:done])
        del self._ends[:done]

    def _write_ends(self, pieces: Sequence[tuple[int, int]]) -> None:
        ends, sources = np.array(pieces, dtype=np.int64).reshape(-1, 2).T
        self._files[ENDS].write(ends.astype("<i8"))
        self._files[SOURCES].write(sources.astype("<u2"))


def _columns(piece: Piece) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, bytes and targets of a piece, (n,) each."""
    count = len(piece.input_ids)
    targets = np.full(count, piece.source != PADDING) if piece.targets is None else piece.targets
    return np.asarray(piece.input_ids, np.int64), np.asarray(piece.num_bytes, np.int64), targets


class HashedFile:
    """A file that is written once from its beginning, and its SHA-256."""

    def __init__(self, path: Path):
        self._file, self._digest = path.open("wb"), hashlib.sha256()

    def write(self, values: np.ndarray) -> None:
        """Append the bytes of an array."""
        data = np.ascontiguousarray(values).data
        self._file.write(data)
        self._digest.update(data)

    def close(self) -> str:
        """SHA-256 of what was written."""
        self._file.close()
        return self._digest.hexdigest()


class Blocks:
    """Blocks of a split, or some of them.

    Attributes:
        block_size: T.
        places: which blocks of the split these are, (N,).

    Raises:
        OSError, ValueError: a file is missing, or has not the size that the facts say.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], block_size: int):
        self.block_size = block_size
        count = facts["blocks"]
        self._tokens = _map(folder / TOKENS, facts["token_dtype"], count * block_size)
        self._ends = _map(folder / ENDS, "<i8")
        self._sources = _map(folder / SOURCES, "<u2", len(self._ends))
        self._bytes = _map(folder / BYTES, "<u4", count)
        masked = TARGETS in facts["files"]
        self._targets = _map(folder / TARGETS, "u1", -(-count * block_size // 8)) if masked else None
        self.places = np.arange(count)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all targets."""
        return int(self._bytes[self.places].sum(dtype=np.int64))

    def select(self, places: Sequence[int] | np.ndarray) -> Blocks:
        """The blocks at these places of this selection."""
        chosen = copy(self)
        chosen.places = self.places[places]
        return chosen

    def input_ids(self, place: int) -> np.ndarray:
        """Token ids of one block, (T,) int64."""
        return self._tokens[self._span(place)].astype(np.int64)

    def position_ids(self, place: int) -> np.ndarray:
        """Places of a block's tokens in their pieces, (T,) int64; 0 where a document or a block starts."""
        ends, sources = self._pieces(place)
        index = np.arange(self.block_size)
        starts = np.zeros(self.block_size, dtype=np.int64)
        starts[ends[:-1]] = ends[:-1]
        positions = index - np.maximum.accumulate(starts)
        positions[np.repeat(sources == PADDING, np.diff(ends, prepend=0))] = 0
        return positions

    def sources(self, place: int) -> np.ndarray:
        """Numbers of the sources of a block's tokens, (T,) int64."""
        ends, sources = self._pieces(place)
        return np.repeat(sources.astype(np.int64), np.diff(ends, prepend=0))

    def targets(self, place: int) -> np.ndarray:
        """Which tokens of a block have a loss, (T,) bool: not the first of a piece or of a block."""
        return self._with_loss(place, self.position_ids(place))

    def _with_loss(self, place: int, positions: np.ndarray) -> np.ndarray:
        predicted = positions != 0
        if self._targets is not None:
            span = self._span(place)
            bits = np.unpackbits(self._targets[span.start // 8 : -(-span.stop // 8)])
            predicted &= bits[span.start % 8 :][: self.block_size].astype(bool)
        return predicted

    def batch(self, places: Sequence[int] | range) -> dict[str, torch.Tensor]:
        """Blocks as a batch of B: `input_ids`, `position_ids` and `labels`, each (B, T) int64.

        Labels are not shifted; tokens without a loss have none (-100).
        """
        # Not above: the processes that read shards need nothing of it.
        import torch

        ids = np.stack([self.input_ids(place) for place in places])
        positions = np.stack([self.position_ids(place) for place in places])
        targets = np.stack([self._with_loss(*pair) for pair in zip(places, positions, strict=True)])
        columns = {"input_ids": ids, "position_ids": positions, "labels": np.where(targets, ids, IGNORED)}
        return {name: torch.from_numpy(column) for name, column in columns.items()}

    def _span(self, place: int) -> slice:
        start = int(self.places[place]) * self.block_size
        return slice(start, start + self.block_size)

    def _pieces(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Ends within the block, the last one being T, and sources of the pieces of a block, (P,) each."""
        span = self._span(place)
        first = np.searchsorted(self._ends, span.start, side="right")
        last = np.searchsorted(self._ends, span.stop, side="left")
        ends = np.minimum(self._ends[first : last + 1] - span.start, self.block_size)
        return ends, self._sources[first : last + 1]


def _map(file: Path, dtype: str, count: int | None = None) -> np.ndarray:
    """A file's values, read when they are used."""
    size = file.stat().st_size
    if count is not None and size != count * np.dtype(dtype).itemsize:
        raise ValueError(f"{file.name} has {size} bytes instead of {count * np.dtype(dtype).itemsize}")
    return np.memmap(file, dtype=dtype, mode="r") if size else np.empty(0, dtype)


def unigram_loss(train: np.ndarray, split: np.ndarray) -> float | None:
    """Nats per target of a split under add-one-smoothed unigram counts of the training targets.

    Args:
        train, split: how often each token id is a target, (V,).

    Returns:
        The loss that a model has to beat, or None where the split has no targets.
    """
    if not split.any():
        return None
    smoothed = train + 1
    return float(-(split * np.log(smoothed / smoothed.sum())).sum() / split.sum())
