"""How many tokens a mixture asks of each source, and what a split then takes of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamic_transformers.data.merging import mixture
from dynamic_transformers.data.mixing import quotas, shares
from dynamic_transformers.data.splits import choose

NAMES = ("a", "b", "c", "d")
WEIGHTS = {"a": 2.0, "b": 1.0, "c": 1.0}


def amounts(least=1):
    return st.lists(st.integers(least, 10**9), min_size=1, max_size=4)


weights = st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4)
limits = st.none() | st.integers(1, 4 * 10**9)


def named(values):
    return dict(zip(NAMES, values, strict=False))


def asked(tokens, weights, limit, exhausted):
    available = named(tokens)
    given = {name: weight for name, weight in named(weights).items() if name in available}
    found = quotas(available, given, limit, exhausted)
    assert set(found) == set(available) and min(found.values()) > 0
    return available, shares(given), found, sum(found.values())


@given(amounts(), weights, limits)
def test_stop_holds_the_proportions_and_takes_no_more_than_there_is(tokens, weights, limit):
    available, proportions, found, total = asked(tokens, weights, limit, "stop")
    for name in available:
        assert found[name] == pytest.approx(total * proportions[name])
        assert found[name] <= available[name] * (1 + 1e-9)
    everything = [found[name] == pytest.approx(available[name]) for name in available]
    assert total == pytest.approx(limit) if limit and not any(everything) else any(everything)
    assert total <= (limit or total) * (1 + 1e-9)


@given(amounts(), weights, limits)
def test_repeat_holds_the_proportions_until_all_is_read(tokens, weights, limit):
    available, proportions, found, total = asked(tokens, weights, limit, "repeat")
    for name in available:
        assert found[name] == pytest.approx(total * proportions[name])
    if limit:
        assert total == pytest.approx(limit)
    else:
        epochs = [found[name] / available[name] for name in available]
        assert min(epochs) == pytest.approx(1)


@given(amounts(), weights, limits)
def test_redistribute_takes_all_or_as_much_as_is_asked(tokens, weights, limit):
    available, proportions, found, total = asked(tokens, weights, limit, "redistribute")
    assert total == pytest.approx(min(limit or np.inf, sum(tokens)))
    assert all(found[name] <= available[name] * (1 + 1e-9) for name in available)
    # A source has less than its part only where it is dry; the others keep their proportions.
    left = {name: found[name] for name in available if found[name] < available[name] * (1 - 1e-9)}
    for name in left:
        assert found[name] >= total * proportions[name] * (1 - 1e-9)
        assert found[name] / sum(left.values()) == pytest.approx(
            proportions[name] / sum(proportions[other] for other in left)
        )


def test_quotas_by_hand():
    available, weights = {"a": 600, "b": 100}, {"a": 1.0, "b": 1.0}
    assert quotas(available, weights, None, "stop") == {"a": 100, "b": 100}
    assert quotas(available, weights, 80, "stop") == {"a": 40, "b": 40}
    assert quotas(available, weights, None, "repeat") == {"a": 600, "b": 600}
    assert quotas(available, weights, 500, "repeat") == {"a": 250, "b": 250}
    assert quotas(available, weights, None, "redistribute") == {"a": 600, "b": 100}
    assert quotas(available, weights, 500, "redistribute") == {"a": 400, "b": 100}
    three = quotas({"a": 10, "b": 35, "c": 1000}, {"a": 1, "b": 1, "c": 1}, 100, "redistribute")
    assert three == {"a": 10, "b": 35, "c": 55}  # b runs dry only by what a leaves


@pytest.fixture
def three(make_source):
    sizes = {"a": 900, "b": 150, "c": 600}
    return [make_source(name, size, seed, WEIGHTS[name]) for seed, (name, size) in enumerate(sizes.items())]


@pytest.mark.parametrize("max_tokens", [None, 5000, 60000, 10**9])
def test_realised_proportions_are_the_asked_ones(both_passes, make_settings, three, max_tokens):
    settings = make_settings(three, max_tokens=max_tokens)
    merged = both_passes(settings)
    pools = merged.pools["train"]
    chosen = choose(settings.data, "train", pools)
    assert [len(choices) for choices in chosen] == [1, 1, 1]
    total = min(4 * pools[1].tokens, max_tokens or 10**9)
    for source, (choice,) in zip(settings.data.dataset_configs, chosen, strict=True):
        quota = source.weight / 4 * total
        assert -1 < choice.tokens - quota <= 0.005 * quota
    if total == 4 * pools[1].tokens:
        assert chosen[1][0].documents == pools[1].documents and chosen[1][0].tokens == pools[1].tokens


def pieces(merged, settings, split="train"):
    chosen = choose(settings.data, split, merged.pools[split])
    return list(mixture(merged.shards, merged.pools[split], chosen))


def test_a_mixture_holds_what_was_chosen_each_once(both_passes, make_settings, three):
    settings = make_settings(three, max_tokens=20000)
    merged = both_passes(settings)
    found = pieces(merged, settings)
    for source, (choice,) in enumerate(choose(settings.data, "train", merged.pools["train"])):
        own = [piece for piece in found if piece.source == source]
        assert len(own) == choice.documents == len({piece.input_ids.tobytes() for piece in own})
        assert sum(len(piece.input_ids) for piece in own) == choice.tokens


def test_order_depends_on_the_seed_and_not_on_the_order_of_reading(
    both_passes, make_settings, make_source, make_texts
):
    def read(records, split, seed=0):
        source = make_source("a", records=[{"text": text} for text in records])
        settings = make_settings([source], seed=seed, max_tokens=5000, max_eval_tokens=1000)
        return [piece.input_ids.tobytes() for piece in pieces(both_passes(settings), settings, split)]

    texts = make_texts(200)
    assert read(texts, "train") == read(texts[::-1], "train")
    assert set(read(texts, "train")) != set(read(texts, "train", seed=1))
    assert read(texts, "test") == read(texts, "test", seed=1)


def test_sources_are_interleaved_evenly(both_passes, make_settings, make_source):
    """Those that are used up and those of which a little is taken."""
    sources = [make_source("a", 900, weight=20.0), make_source("c", 600, 2, weight=1.0)]
    settings = make_settings(sources)
    found = [piece.source for piece in pieces(both_passes(settings), settings)]
    places = np.flatnonzero(found) / len(found)
    assert len(places) > 20
    assert np.mean(places) == pytest.approx(0.5, abs=0.2)


def test_a_new_document_does_not_reorder_the_others(both_passes, make_settings, make_source, make_texts):
    def read(texts):
        settings = make_settings([make_source("a", records=[{"text": text} for text in texts])])
        return [piece.input_ids.tobytes() for piece in pieces(both_passes(settings), settings)]

    before, after = read(make_texts(200)), read([*make_texts(200), *make_texts(200, seed=1)])
    assert [document for document in after if document in set(before)] == before
    assert len(after) > 1.5 * len(before)


@pytest.mark.parametrize("max_tokens", [None, 45000])
def test_a_source_that_runs_dry_is_read_again(both_passes, make_settings, make_source, max_tokens):
    sources = [make_source("a", 400), make_source("b", 40, seed=1)]
    settings = make_settings(sources, exhausted="repeat", max_tokens=max_tokens)
    merged = both_passes(settings)
    pools = merged.pools["train"]
    found = pieces(merged, settings)
    again = [piece.input_ids[:7].tobytes() for piece in found if piece.source == 1]  # all begin otherwise
    tokens = sum(len(piece.input_ids) for piece in found if piece.source == 1)
    assert tokens == pytest.approx(max_tokens / 2 if max_tokens else pools[0].tokens, rel=0.006)
    times = [again.count(document) for document in dict.fromkeys(again)]
    assert len(times) == pools[1].documents
    # Whole rounds, and a part of one more of which the last document may be cut.
    assert tokens // pools[1].tokens - 1 <= min(times) <= max(times) <= tokens // pools[1].tokens + 1
    # Each round has an order of its own.
    assert again[: len(times)] != again[len(times) : 2 * len(times)]
    assert len(set(again[: len(times)])) < len(times)  # rounds are mixed with each other


def test_nothing_is_read_twice_to_be_evaluated_on(both_passes, make_settings, make_source):
    sources = [make_source("a", 400), make_source("b", 40, seed=1)]
    settings = make_settings(sources, exhausted="repeat", max_eval_tokens=10**6)
    merged = both_passes(settings)
    for split in ("validation", "test"):
        found = [piece.input_ids.tobytes() for piece in pieces(merged, settings, split)]
        assert len(set(found)) == len(found) > 0
