"""The account of the sources, and what a person is warned of."""

import logging

import pytest

from dynamic_transformers.data.merging import Duplicates, mixture
from dynamic_transformers.data.splits import SUMS, choose, source_facts, warn, write_split


@pytest.fixture
def account(both_passes, make_settings, caplog):
    """Facts of each source, the warnings, and the pieces of the training split."""

    def make(sources, **settings):
        settings = make_settings(sources, **settings)
        merged = both_passes(settings)
        chosen = choose(settings.data, "train", merged.pools["train"])
        facts = source_facts(settings.data, merged.accounts, merged.duplicates, merged.pools, chosen, {})
        caplog.clear()
        warn(settings.data, facts, merged.pools)
        pieces = list(mixture(merged.shards, merged.pools["train"], chosen))
        return facts, caplog.messages, pieces

    caplog.set_level(logging.WARNING, "dynamic_transformers")
    return make


@pytest.fixture
def sources(make_source, make_texts):
    """Every outcome in each of two sources."""

    def make(limit=None):
        found = []
        for seed, name in enumerate("ab"):
            records = [{"text": text} for text in make_texts(300 - 200 * seed, seed)]
            records += (
                [{"text": "short"}] * 3
                + [{"text": 5}] * 2
                + records[:7]
                + [{"text": text} for text in make_texts(5)]
            )
            options = {"max_tokens": limit[seed] if limit else None, "train_subset_ratio": 0.8}
            found.append(make_source(name, seed=seed, records=records, **options))
        return found

    return make


CASES = {
    "stop": {},
    "stop, some": {"max_tokens": 5000},
    "repeat": {"exhausted": "repeat"},
    "repeat, some": {"exhausted": "repeat", "max_tokens": 60_000},
    "redistribute": {"exhausted": "redistribute"},
    "redistribute, some": {"exhausted": "redistribute", "max_tokens": 40_000},
}


@pytest.mark.parametrize("limit", [None, (3000, 1500), (10**7, 10**7)])
@pytest.mark.parametrize("case", CASES)
def test_sums(account, sources, case, limit):
    facts, _, pieces = account(sources(limit), min_characters=10, **CASES[case])
    for number, fact in enumerate(facts):
        for whole, parts in SUMS.items():
            assert fact[whole] == sum(fact[part] for part in parts) > 0
        assert fact["documents_in"] == 300 - 200 * number + 17
        assert (fact["filtered"], fact["quarantined"]) == (3, 2)
        assert 0 < fact["duplicates"] <= 12  # copies of what train_subset_ratio leaves out are unused
        own = [piece for piece in pieces if piece.source == number]
        different = {piece.input_ids[:7].tobytes() for piece in own}
        assert len(different) == fact["documents_used"]
        assert sum(len(piece.input_ids) for piece in own) == fact["tokens"]
        longest = {
            key: max(len(piece.input_ids) for piece in own if piece.input_ids[:7].tobytes() == key)
            for key in different
        }
        assert sum(longest.values()) == fact["tokens_used"]
        trainable = fact["tokens_used"] + fact["tokens_unused"]
        assert fact["epochs"] == pytest.approx(
            fact["tokens"] / min(trainable, limit[number] if limit else trainable)
        )
        if limit:
            assert fact["tokens_used"] <= limit[number]
    assert sum(fact["proportion_realised"] for fact in facts) == pytest.approx(1)
    assert [fact["proportion_asked"] for fact in facts] == [0.5, 0.5]
    if "repeat" not in case:
        assert max(fact["epochs"] for fact in facts) <= 1


def test_a_wrong_sum_is_a_fault_of_the_program(both_passes, make_settings, make_source):
    settings = make_settings([make_source("a", 200)])
    merged = both_passes(settings)
    chosen = choose(settings.data, "train", merged.pools["train"])
    with pytest.raises(RuntimeError, match="source a: documents_in is not the sum of its parts"):
        source_facts(settings.data, merged.accounts, [Duplicates(1, 0)], merged.pools, chosen, {})


def test_nothing_is_said_of_what_was_asked_for(account, make_source):
    sources = [make_source("a", 300), make_source("b", 300, seed=1)]
    assert account(sources)[1] == []
    assert account([sources[0], {**sources[1], "weight": 3}], max_tokens=8000)[1] == []


