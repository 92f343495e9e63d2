"""A small corpus in files, and settings that read it."""

import gzip
import json
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from dynamic_transformers.configure import settings_from_dict

TEXT = "the gate selects a token and résumé naïve 東京 🙂 of depth router token score 12 + 7 prior layer"
WORDS = TEXT.split()


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def make_texts():
    def make(count, seed=0, low=8, high=120):
        rng = random.Random(seed)
        return [
            f"{seed}.{index} " + " ".join(rng.choices(WORDS, k=rng.randint(low, high)))
            for index in range(count)
        ]

    return make


@pytest.fixture(scope="session")
def write_jsonl():
    def write(path, records):
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def make_settings():
    """Settings for sources given as dictionaries; `data` holds further data settings."""

    def make(sources, seed=0, **data):
        defaults = {"vocab_size": 400, "block_size": 32, "cloze_examples": 8, "arithmetic_examples": 8}
        split = {"validation_split_percentage": 15, "test_split_percentage": 15}
        return settings_from_dict(
            {
                "run": {"seed": seed},
                "data": {"dataset_configs": sources, **defaults, **split, **data},
                "training": {"max_steps": 1},
            }
        )

    return make


@pytest.fixture
def make_source(tmp_path, make_texts, write_jsonl):
    """A jsonl source of generated texts (or of `records`)."""

    def make(name, count=200, seed=0, weight=1.0, records=None, **settings):
        if records is None:
            records = [{"text": text} for text in make_texts(count, seed)]
        path = write_jsonl(tmp_path / f"{name}.jsonl", records)
        return {"name": name, "path": "json", "data_files": path, "weight": weight, **settings}

    return make


@pytest.fixture(scope="session")
def mixed_sources(tmp_path_factory, make_texts, write_jsonl):
    """Three sources, three files each, in as many formats; each source has documents of another one."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        texts = [*make_texts(60, seed=number), *make_texts(20, seed=number + 1)]
        write_jsonl(folder / f"{number}.jsonl", [{"text": text} for text in texts])
        texts = [*make_texts(60, seed=10 + number), *make_texts(20, seed=number)]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / f"{number}.parquet")
        texts = [*make_texts(60, seed=20 + number), *make_texts(20, seed=10 + number)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    kinds = {"lines": "jsonl", "tables": "parquet", "packed": "jsonl.gz"}
    return [
        {
            "name": name,
            "path": "parquet" if kind == "parquet" else "json",
            "data_files": f"{folder}/*.{kind}",
        }
        for name, kind in kinds.items()
    ]
