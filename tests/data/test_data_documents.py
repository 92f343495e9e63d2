"""Quarantine, filter, duplicates, and the split by hash."""

import hashlib
import json

import pytest

from dynamic_transformers.data.documents import SPLITS, collect, split_of
from dynamic_transformers.settings import UserError


def texts_by_split(corpus):
    return {
        split: {document.text for documents in corpus.splits[split].values() for document in documents}
        for split in SPLITS
    }


def test_every_document_is_in_one_split_of_about_the_asked_size(make_settings, make_source):
    splits = texts_by_split(collect(make_settings([make_source("a", 2000)]).data))
    assert sum(map(len, splits.values())) == 2000 == len(set.union(*splits.values()))
    for split, fraction in {"train": 0.70, "validation": 0.15, "test": 0.15}.items():
        assert len(splits[split]) / 2000 == pytest.approx(fraction, abs=0.04)


def test_another_source_name_order_or_seed_moves_no_document(make_settings, make_source):
    a, b = make_source("a", 200), make_source("b", 200, seed=1)
    alone = texts_by_split(collect(make_settings([a]).data))
    both = texts_by_split(collect(make_settings([b, {**a, "name": "renamed"}], seed=7).data))
    assert all(alone[split] < both[split] for split in SPLITS)


def test_borders_of_the_splits(make_settings):
    data = make_settings([{"name": "a"}], test_split_percentage=25, validation_split_percentage=50).data
    at = {
        fraction: split_of(bytes([int(fraction * 256)]) + bytes(31), data)
        for fraction in (0, 0.25, 0.74, 0.75)
    }
    assert at == {0: "test", 0.25: "validation", 0.74: "validation", 0.75: "train"}


def test_duplicates_belong_to_the_first_source_and_short_ones_go(make_settings, make_source, make_texts):
    texts = make_texts(150)
    a = make_source("a", records=[{"text": text} for text in [*texts, *texts[:20], "short"]])
    b = make_source("b", records=[{"text": text} for text in [*texts[100:], *make_texts(150, seed=1)]])
    corpus = collect(make_settings([a, b], min_characters=20).data)
    assert vars(corpus.counts["a"]) == {
        "documents_in": 171,
        "filtered": 1,
        "duplicates": 20,
        "quarantined": 0,
    }
    assert vars(corpus.counts["b"]) == {
        "documents_in": 200,
        "filtered": 0,
        "duplicates": 50,
        "quarantined": 0,
    }
    document = corpus.splits["train"]["b"][0]
    assert document.source == "b" and document.digest == hashlib.sha256(document.text.encode()).digest()


def test_broken_records_are_counted_and_the_first_are_kept(make_settings, make_source, make_texts):
    broken = [{"text": None}, {"other": 1}, {"text": 5}, {"text": ["a"]}] + [{"text": 1.5}] * 10
    records = broken + [{"text": text} for text in make_texts(200)]
    corpus = collect(make_settings([make_source("a", records=records)], max_broken_fraction=0.07).data)
    assert vars(corpus.counts["a"]) == {
        "documents_in": 214,
        "filtered": 0,
        "duplicates": 0,
        "quarantined": 14,
    }
    assert [entry["row"] for entry in corpus.quarantine] == list(range(1, 11))
    reasons = [entry["reason"].split()[0] for entry in corpus.quarantine[:5]]
    assert reasons == ["NoneType", "no", "int", "list", "float"]


BROKEN_LINES = {
    "a byte that is no UTF-8": b'{"text": "caf\xff and enough characters to be long"}',
    "broken JSON": b'{"text": "a quote is missing}',
    "half of a surrogate pair": b'{"text": "\\ud83d and enough characters to be long"}',
    "a line that was cut off": b'{"text": "cu',
    "another type": b'{"text": 7}',
}


@pytest.mark.parametrize("line", BROKEN_LINES.values(), ids=BROKEN_LINES)
@pytest.mark.parametrize("place", [0, 200, 399])
def test_one_broken_line_is_quarantined_with_file_and_row(tmp_path, make_settings, make_texts, line, place):
    lines = [json.dumps({"text": text}).encode() for text in make_texts(399)]
    lines.insert(place, line)
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join(lines))
    corpus = collect(make_settings([{"name": "a", "path": "json", "data_files": str(file)}]).data)
    (entry,) = corpus.quarantine
    assert (entry["source"], entry["file"], entry["row"]) == ("a", str(file), place + 1)
    json.dumps(entry).encode()
    assert sum(map(len, texts_by_split(corpus).values())) == 399


def test_too_many_broken_records_end_the_step(make_settings, make_source, make_texts):
    records = [{"text": text} for text in make_texts(197)] + [{"text": 5}] * 3
    source = make_source("a", records=records)
    collect(make_settings([source], max_broken_fraction=0.015).data)
    with pytest.raises(UserError, match=r"a: 3 of 200 .*a\.jsonl, row 198, int instead of str: 5") as error:
        collect(make_settings([source], max_broken_fraction=0.0149).data)
    assert "\n" not in str(error.value)


def test_an_empty_split_is_told(make_settings, make_source):
    settings = make_settings([make_source("a", 3)], validation_split_percentage=0.001)
    with pytest.raises(UserError, match="none of its 3 usable documents falls into the validation split"):
        collect(settings.data)