def test_other_proportions_than_the_asked_ones_are_told(account, make_source):
    sources = [make_source("a", 300), make_source("b", 100, seed=1)]
    facts, lines, _ = account(sources, exhausted="redistribute", max_eval_tokens=300)
    realised = [100 * fact["proportion_realised"] for fact in facts]
    assert lines == [
        f"source {name}: {part:.3g} % of the mixture's tokens, where 50 % were asked "
        "(data.exhausted=redistribute)"
        for name, part in zip("ab", realised, strict=True)
    ]


def test_many_epochs_are_told(account, make_source):
    sources = [make_source("a", 300), make_source("b", 50, seed=1)]
    facts, lines, _ = account(sources, exhausted="repeat", max_eval_tokens=300)
    assert facts[1]["epochs"] > 4
    assert lines == [f"source b: read {facts[1]['epochs']:.1f} times, over data.max_epochs=4"]
    assert account(sources, exhausted="repeat", max_epochs=20, max_eval_tokens=300)[1] == []


def test_a_small_source_that_keeps_what_is_evaluated_on_small_is_told(account, make_source):
    sources = [make_source("a", 1500), make_source("b", 60, seed=1)]
    _, lines, _ = account(sources, exhausted="repeat", max_epochs=99)
    assert [line.split(" split has ")[0] for line in lines] == ["the validation", "the test"]
    assert all("source b has only" in line and "for its 50 %" in line for line in lines)
    assert account(sources, exhausted="repeat", max_epochs=99, max_eval_tokens=300)[1] == []


@pytest.mark.parametrize("weight", [0.004, 1e-7])
def test_a_small_share_that_is_missed_is_told(account, make_source, weight):
    """0.4 % asked and 0.2 % taken is another mixture, however small the difference."""
    b = make_source("b", 12, seed=1, weight=weight)
    facts, lines, _ = account([make_source("a", 3000), b], exhausted="redistribute")
    asked, realised = facts[1]["proportion_asked"], facts[1]["proportion_realised"]
    assert 0.005 * asked < abs(realised - asked) < 0.005
    assert any(line.startswith(f"source b: {100 * realised:.3g} % of the mixture's") for line in lines)


def test_a_mixture_that_leaves_much_unused_is_told(account, make_source):
    sources = [make_source("a", 300), make_source("b", 50, seed=1)]
    facts, lines, _ = account(sources, max_eval_tokens=300)
    used = facts[0]["documents_used"]
    assert lines == [
        f"the mixture ends where source b runs dry: {used} of {used + facts[0]['unused']} training documents "
        "of source a are used; other weights, or data.exhausted=repeat or redistribute, take more"
    ]
    assert account(sources, max_tokens=4000, max_eval_tokens=300)[1] == []  # more was not asked for


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_facts_of_a_split(both_passes, byte_tokenizer, make_settings, make_source, tmp_path, packing, caplog):
    caplog.set_level(logging.INFO, "dynamic_transformers")
    settings = make_settings([make_source("a", 100)], packing=packing, block_size=300)
    merged = both_passes(settings)
    pool = merged.pools["train"][0]
    pieces = mixture(merged.shards, [pool], choose(settings.data, "train", [pool]))
    facts, counts, _ = write_split(tmp_path / "train", pieces, settings.data, byte_tokenizer[0])
    assert facts["documents"] == pool.documents and counts.sum() == facts["target_tokens"]
    assert facts["tokens"] == pool.tokens + facts["padding_tokens"] - facts["dropped_tokens"]
    assert (facts["padding_tokens"] > 0) == (packing == "best_fit")
    lengths = [entry["tokens"] for part in pool.parts() for entry in part]
    if packing == "best_fit":
        assert facts["cut_documents"] == sum(length > 300 for length in lengths)
        assert facts["cut_tokens"] == sum(max(0, int(length) - 300) for length in lengths)
    else:
        assert facts["cut_documents"] > sum(length > 300 for length in lengths)
    (line,) = [line for line in caplog.messages if line.startswith("train: ")]
    assert f"{pool.tokens} tokens of {pool.documents} documents in {facts['blocks']} blocks" in line
