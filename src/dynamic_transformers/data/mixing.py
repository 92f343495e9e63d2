"""Which documents of each source go into a split: proportions in tokens, no document twice."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

from dynamic_transformers.data.documents import Document
from dynamic_transformers.data.tokenization import EncodedDocument

BATCH = 64  # documents tokenized at once; what lies beyond a source's quota is wasted


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights scaled to a sum of 1."""
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def shuffled(documents: Iterable[Document], seed: int, purpose: str) -> list[Document]:
    """Order by a hash of seed, purpose and text: adding a document does not reorder the others."""
    return sorted(documents, key=lambda document: _rank(document, seed, purpose))


def sample_text(
    documents: Mapping[str, Sequence[Document]], weights: Mapping[str, float], characters: int
) -> list[str]:
    """About `characters` of text, each source by its weight, the same for every seed."""
    texts = []
    for name, share in shares(weights).items():
        left = share * characters
        for document in shuffled(documents[name], 0, "sample"):
            if left <= 0:
                break
            texts.append(document.text)
            left -= len(document.text)
    return texts


def count_tokens(documents: Iterable[EncodedDocument]) -> int:
    """Tokens of all documents, markers included."""
    return sum(len(document.input_ids) for document in documents)


def mix(
    documents: Mapping[str, Sequence[Document]],
    weights: Mapping[str, float],
    encode: Callable[[Sequence[Document]], list[EncodedDocument]],
    max_tokens: int | None,
    seed: int,
) -> list[EncodedDocument]:
    """The largest mixture that holds the proportions without repeating a document.

    Args:
        documents: by source.
        weights: by source, any positive scale; the proportions of tokens.
        encode: tokenizes a batch of documents.
        max_tokens: upper limit of the mixture, None for none; each source may pass its part
            of it by the rest of its last document.
        seed: of the order.

    Returns:
        The chosen documents of all sources, shuffled together.
    """
    limit = math.inf if max_tokens is None else float(max_tokens)
    proportions = shares(weights)
    candidates: dict[str, list[EncodedDocument]] = {}

    def characters_per_share(name: str) -> float:
        return sum(len(document.text) for document in documents[name]) / proportions[name]

    # The source that runs out first bounds the others: read first, it saves tokenizing them to their end.
    for name in sorted(documents, key=characters_per_share):
        ordered = shuffled(documents[name], seed, "choose")
        batches = (encode(ordered[start : start + BATCH]) for start in range(0, len(ordered), BATCH))
        candidates[name] = _until(chain.from_iterable(batches), limit * proportions[name])
        if len(candidates[name]) == len(ordered):
            limit = min(limit, count_tokens(candidates[name]) / proportions[name])
    chosen = chain.from_iterable(_until(candidates[name], limit * proportions[name]) for name in candidates)
    # A purpose of its own: ranked as they were chosen, scarcely used sources would all come first.
    return sorted(chosen, key=lambda encoded: _rank(encoded.document, seed, "interleave"))


def _until(encoded: Iterable[EncodedDocument], quota: float) -> list[EncodedDocument]:
    taken = []
    for document in encoded:
        taken.append(document)
        quota -= len(document.input_ids)
        if quota <= 0:
            break
    return taken


def _rank(document: Document, seed: int, purpose: str) -> bytes:
    return hashlib.sha256(f"{seed}:{purpose}:".encode() + document.digest).digest()
