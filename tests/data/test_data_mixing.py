"""Proportions in tokens, no document twice, and no more tokenized than needed."""

import hashlib

import numpy as np
import pytest

from dynamic_transformers.data.documents import Document
from dynamic_transformers.data.mixing import BATCH, count_tokens, mix, sample_text, shuffled
from dynamic_transformers.data.tokenization import EncodedDocument

WEIGHTS = {"a": 2.0, "b": 1.0, "c": 1.0}


def encode(documents):
    """One token a character."""
    return [
        EncodedDocument(d, np.zeros(len(d.text), np.int32), np.ones(len(d.text), np.int32)) for d in documents
    ]


@pytest.fixture
def documents(make_texts):
    sizes = {"a": 900, "b": 150, "c": 600}
    return {
        name: [
            Document(text, name, hashlib.sha256(text.encode()).digest())
            for text in make_texts(size, seed=index)
        ]
        for index, (name, size) in enumerate(sizes.items())
    }


@pytest.mark.parametrize("max_tokens", [None, 5000, 60000, 10**9])
def test_realised_proportions_are_the_asked_ones_to_a_document(documents, max_tokens):
    chosen = mix(documents, WEIGHTS, encode, max_tokens, seed=0)
    assert len({encoded.document.digest for encoded in chosen}) == len(chosen)
    by_source = {n: [encoded for encoded in chosen if encoded.document.source == n] for n in WEIGHTS}
    scarce = sum(len(document.text) for document in documents["b"])
    total = min(4 * scarce, max_tokens or 10**9)
    longest = max(len(document.text) for texts in documents.values() for document in texts)
    for name, weight in WEIGHTS.items():
        excess = count_tokens(by_source[name]) - weight / 4 * total
        assert 0 <= excess + 1e-6 < longest
    if total == 4 * scarce:
        assert len(by_source["b"]) == len(documents["b"])


def test_only_what_is_needed_is_tokenized(documents):
    seen = []

    def counting(batch):
        seen.extend(batch)
        return encode(batch)

    mix(documents, WEIGHTS, counting, 4000, seed=0)
    assert len(seen) == 3 * BATCH
    seen.clear()
    mix(documents, WEIGHTS, counting, None, seed=0)
    per_source = {name: sum(document.source == name for document in seen) for name in WEIGHTS}
    assert per_source["b"] == 150 and per_source["c"] < 150 + 2 * BATCH and per_source["a"] < 300 + 2 * BATCH


def test_order_depends_on_the_seed_and_not_on_the_order_of_reading(documents):
    def digests(documents, seed):
        return [encoded.document.digest for encoded in mix(documents, WEIGHTS, encode, 20000, seed)]

    backwards = {name: texts[::-1] for name, texts in reversed(documents.items())}
    assert digests(documents, 0) == digests(backwards, 0)
    assert set(digests(documents, 0)) != set(digests(documents, 1))


def test_sources_are_interleaved_evenly(documents):
    weights = {"a": 20.0, "c": 1.0}
    chosen = mix({name: documents[name] for name in weights}, weights, encode, None, seed=0)
    places = [place / len(chosen) for place, encoded in enumerate(chosen) if encoded.document.source == "c"]
    assert len(places) > 20
    assert np.mean(places) == pytest.approx(0.5, abs=0.2)


def test_tokenizer_sample_follows_the_weights(documents):
    texts = sample_text(documents, WEIGHTS, 8000)
    starts = {"a": "0.", "b": "1.", "c": "2."}
    for name, weight in WEIGHTS.items():
        characters = sum(len(text) for text in texts if text.startswith(starts[name]))
        assert characters == pytest.approx(weight / 4 * 8000, abs=1000)
    assert texts == sample_text({name: texts[::-1] for name, texts in documents.items()}, WEIGHTS, 8000)


def test_a_new_document_does_not_reorder_the_others(documents):
    before = shuffled(documents["b"], 3, "x")
    assert [d for d in shuffled(documents["b"] + documents["c"], 3, "x") if d.source == "b"] == before
    assert before != documents["b"]
