"""Blocks on the disk and what is read of them, against hand computations."""

import math

import numpy as np
import pytest

from dynamic_transformers.data import blocks
from dynamic_transformers.data.blocks import PADDING, Blocks, BlockWriter, Piece, unigram_loss
from dynamic_transformers.data.tokenization import encoder_of, train_tokenizer


def piece(ids, widths, targets=None, source=0):
    return Piece(
        np.array(ids), np.array(widths), None if targets is None else np.array(targets, bool), source
    )


def write(folder, pieces, block_size, vocab_size=300, masked=False):
    writer = BlockWriter(folder, block_size, vocab_size, masked)
    for one in pieces:
        writer.add(one)
    facts = writer.close()
    return Blocks(folder, facts, block_size), facts, writer.target_counts


PIECES = [
    piece([9, 1, 2, 9], [0, 3, 1, 0], source=1),
    piece([9, 3, 4, 5, 6, 9], [0, 2, 2, 5, 1, 0], source=0),
    piece([9, 7, 9], [0, 8, 0], source=2),
]


def test_blocks_positions_and_bytes_by_hand(tmp_path):
    split, facts, counts = write(tmp_path / "split", PIECES, 5)
    batch = split.batch([0, 1])  # 9 7 9 fills no block
    assert len(split) == 2
    assert batch["input_ids"].tolist() == [[9, 1, 2, 9, 9], [3, 4, 5, 6, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[-100, 1, 2, 9, -100], [-100, 4, 5, 6, 9]]
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64"}
    # 3 begins a block: it is not predicted, its bytes do not count
    assert [split.select([place]).num_bytes for place in (0, 1)] == [4, 8]
    assert (facts["blocks"], facts["tokens"], facts["target_tokens"], facts["bytes"]) == (2, 10, 7, 12)
    assert np.flatnonzero(counts).tolist() == [1, 2, 4, 5, 6, 9] and counts[9] == 2
    assert [split.sources(place).tolist() for place in (0, 1)] == [[1, 1, 1, 1, 0], [0] * 5]


def test_a_document_longer_than_two_blocks_starts_anew_in_each(tmp_path):
    split, *_ = write(tmp_path / "split", [piece(range(7), [1] * 7)], 3)
    assert split.batch([0, 1])["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_masked_tokens_and_padding_have_no_loss(tmp_path):
    pieces = [
        piece([9, 1, 2, 9], [0, 1, 2, 0], [0, 0, 1, 1]),
        piece([0, 0], [0, 0], source=PADDING),
        piece([9, 3, 4, 5, 9, 9], [0, 1, 1, 1, 0, 0]),
    ]
    split, facts, _ = write(tmp_path / "split", pieces, 6, masked=True)
    batch = split.batch([0, 1])
    assert batch["labels"].tolist() == [[-100, -100, 2, 9, -100, -100], [-100, 3, 4, 5, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 5]]
    assert facts["target_tokens"] == 7 and facts["bytes"] == 5


@pytest.mark.parametrize("waiting", [7, 50])
@pytest.mark.parametrize("block_size", [3, 8, 13])
@pytest.mark.parametrize("masked", [False, True])
def test_what_waits_in_memory_does_not_change_the_files(tmp_path, monkeypatch, block_size, masked, waiting):
    random = np.random.default_rng(0)
    pieces = []
    for _ in range(200):
        n = int(random.integers(1, 40))
        targets = random.random(n) < 0.5 if masked and random.random() < 0.5 else None
        pieces.append(
            piece(random.integers(0, 300, n), random.integers(0, 9, n), targets, random.integers(3))
        )
    split, at_once, _ = write(tmp_path / "at_once", pieces, block_size, masked=masked)
    monkeypatch.setattr(blocks, "FLUSH_TOKENS", waiting)
    _, bit_by_bit, _ = write(tmp_path / "bit_by_bit", pieces, block_size, masked=masked)
    assert at_once == bit_by_bit and at_once["blocks"] > 50
    ids, starts, wanted = [], [], []
    for one in pieces:
        ids += one.input_ids.tolist()
        starts += [True] + [False] * (len(one.input_ids) - 1)
        wanted += [True] * len(one.input_ids) if one.targets is None else one.targets.tolist()
    for place in range(len(split)):
        span = slice(place * block_size, (place + 1) * block_size)
        assert split.input_ids(place).tolist() == ids[span]
        expected = [w and not s for w, s in zip(wanted[span], starts[span], strict=True)]
        assert split.targets(place).tolist() == [False, *expected[1:]]


def test_large_vocabularies_take_four_bytes(tmp_path):
    for vocab_size, width in ((1 << 16, 2), ((1 << 16) + 1, 4)):
        top = [vocab_size - 1, 1, vocab_size - 1, 0]
        split, *_ = write(tmp_path / str(width), [piece(top, [1] * 4)], 4, vocab_size)
        assert split.input_ids(0).tolist() == top
        assert (tmp_path / str(width) / "tokens.bin").stat().st_size == 4 * width


def test_without_a_cut_the_bytes_are_those_of_the_text(tmp_path, make_texts):
    texts = make_texts(30)
    encoded = encoder_of(train_tokenizer(texts, 400))(texts)
    pieces = [Piece(one.input_ids, one.num_bytes, None, 0) for one in encoded]
    split, *_ = write(tmp_path / "split", pieces, sum(len(one.input_ids) for one in encoded), 400)
    assert split.num_bytes == sum(len(text.encode()) for text in texts)
    assert split.num_bytes > sum(map(len, texts))  # multi-byte characters were there


def test_no_pieces_no_blocks(tmp_path):
    split, facts, _ = write(tmp_path / "split", [], 8)
    assert len(split) == 0 == facts["blocks"] and split.num_bytes == 0


def test_unigram_loss_by_hand():
    train, test = np.array([0, 2, 1, 2, 0, 0]), np.array([1, 1, 0, 0, 1, 0])
    p1, p0, p4 = 3 / 11, 1 / 11, 1 / 11
    assert unigram_loss(train, test) == pytest.approx(-(math.log(p1) + math.log(p0) + math.log(p4)) / 3)
    assert unigram_loss(train, np.zeros(6)) is None
