"""What becomes of records: quarantine, filter, duplicates, and the split by hash."""

import hashlib
import json
from collections import Counter
from itertools import chain

import pytest

from dynamic_transformers.data import first_pass
from dynamic_transformers.data.documents import Document, document_of, split_of
from dynamic_transformers.data.merging import Duplicates
from dynamic_transformers.data.rows import Row
from dynamic_transformers.data.sources import shards_of
from dynamic_transformers.data.splits import check_broken, check_splits
from dynamic_transformers.settings import UserError


@pytest.fixture
def splits(both_passes, byte_tokenizer):
    """Texts of the first source (or another) by split."""

    def read(settings, source=0):
        return both_passes(settings).texts(byte_tokenizer[0], source)

    return read


def test_every_document_is_in_one_split_of_about_the_asked_size(
    splits, make_settings, make_source, make_texts
):
    found = splits(make_settings([make_source("a", 2000)], min_characters=0))
    assert sorted(chain(*found.values())) == sorted(make_texts(2000))
    for split, fraction in {"train": 0.70, "validation": 0.15, "test": 0.15}.items():
        assert len(found[split]) / 2000 == pytest.approx(fraction, abs=0.04)


def test_another_source_name_order_or_seed_moves_no_document(splits, make_settings, make_source):
    a, b = make_source("a", 200), make_source("b", 200, seed=1)
    alone = splits(make_settings([a]))
    both = make_settings([b, {**a, "name": "renamed"}], seed=7)
    assert splits(both, 1) == alone and splits(both, 0) == splits(make_settings([b]))


def test_borders_of_the_splits(make_settings):
    data = make_settings([{"name": "a"}], test_split_percentage=25, validation_split_percentage=50).data
    at = {
        fraction: split_of(bytes([int(fraction * 256)]) + bytes(31), data)
        for fraction in (0, 0.25, 0.74, 0.75)
    }
    assert at == {0: "test", 0.25: "validation", 0.74: "validation", 0.75: "train"}


def test_a_documents_digest_is_that_of_its_text_alone(make_settings, make_source):
    settings = make_settings([make_source("a", 1)], max_document_characters=40)
    (shard,) = shards_of(settings.data.dataset_configs[0])
    text = "é" * 50
    document = document_of(Row(text, "a", 1), shard, settings.data.dataset_configs[0], settings.data)
    assert isinstance(document, Document) and document.cut and document.text == "é" * 40
    assert document.digest == hashlib.sha256(document.text.encode()).digest()


def test_the_sources_own_validation_split_wins_over_training_copies(
    splits, make_settings, make_source, make_texts, tmp_path, write_jsonl
):
    """Of the same source and of one before it; what else hashes into validation stays there."""
    texts, held = make_texts(300), make_texts(40, seed=1)
    a = make_source("a", records=[{"text": text} for text in [*texts, *held[:10]]])
    training = [*make_texts(300, seed=2), *held[5:20]]
    files = {
        "train": write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in training]),
        "held": write_jsonl(tmp_path / "held.jsonl", [{"text": text} for text in [*held, *held[:5]]]),
    }
    b = {"name": "b", "path": "json", "data_files": files, "validation_split": "held"}
    settings = make_settings([a, b])
    first, second = splits(settings), splits(settings, 1)
    assert set(held) <= set(second["validation"])
    everywhere = Counter(text for found in (first, second) for texts in found.values() for text in texts)
    assert set(everywhere.values()) == {1} and set(held) < set(everywhere)


@pytest.mark.parametrize("size", [4000, 2**26])
def test_duplicates_belong_to_the_first_source_wherever_files_are_cut(
    both_passes, byte_tokenizer, make_settings, make_source, make_texts, shard_bytes, size
):
    shard_bytes(size)
    texts, others = make_texts(150), make_texts(150, seed=1)
    a = make_source("a", records=[{"text": text} for text in [*texts, *texts[:20]]])
    b = make_source("b", records=[{"text": text} for text in [*texts[100:], *others, *others[:3]]])
    merged = both_passes(make_settings([a, b], min_characters=0))
    assert len(merged.folders) > 20 if size == 4000 else len(merged.folders) == 2

    def tokens(texts):
        return sum(2 + len(text.encode()) for text in texts)

    assert merged.duplicates == [
        Duplicates(20, tokens(texts[:20])),
        Duplicates(53, tokens([*texts[100:], *others[:3]])),
    ]
    found = [merged.texts(byte_tokenizer[0], source) for source in range(2)]
    assert sorted(chain(*found[0].values())) == sorted(texts)
    assert sorted(chain(*found[1].values())) == sorted(others)
    for source, account in enumerate(merged.accounts):
        stay = sum(pools[source].documents for pools in merged.pools.values())
        assert account.records == {"documents": stay + merged.duplicates[source].documents}
        stay = sum(pools[source].tokens for pools in merged.pools.values())
        assert account.tokens == stay + merged.duplicates[source].tokens


