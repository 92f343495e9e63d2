"""Where documents are cut, and what fills the blocks."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamic_transformers.data import packing
from dynamic_transformers.data.blocks import PADDING, Blocks, BlockWriter, Piece
from dynamic_transformers.data.conversations import PLAIN_TEMPLATE, ConversationEncoder
from dynamic_transformers.data.packing import Cuts, best_fit, concatenated
from dynamic_transformers.data.tokenization import train_tokenizer

PADDING_ID = 999


def piece(number, size, masked=False):
    """Tokens that all differ between pieces and within one."""
    ids = 1000 * (number + 1) + np.arange(size)
    return Piece(ids, 1 + np.arange(size) % 5, np.arange(size) % 2 == 0 if masked else None, number % 7)


def sizes(pieces):
    return [len(one.input_ids) for one in pieces]


def test_concatenated_documents_are_cut_where_a_block_ends():
    given = [piece(number, size) for number, size in enumerate([3, 2, 7, 5, 3, 11])]
    cuts = Cuts()
    assert list(concatenated(iter(given), 5, cuts)) == given
    # Blocks: 3+2 | 5 | 2+3 | 2+3 | 5 | 5 | 1; the third, fourth and sixth document are cut.
    assert cuts == Cuts(documents=3, tokens=2 + 2 + 6)


def test_concatenated_blocks_without_cuts():
    cuts = Cuts()
    assert sizes(concatenated((piece(0, 4) for _ in range(6)), 8, cuts)) == [4] * 6
    assert cuts == Cuts()


@given(
    tokens=st.lists(st.integers(1, 40), max_size=60),
    block_size=st.integers(2, 17),
    window=st.sampled_from([1, 3, 10, 1 << 14]),
    masked=st.booleans(),
)
def test_best_fit_cuts_nothing_that_fits(tokens, block_size, window, masked):
    given = [piece(number, size, masked) for number, size in enumerate(tokens)]
    cuts = Cuts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW", window)
        found = list(best_fit(iter(given), block_size, cuts, PADDING_ID))

    place, parts = 0, {number: [] for number in range(len(given))}
    for one in found:
        begin, place = place, place + len(one.input_ids)
        assert begin // block_size == (place - 1) // block_size  # none goes over the end of a block
        if one.source == PADDING:
            assert (one.input_ids == PADDING_ID).all() and not one.num_bytes.any()
            assert place % block_size == 0
        else:
            parts[one.input_ids[0] // 1000 - 1].append(one)
    assert place % block_size == 0
    lost = Counter()
    for number, whole in enumerate(given):
        # As few parts as there can be, but for those without a loss.
        asked = [whole.part(start, start + block_size) for start in range(0, tokens[number], block_size)]
        for one in [one for one in asked if masked and not one.targets[1:].any()]:
            lost[one.source] += len(one.input_ids)
            asked = [other for other in asked if other is not one]
        for one, other in zip(parts[number], asked, strict=True):
            assert one.source == other.source
            for name in ("input_ids", "num_bytes", *(["targets"] if masked else [])):
                assert (getattr(one, name) == getattr(other, name)).all()
            assert masked or one.targets is None
    assert cuts.without_loss == lost
    long = [size for size in tokens if size > block_size]
    assert (cuts.documents, cuts.tokens) == (len(long), sum(size - block_size for size in long))
    if window > len(tokens):
        # No two blocks would go into one.
        free = sorted(len(one.input_ids) for one in found if one.source == PADDING)
        assert sum(free[-2:]) < block_size or len(free) < 2


def test_a_long_question_makes_no_blocks_without_a_loss(tmp_path):
    question, answer = np.arange(100), np.arange(10)
    one = Piece(np.concatenate([question, answer]), np.ones(110, int), np.repeat([False, True], [100, 10]), 3)
    cuts = Cuts()
    packed = list(best_fit(iter([one]), 32, cuts, PADDING_ID))
    assert sizes(packed) == [14, 18] and cuts.without_loss == {3: 96} and cuts.tokens == 78
    writer = BlockWriter(tmp_path / "split", 32, 1000, masked=True)
    for part in packed:
        writer.add(part)
    assert writer.close()["target_tokens"] == 10


def test_a_window_holds_no_more_tokens_than_its_limit(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_TOKENS", 30)
    taken = 0

    def given():
        nonlocal taken
        for number in range(40):
            taken += 1
            yield piece(number, 6)

    found = best_fit(given(), 8, Cuts(), PADDING_ID)
    next(found)
    assert taken == 5


def test_best_fit_by_hand():
    """The longest first, each where it leaves the least room."""
    found = best_fit(
        (piece(number, size) for number, size in enumerate([2, 7, 3, 23, 5, 6])), 10, Cuts(), PADDING_ID
    )
    blocks = [[]]
    for one in found:
        if sum(size for _, size in blocks[-1]) == 10:
            blocks.append([])
        number = None if one.source == PADDING else int(one.input_ids[0] // 1000 - 1)
        blocks[-1].append((number, len(one.input_ids)))
    assert blocks == [
        [(3, 10)],
        [(3, 10)],
        [(1, 7), (2, 3)],
        [(5, 6), (3, 3), (None, 1)],
        [(4, 5), (0, 2), (None, 3)],
    ]


@pytest.fixture(scope="module")
def conversations(make_texts):
    tokenizer = train_tokenizer(make_texts(100), 300, PLAIN_TEMPLATE)
    encoder = ConversationEncoder(tokenizer)
    found = []
    for question, answer, thanks in zip(*(make_texts(30, seed, 1, 25) for seed in range(3)), strict=True):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        more = [{"role": "user", "content": thanks}, {"role": "assistant", "content": "You are welcome."}]
        found.append(encoder(messages + more * (len(found) % 2)))
    return [Piece(*one, source=0) for one in found]


def labels_of(folder, pieces, block_size):
    """Of each piece between paddings and starts, and the split's facts."""
    writer = BlockWriter(folder, block_size, 300, masked=True)
    for one in pieces:
        writer.add(one)
    facts = writer.close()
    blocks = Blocks(folder, facts, block_size)
    found = []
    for place in range(len(blocks)):
        batch = blocks.batch([place])
        starts = np.flatnonzero(batch["position_ids"][0] == 0).tolist()
        for start, end in zip(starts, [*starts[1:], block_size], strict=True):
            if blocks.sources(place)[start] != PADDING:
                columns = (batch[name][0, start:end].tolist() for name in ("input_ids", "labels"))
                found.append(tuple(map(tuple, columns)))
    return found, facts


def test_packed_conversations_learn_what_each_alone_does(tmp_path, conversations):
    block_size = 512
    assert max(sizes(conversations)) <= block_size < sum(sizes(conversations)) / 4
    cuts = Cuts()
    packed = list(best_fit(iter(conversations), block_size, cuts, 0))
    together, facts = labels_of(tmp_path / "together", packed, block_size)
    assert cuts == Cuts() and len(together) == len(conversations)
    alone = []
    for number, one in enumerate(conversations):
        (found,), _ = labels_of(tmp_path / str(number), [one], len(one.input_ids))
        expected = np.where(one.targets, one.input_ids, -100)
        assert found == (tuple(one.input_ids), tuple(expected)) and (expected != -100).any()
        alone.append(found)
    assert Counter(together) == Counter(alone)
    assert facts["target_tokens"] == sum(one.targets.sum() for one in conversations)
    assert facts["bytes"] == sum(one.num_bytes[one.targets].sum() for one in conversations)
    assert facts["padding_tokens"] == facts["tokens"] - sum(sizes(conversations)) > 0
    assert facts["dropped_tokens"] == 0
