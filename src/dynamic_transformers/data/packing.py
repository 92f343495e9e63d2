"""Encoded documents concatenated and cut into blocks, and the unigram loss that a model has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dynamic_transformers.data.tokenization import EncodedDocument


class PackedSplit(NamedTuple):
    """Blocks of one split (N blocks of T tokens).

    input_ids: (N, T) int32.
    position_ids: (N, T) int32, 0 where a document or a block starts; such a token has no target.
    num_bytes: (N,) int64, UTF-8 bytes of the predicted tokens.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    num_bytes: np.ndarray

    @property
    def targets(self) -> np.ndarray:
        """Ids of the predicted tokens, (number of targets,)."""
        return self.input_ids[self.position_ids != 0]


def pack(documents: Sequence[EncodedDocument], block_size: int) -> PackedSplit:
    """Concatenate documents and cut; a tail shorter than `block_size` is dropped."""
    lengths = np.array([len(document.input_ids) for document in documents], dtype=np.int64)
    ids, widths = (
        np.concatenate([np.empty(0, dtype=np.int32), *columns])
        for columns in (
            [document.input_ids for document in documents],
            [document.num_bytes for document in documents],
        )
    )
    index = np.arange(len(ids))
    document_starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    positions = index - np.maximum(document_starts, index - index % block_size)
    kept = len(ids) - len(ids) % block_size
    ids, widths, positions = (column[:kept].reshape(-1, block_size) for column in (ids, widths, positions))
    return PackedSplit(
        ids, positions.astype(np.int32), (widths * (positions != 0)).sum(axis=1, dtype=np.int64)
    )


def token_sources(documents: Sequence[EncodedDocument], names: Sequence[str], block_size: int) -> np.ndarray:
    """Of which source each token of the packed blocks is, as its place in `names`, (N, T) int16."""
    places = np.array([names.index(document.document.source) for document in documents], dtype=np.int16)
    ids = np.repeat(places, [len(document.input_ids) for document in documents])
    return ids[: len(ids) - len(ids) % block_size].reshape(-1, block_size)


def unigram_loss(train: PackedSplit, split: PackedSplit, vocab_size: int) -> float | None:
    """Nats per target of `split` under add-one-smoothed unigram counts of the targets of `train`.

    None when `split` has no targets.
    """
    targets = split.targets
    if not len(targets):
        return None
    counts = np.bincount(train.targets, minlength=vocab_size) + 1
    return float(-np.log(counts / counts.sum())[targets].mean())