LENGTHS = (5, 31, 32, 60, 61, 90)


@pytest.mark.parametrize("rule", ["cut", "filter"])
def test_short_and_long_documents(both_passes, byte_tokenizer, make_settings, make_source, rule):
    texts = [f"{length:02d}{number:02d}{'é' * (length - 4)}" for length in LENGTHS for number in range(20)]
    source = make_source("a", records=[{"text": text} for text in texts])
    settings = make_settings([source], max_document_characters=60, long_documents=rule)
    merged = both_passes(settings)
    (account,) = merged.accounts
    cut = rule == "cut"
    assert account.records == {"documents": 80 if cut else 40, "filtered": 40 if cut else 80}
    assert account.cut == (40 if cut else 0)
    found = chain(*merged.texts(byte_tokenizer[0]).values())
    assert Counter(map(len, found)) == ({32: 20, 60: 60} if cut else {32: 20, 60: 20})
    assert merged.duplicates == [Duplicates()]


def test_documents_that_are_equal_once_they_are_cut_are_duplicates(splits, make_settings, make_source):
    """Otherwise the beginning of one would be trained on, and that of the other be evaluated on."""
    texts = [f"{number:04d}{'é' * 36}{ending * 20}" for ending in "abc" for number in range(100)]
    source = make_source("a", records=[{"text": text} for text in texts])
    found = splits(make_settings([source], max_document_characters=40))
    assert sorted(chain(*found.values())) == sorted({text[:40] for text in texts})


def test_a_sources_filter_and_subset_of_the_training_split(
    both_passes, make_settings, make_source, make_texts
):
    records = [{"text": text, "stars": index % 4} for index, text in enumerate(make_texts(1000))]

    def read(**settings):
        return both_passes(make_settings([make_source("a", records=records, **settings)]))

    every, kept = read(), read(filter=[["stars", ">=", 2]])
    assert kept.accounts[0].records == {"filtered": 500, "documents": 500}
    some = read(train_subset_ratio=0.25)
    documents = {split: pool.documents for split, (pool,) in some.pools.items()}
    before = {split: pool.documents for split, (pool,) in every.pools.items()}
    assert documents | {"train": 0} == before | {"train": 0}
    assert documents["train"] == pytest.approx(before["train"] / 4, rel=0.25)
    assert some.accounts[0].records == {
        "documents": sum(documents.values()),
        "unused": before["train"] - documents["train"],
    }
    assert read(train_subset_ratio=1.0).accounts == every.accounts


def test_broken_records_are_counted_and_the_first_are_kept(
    both_passes, make_settings, make_source, make_texts
):
    broken = [{"text": None}, {"other": 1}, {"text": 5}, {"text": ["a"]}] + [{"text": 1.5}] * 10
    records = broken + [{"text": text} for text in make_texts(200)]
    (account,) = both_passes(make_settings([make_source("a", records=records)])).accounts
    assert account.records == {"documents": 200, "quarantined": 14}
    assert [entry["row"] for entry in account.quarantine] == list(range(1, 11))
    reasons = [entry["reason"].split()[0] for entry in account.quarantine[:5]]
    assert reasons == ["NoneType", "no", "int", "list", "float"]


