"""A small corpus in files, settings that read it, and what the two passes make of it."""

import gzip
import json
import random
from typing import NamedTuple

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from dynamic_transformers.configure import settings_from_dict
from dynamic_transformers.data import first_pass, rows, tables
from dynamic_transformers.data.first_pass import encode_all
from dynamic_transformers.data.merging import Duplicates, ShardFolder, Shards, each_once
from dynamic_transformers.data.pools import Pool
from dynamic_transformers.data.shards import Account
from dynamic_transformers.data.tokenization import train_tokenizer

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


@pytest.fixture
def shard_bytes(monkeypatch):
    """Sets from how many bytes on a file is divided, and its parts are not read together."""

    def change(size):
        monkeypatch.setattr(rows, "SHARD_BYTES", size)
        monkeypatch.setattr(tables, "SHARD_BYTES", size)
        monkeypatch.setattr(first_pass, "BYTES_TOGETHER", size)

    return change


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
    """A tokenizer of which each token is a byte, and its folder."""
    tokenizer = train_tokenizer(["a"], 257)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return tokenizer, folder


class Merged(NamedTuple):
    """What both passes leave."""

    accounts: list[Account]
    folders: list[ShardFolder]
    shards: Shards
    pools: dict[str, list[Pool]]
    duplicates: list[Duplicates]

    def texts(self, tokenizer, source=0):
        """Sorted texts of a source by split."""
        found = {}
        for split, pools in self.pools.items():
            entries = [entry for part in pools[source].parts() for entry in part]
            pieces = [self.shards.piece(*(int(e[n]) for n in ("shard", "row", "tokens"))) for e in entries]
            found[split] = sorted(tokenizer.decode(piece.input_ids[1:-1]) for piece in pieces)
        return found


@pytest.fixture
def both_passes(tmp_path_factory, byte_tokenizer):
    """Tokenizes all sources of settings, byte by byte, and leaves each document once."""
    opened = []

    def run(settings):
        tokenizer, folder = byte_tokenizer
        work = tmp_path_factory.mktemp("work")
        accounts, folders = encode_all(settings.data, tokenizer, folder, work)
        opened.append(Shards(folders, len(tokenizer)))
        merged = each_once(opened[-1], len(accounts), settings.run.seed, work / "pools")
        return Merged(accounts, folders, opened[-1], *merged)

    yield run
    for shards in opened:
        shards.close()


@pytest.fixture(scope="session")
def mixed_sources(tmp_path_factory, make_texts, write_jsonl):
    """Six sources of a file each and one of three, in three formats; they have documents of each other."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        texts = [*make_texts(60, seed=number), *make_texts(20, seed=number + 1)]
        write_jsonl(folder / f"{number}.jsonl", [{"text": text} for text in texts])
        texts = [*make_texts(60, seed=10 + number), *make_texts(20, seed=number)]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / f"{number}.parquet")
        texts = [*make_texts(60, seed=20 + number), *make_texts(20, seed=10 + number)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    files = {f"lines{number}": f"{number}.jsonl" for number in range(3)}
    files |= {f"tables{number}": f"{number}.parquet" for number in range(3)}
    files["packed"] = "*.jsonl.gz"
    return [
        {
            "name": name,
            "path": "parquet" if name.startswith("tables") else "json",
            "data_files": f"{folder}/{file}",
        }
        for name, file in files.items()
    ]
