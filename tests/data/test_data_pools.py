"""Which documents of a pool a quota takes, against a sorted list."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamic_transformers.data import pools
from dynamic_transformers.data.documents import RANKS
from dynamic_transformers.data.merging import mixture
from dynamic_transformers.data.pools import CANDIDATE, Choice, Pool
from dynamic_transformers.data.splits import choose


@pytest.fixture(scope="module")
def make_pool(tmp_path_factory):
    """A pool of documents with these tokens at random ranks, and the same in the order of the ranks."""
    folder = tmp_path_factory.mktemp("pools")

    def make(tokens, seed=0, crowded=False):
        random = np.random.default_rng(seed)
        documents = np.zeros(len(tokens), CANDIDATE)
        # Crowded: all in one bucket of ranks, or two.
        highest = 2 * RANKS // pools.BUCKETS if crowded else RANKS
        ranks = random.choice(1 << 20, len(tokens), replace=False).astype(np.uint64)
        documents["choose"] = ranks * np.uint64(highest >> 20)
        documents["tokens"] = tokens
        pool = Pool(folder / f"{len(list(folder.iterdir()))}")
        for part in np.array_split(documents, 3):
            if len(part):
                pool.add(part)
        return pool, np.sort(documents, order="choose")

    return make


@st.composite
def documents(draw):
    tokens = draw(st.lists(st.integers(1, 60), min_size=1, max_size=40))
    return tokens, draw(st.integers(0, 9)), draw(st.booleans())


@given(given=documents(), data=st.data())
@settings(deadline=None)
def test_first_is_the_beginning_of_a_sorted_list(make_pool, given, data):
    pool, ordered = make_pool(*given)
    sums = np.cumsum(ordered["tokens"], dtype=np.int64)
    assert (pool.documents, pool.tokens) == (len(ordered), sums[-1])
    exact = data.draw(st.sampled_from(sums.tolist()))
    for quota in (
        exact - 0.25,
        exact,
        exact + 0.25,
        data.draw(st.floats(0.5, float(sums[-1]))),
        sums[-1] + 9,
    ):
        place = min(int(np.sum(sums < quota)), len(sums) - 1)
        last = ordered[place]
        assert pool.first(quota) == Choice(
            int(last["choose"]), place + 1, int(sums[place]), int(last["tokens"])
        )


@given(
    given=documents(),
    part=st.floats(0.01, 4),
    limited=st.none() | st.floats(0.05, 1.5),
    tolerance=st.sampled_from([0, 0.005, 0.05]),
)
@settings(deadline=None)
def test_times_hold_the_quota_and_the_limit(make_pool, given, part, limited, tolerance):
    pool, ordered = make_pool(*given)
    limit = limited and max(1, round(limited * pool.tokens))
    there = min(pool.tokens, limit or pool.tokens)
    quota = part * there
    choices = pool.times(quota, limit, tolerance, whole=False)
    if quota < 0.5:
        assert choices == []
        return
    over = sum(choice.tokens for choice in choices) - quota
    assert over > -1 and int(over) <= tolerance * quota
    assert len(choices) in (int(part), int(part) + 1, round(part))
    assert all(choice.tokens == there for choice in choices[:-1])
    for choice in choices:
        assert choice.tokens <= there
        taken = ordered[ordered["choose"] <= choice.last]
        assert len(taken) == choice.documents
        assert choice.tokens == taken["tokens"].sum() - choice.cut_tokens
        assert choice.last_tokens == taken["tokens"][-1] - choice.cut_tokens >= 1


@given(given=documents(), part=st.floats(0.01, 3), limited=st.none() | st.floats(0.2, 1.5))
@settings(deadline=None)
def test_conversations_are_taken_whole(make_pool, given, part, limited):
    pool, ordered = make_pool(*given)
    limit = limited and max(1, round(limited * pool.tokens))
    there = min(pool.tokens, limit or pool.tokens)
    sums = [0, *np.cumsum(ordered["tokens"], dtype=np.int64).tolist()]
    choices = pool.times(part * there, limit, 0, whole=True)
    nearest = max(1, min(range(len(sums)), key=lambda place: (abs(sums[place] - there), -place)))
    for choice in choices:
        assert choice.cut_tokens == 0 and choice.tokens == sums[choice.documents]
        taken = ordered["choose"] <= choice.last
        assert taken.sum() == choice.documents and ordered["tokens"][taken].sum() == choice.tokens
        assert choice.documents <= nearest
    assert len(choices) <= np.ceil(part)
    assert all(choice.documents == nearest for choice in choices[: int(part)])


@pytest.mark.parametrize("whole", [False, True])
def test_epochs(make_pool, whole):
    pool, ordered = make_pool([30] * 40)
    everything = pool.first(pool.tokens)
    assert everything == Choice(int(ordered["choose"][-1]), 40, 1200, 30)
    half = pool.first(600)
    assert half.documents == 20
    assert pool.times(1200, None, 0, whole) == [everything]
    assert pool.times(1200 - 1e-7, None, 0, whole) == pool.times(1200 + 1e-7, None, 0, whole) == [everything]
    assert pool.times(2.5 * 1200, None, 0, whole) == [everything, everything, half]
    assert pool.times(3 * 1200, None, 0, whole) == [everything] * 3
    assert pool.times(3 * 600, 600, 0, whole) == [half] * 3


def test_one_document(make_pool):
    pool, ordered = make_pool([100])
    (last,) = ordered["choose"].tolist()
    assert pool.times(0.4, None, 0, False) == []
    assert pool.times(1, None, 0, False) == [Choice(last, 1, 1, 1, 99)]
    assert pool.times(30, None, 0, True) == [Choice(last, 1, 100, 100)]  # a whole one, or none at all
    assert pool.times(100, None, 0, False) == [Choice(last, 1, 100, 100)]
    assert make_pool([])[0].times(5, None, 0, False) == []


def test_the_last_document_stays_whole_within_the_tolerance(make_pool):
    pool, ordered = make_pool([100] * 10)
    fifth = int(ordered["choose"][4])
    assert pool.times(498, None, 0.005, False) == [Choice(fifth, 5, 500, 100)]
    assert pool.times(497, None, 0.005, False) == [Choice(fifth, 5, 497, 97, 3)]
    # The limit of a source has none.
    assert pool.times(498, 498, 0.005, False) == [Choice(fifth, 5, 498, 98, 2)]


def test_the_nearest_conversation_is_the_last(make_pool):
    pool, _ = make_pool([100] * 10)
    quotas = {49: 1, 140: 1, 150: 2, 449: 4, 451: 5}
    assert {quota: pool.times(quota, None, 0, True)[0].documents for quota in quotas} == quotas


def test_one_conversation_more_is_left_out_where_that_is_nearer(make_pool):
    pool, _ = make_pool([400] * 40)
    everything = pool.first(pool.tokens)
    assert pool.times(pool.tokens + 150, None, 0, True) == [everything]
    assert pool.times(pool.tokens + 250, None, 0, True) == [everything, pool.first(1)]
    assert pool.times(150, None, 0, True) == [pool.first(1)]  # rather than nothing of the source


def test_conversations_up_to_a_limit_are_not_read_twice(make_pool):
    """The limit falls within the tenth, so nine are all that there is."""
    pool, _ = make_pool([100] * 20)
    for quota in (940, 940 - 1e-7, 930):
        assert [choice.documents for choice in pool.times(quota, 940, 0.005, True)] == [9]
    assert [choice.documents for choice in pool.times(2.5 * 940, 940, 0.005, True)] == [9, 9, 5]


def test_a_limit_holds_where_the_quota_is_the_limit_but_for_rounding(make_pool):
    pool, _ = make_pool([1000] * 20)
    (choice,) = pool.times(9995 - 1e-7, 9995, 0.005, False)
    assert choice.tokens == 9995


def test_long_documents_hold_their_proportion(both_passes, make_settings, make_source):
    """Documents of 24,000 tokens, of which the part of a source holds less than one."""
    long = [{"text": f"{index} " + "long " * 4800} for index in range(30)]
    sources = [make_source("a", 2000, weight=0.9), make_source("b", records=long, weight=0.1)]
    data = make_settings(sources, max_tokens=100_000).data
    merged = both_passes(make_settings(sources, max_tokens=100_000))
    chosen = choose(data, "train", merged.pools["train"])
    tokens = [sum(choice.tokens for choice in choices) for choices in chosen]
    assert tokens[0] == pytest.approx(90_000, rel=0.005) and tokens[1] == pytest.approx(10_000, rel=0.005)
    found = list(mixture(merged.shards, merged.pools["train"], chosen))
    (piece,) = [piece for piece in found if piece.source == 1]
    assert len(piece.input_ids) == len(piece.num_bytes) == tokens[1]
    assert piece.input_ids[0] == 0 != piece.input_ids[-1]  # its beginning, without its end