@pytest.mark.parametrize("together", [1, 2**20])
def test_the_first_broken_records_of_several_files_are_kept(
    both_passes, make_settings, make_texts, write_jsonl, tmp_path, monkeypatch, together
):
    """Whether each has a folder of tokens or they share one."""
    monkeypatch.setattr(first_pass, "BYTES_TOGETHER", together)
    texts = make_texts(60)
    for index in range(4):
        records = [{"text": text} for text in texts[15 * index : 15 * (index + 1)]]
        records[2:2] = records[9:9] = [{"text": index}] * 2
        write_jsonl(tmp_path / f"{index}.jsonl", records)
    source = {"name": "a", "path": "json", "data_files": str(tmp_path / "*.jsonl")}
    merged = both_passes(make_settings([source]))
    (account,) = merged.accounts
    assert len(merged.folders) == (4 if together == 1 else 1)
    assert account.records == {"documents": 60, "quarantined": 16}
    expected = [(str(tmp_path / f"{index}.jsonl"), row) for index in range(4) for row in (3, 4, 10, 11)]
    assert [(entry["file"], entry["row"]) for entry in account.quarantine] == expected[:10]
    assert [entry["record"] for entry in account.quarantine] == list("0000111122")


BROKEN_LINES = {
    "a byte that is no UTF-8": b'{"text": "caf\xff and enough characters to be long"}',
    "broken JSON": b'{"text": "a quote is missing}',
    "half of a surrogate pair": b'{"text": "\\ud83d and enough characters to be long"}',
    "a line that was cut off": b'{"text": "cu',
    "another type": b'{"text": 7}',
}


@pytest.mark.parametrize("line", BROKEN_LINES.values(), ids=BROKEN_LINES)
@pytest.mark.parametrize("place", [0, 200, 399])
def test_one_broken_line_is_quarantined_with_file_and_row(
    both_passes, tmp_path, make_settings, make_texts, line, place
):
    lines = [json.dumps({"text": text}).encode() for text in make_texts(399)]
    lines.insert(place, line)
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join(lines))
    (account,) = both_passes(make_settings([{"name": "a", "path": "json", "data_files": str(file)}])).accounts
    (entry,) = account.quarantine
    assert (entry["source"], entry["file"], entry["row"]) == ("a", str(file), place + 1)
    json.dumps(entry).encode()
    assert account.records == {"documents": 399, "quarantined": 1}


def test_too_many_broken_records_end_the_step(both_passes, make_settings, make_source, make_texts):
    records = [{"text": text} for text in make_texts(197)] + [{"text": 5}] * 3
    source = make_source("a", records=records)
    accounts = both_passes(make_settings([source])).accounts
    check_broken(make_settings([source], max_broken_fraction=0.015).data, accounts)
    with pytest.raises(UserError, match=r"a: 3 of 200 .*a\.jsonl, row 198, int instead of str: 5") as error:
        check_broken(make_settings([source], max_broken_fraction=0.0149).data, accounts)
    assert "\n" not in str(error.value)


def test_a_source_without_a_document_is_told(both_passes, make_settings, make_source):
    records = [{"text": "short"}] * 3 + [{"text": None}]
    settings = make_settings([make_source("a", records=records)], max_broken_fraction=1)
    accounts = both_passes(settings).accounts
    with pytest.raises(UserError) as error:
        check_broken(settings.data, accounts)
    assert "a: none of its 4 records is a document: 3 filtered, 1 quarantined; see data.min_char" in str(
        error.value
    )


def test_with_validation_splits_of_their_own_no_training_document_is_held_out_for_it(
    splits, make_settings, make_texts, tmp_path, write_jsonl
):
    texts = {"train": make_texts(200), "held": make_texts(20, seed=1)}
    files = {
        name: write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in some])
        for name, some in texts.items()
    }
    source = {"name": "a", "path": "json", "data_files": files, "validation_split": "held"}
    found = splits(make_settings([source], validation_split_percentage=0))
    assert found["validation"] == sorted(texts["held"])
    assert sorted([*found["train"], *found["test"]]) == sorted(texts["train"]) and found["test"]


def test_a_source_of_nothing_but_duplicates_is_told(both_passes, make_settings, make_source):
    settings = make_settings([make_source("a"), make_source("b")])
    with pytest.raises(UserError, match=r"b: all of its documents are duplicates of those of other sources"):
        check_splits(settings.data, both_passes(settings).pools)


def test_an_empty_split_is_told(both_passes, make_settings, make_source):
    settings = make_settings([make_source("a", 3)], validation_split_percentage=0.001)
    with pytest.raises(
        UserError, match=r"none of its 3 usable documents falls into validation.*; .* raise data"
    ):
        check_splits(settings.data, both_passes(settings).pools)
