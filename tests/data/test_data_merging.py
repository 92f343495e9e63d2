"""The content of a data folder does not depend on how the work is divided."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest

from dynamic_transformers.data import blocks, encoding, first_pass, merging, pools, rows, shards
from dynamic_transformers.data.merging import mixture
from dynamic_transformers.data.prepare import prepare
from dynamic_transformers.data.splits import choose
from dynamic_transformers.manifest import MANIFEST, read_manifest

FACTS = ("sources", "splits", "content_digest", "unigram_loss", "vocab_size", "tokenizer_files")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, make_texts):
    """Writes texts with duplicates, more of another source, and conversations, into some files each."""
    texts = [*make_texts(250), *make_texts(30), *make_texts(60, seed=1)]
    words = make_texts(120, seed=3, low=2, high=20)
    records = {
        "a": [{"text": text} for text in texts],
        "b": [{"text": text} for text in [*make_texts(80, seed=1), *make_texts(250, seed=2)]],
        "c": [{"prompt": word, "response": other} for word in words[:60] for other in words[60:62]],
    }

    def write(files, seed=None):
        folder = tmp_path_factory.mktemp("corpus")
        sources = []
        for name, given in records.items():
            given = list(given)
            if seed is not None:
                random.Random(seed).shuffle(given)
            for index in range(files):
                lines = "".join(json.dumps(record) + "\n" for record in given[index::files])
                (folder / f"{name}{index}.jsonl").write_text(lines, encoding="utf-8")
            type_ = "finetune" if name == "c" else "pretrain"
            place = {"path": "json", "data_files": str(folder / f"{name}*.jsonl")}
            sources.append({"name": name, "type": type_, **place})
        return sources

    return write


@pytest.fixture(scope="module")
def content(tmp_path_factory, make_settings):
    """All files of a data folder, and of its manifest what is no place."""

    def make(sources, **data):
        settings = make_settings(
            sources, exhausted="repeat", max_tokens=60_000, max_document_characters=400, **data
        )
        folder = prepare(settings, tmp_path_factory.mktemp("made") / "data")
        manifest = read_manifest(folder)
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        found = {name: path.read_bytes() for name, path in files.items() if name != MANIFEST}
        assert {"train/tokens.bin", "test/targets.bin", "tasks/cloze.jsonl"} <= set(found)
        return found | {name: manifest[name] for name in FACTS}

    return make


@pytest.fixture(scope="module")
def at_once(content, corpus):
    """In one process and one part."""
    found = content(corpus(1), processes=1)
    assert [source["duplicates"] for source in found["sources"]] == [30, 60, 0]
    assert max(source["epochs"] for source in found["sources"]) > 2
    return found


def test_two_processes_make_the_same(content, corpus, at_once, shard_bytes):
    shard_bytes(20_000)
    assert content(corpus(1), processes=2) == at_once


@pytest.mark.parametrize("files", [1, 3])
def test_files_and_the_order_of_records_change_nothing(content, corpus, at_once, files):
    assert content(corpus(files, seed=files), processes=1) == at_once


SHARDS = [(rows, "SHARD_BYTES", 10_000), (first_pass, "BYTES_TOGETHER", 1)]
SMALL = {
    "shards": SHARDS,
    "shards that are read together": [(rows, "SHARD_BYTES", 8000), (first_pass, "BYTES_TOGETHER", 20_000)],
    "parts that are compared": [(merging, "COMPARED", 50), *SHARDS],
    "parts that are ordered": [(merging, "ORDERED", 60), (pools, "ORDERED", 45)],
    "buckets": [(pools, "BUCKET_BITS", 3), (pools, "BUCKETS", 8)],
    "open files": [(merging, "OPEN_FILES", 3), *SHARDS],
    "batches": [(shards, "BATCH_CHARACTERS", 1000), (encoding, "PART_CHARACTERS", 50)],
    "what waits": [(blocks, "FLUSH_TOKENS", 300)],
}


@pytest.mark.parametrize("what", SMALL)
def test_small_parts_change_nothing(content, corpus, at_once, monkeypatch, what):
    for module, name, value in SMALL[what]:
        assert getattr(module, name) > value
        monkeypatch.setattr(module, name, value)
    assert content(corpus(1), processes=1) == at_once


def test_repeated_documents_do_not_stand_beside_their_first_copy(both_passes, make_settings, make_source):
    settings = make_settings([make_source("a", 300), make_source("b", 900, seed=1)], exhausted="repeat")
    merged = both_passes(settings)
    chosen = choose(settings.data, "train", merged.pools["train"])
    assert len(chosen[0]) > 2
    found = list(mixture(merged.shards, merged.pools["train"], chosen))
    beside = sum(
        first.input_ids[:7].tobytes() == second.input_ids[:7].tobytes() for first, second in pairwise(found)
    )
    assert beside < 0.02 * len(found)
    # Each round goes through all of the mixture.
    places = {}
    for place, piece in enumerate(found):
        places.setdefault(piece.input_ids[:7].tobytes(), []).append(place / len(found))
    first_rounds = [min(there) for there in places.values() if len(there) > 2]
    last_rounds = [max(there) for there in places.values() if len(there) > 2]
    assert 0.1 < np.mean(first_rounds) < 0.35 and 0.65 < np.mean(last_rounds) < 0.9
