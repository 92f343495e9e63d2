"""The packing contract and the unigram loss, against hand computations."""

import math

import numpy as np
import pytest

from dynamic_transformers.data.documents import Document
from dynamic_transformers.data.loading import collate
from dynamic_transformers.data.packing import PackedSplit, pack, token_sources, unigram_loss
from dynamic_transformers.data.tokenization import EncodedDocument, encode, train_tokenizer


def document(ids, widths, source="a"):
    return EncodedDocument(Document("", source, b""), np.array(ids, np.int32), np.array(widths, np.int32))


def test_blocks_positions_and_bytes_by_hand():
    documents = [
        document([9, 1, 2, 9], [0, 3, 1, 0]),
        document([9, 3, 4, 5, 6, 9], [0, 2, 2, 5, 1, 0]),
        document([9, 7, 9], [0, 8, 0]),
    ]
    packed = pack(documents, 5)
    assert packed.input_ids.tolist() == [[9, 1, 2, 9, 9], [3, 4, 5, 6, 9]]  # 9 7 9 fills no block
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 3, 4]]
    assert packed.num_bytes.tolist() == [
        4,
        8,
    ]  # 3 begins a block: it is not predicted, its bytes do not count
    assert packed.input_ids.dtype == packed.position_ids.dtype == np.int32
    assert packed.targets.tolist() == [1, 2, 9, 4, 5, 6, 9]
    batch = collate(
        [
            {"input_ids": i, "position_ids": p}
            for i, p in zip(packed.input_ids, packed.position_ids, strict=True)
        ]
    )
    assert batch["labels"].tolist() == [[-100, 1, 2, 9, -100], [-100, 4, 5, 6, 9]]
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64"}


def test_tokens_know_their_source():
    lengths = {"b": 3, "a": 4, "c": 5}
    documents = [document([9] * length, [0] * length, source) for source, length in lengths.items()]
    sources = token_sources(documents, ["a", "b", "c"], 5)
    assert sources.tolist() == [[1, 1, 1, 0, 0], [0, 0, 2, 2, 2]]
    assert sources.shape == pack(documents, 5).input_ids.shape


def test_a_document_longer_than_two_blocks_starts_anew_in_each():
    packed = pack([document(range(7), [1] * 7)], 3)
    assert packed.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_without_a_cut_the_bytes_are_those_of_the_text(make_texts):
    texts = make_texts(30)
    encoded = encode(train_tokenizer(texts, 400), [Document(text, "a", b"") for text in texts])
    packed = pack(encoded, sum(len(one.input_ids) for one in encoded))
    assert packed.num_bytes.tolist() == [sum(len(text.encode()) for text in texts)]
    assert packed.num_bytes.sum() > sum(map(len, texts))  # multi-byte characters were there


def test_no_documents_no_blocks():
    packed = pack([], 8)
    assert packed.input_ids.shape == packed.position_ids.shape == (0, 8)
    assert packed.num_bytes.shape == (0,)


def split(ids, positions):
    return PackedSplit(np.array(ids), np.array(positions), np.zeros(len(ids)))


def test_unigram_loss_by_hand():
    train = split([[0, 1, 1, 2], [1, 0, 3, 3]], [[0, 1, 2, 3], [0, 0, 1, 2]])  # targets 1 1 2 3 3
    test = split([[3, 1, 0, 4]], [[0, 1, 2, 3]])  # targets 1 0 4; vocabulary 0..5
    p1, p0, p4 = 3 / 11, 1 / 11, 1 / 11
    assert unigram_loss(train, test, 6) == pytest.approx(-(math.log(p1) + math.log(p0) + math.log(p4)) / 3)
    assert unigram_loss(train, split(np.zeros((0, 4), int), np.zeros((0, 4), int)), 6) is None
