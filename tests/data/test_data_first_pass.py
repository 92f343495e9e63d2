"""What is tokenized again and what is not, and where finished shards lie until the whole is finished."""

import dataclasses
import json
import logging
import re
import shutil

import numpy as np
import pytest

from dynamic_transformers.data import first_pass
from dynamic_transformers.data.first_pass import encode_all
from dynamic_transformers.data.prepare import prepare, work_folder
from dynamic_transformers.data.shards import ACCOUNT_FILE, TOKENS
from dynamic_transformers.data.tokenization import train_tokenizer
from dynamic_transformers.settings import UserError


@pytest.fixture(autouse=True)
def each_file_by_itself(monkeypatch):
    """Small ones would be read together (test_data_small_files.py)."""
    monkeypatch.setattr(first_pass, "BYTES_TOGETHER", 1)


@pytest.fixture
def files(tmp_path, make_texts, write_jsonl):
    """Four files of 50 texts, and what writes one of them."""

    def write(index, seed):
        records = [{"text": text} for text in make_texts(50, seed)]
        write_jsonl(tmp_path / f"{index}.jsonl", records)

    for index in range(4):
        write(index, index)
    return write


@pytest.fixture
def settings(tmp_path, files, make_settings):
    source = {"name": "a", "path": "json", "data_files": str(tmp_path / "*.jsonl")}
    return make_settings([source], processes=1, block_size=16)


@pytest.fixture
def tokenized(tmp_path, byte_tokenizer):
    """Does the first pass; returns how many shards it tokenized, and the account."""
    made = {}  # folder → what tells its file from a new one

    def run(data, tokenizer=byte_tokenizer):
        (account,), folders = encode_all(data, *tokenizer, tmp_path / "work")
        before = dict(made)
        files = {of.folder.name: (of.folder / ACCOUNT_FILE).stat() for of in folders}
        made.update({name: (file.st_ino, file.st_mtime_ns) for name, file in files.items()})
        anew = [name for name, file in made.items() if before.get(name) != file]
        left = {path.name for path in (tmp_path / "work").iterdir()}
        assert left == set(made), "something else is left"
        return len(anew), account

    return run


def test_finished_shards_are_used_again(settings, tokenized, files, caplog):
    caplog.set_level(logging.INFO, "dynamic_transformers")
    first, account = tokenized(settings.data)
    assert (first, account.records) == (4, {"documents": 200})
    assert tokenized(settings.data) == (0, account)
    assert "data: 4 of 4 shards are there from before" in caplog.messages
    files(2, seed=9)
    changed, other = tokenized(settings.data)
    assert changed == 1 and other.tokens != account.tokens
    files(4, seed=10)
    assert tokenized(settings.data)[0] == 1
    files(2, seed=2)
    assert tokenized(settings.data)[0] == 0  # as it was


def test_half_a_shard_is_none(settings, tokenized, tmp_path):
    _, account = tokenized(settings.data)
    work = tmp_path / "work"
    folder = sorted(work.iterdir())[1]
    folder.rename(work / f".{folder.name}.new-1234")  # what a killed process leaves
    assert tokenized(settings.data) == (1, account)
    assert not list(work.glob(".*"))


# Beside them, what the rows of a shard depend on (test_data_shards.py).
CHANGES = {
    "min_characters": 200,
    "max_document_characters": 100,
    "long_documents": "filter",
    "validation_split_percentage": 30.0,
    "test_split_percentage": 30.0,
    "arithmetic_examples": 0,
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_settings_mean_other_shards(settings, tokenized, name):
    first = tokenized(settings.data)
    assert tokenized(dataclasses.replace(settings.data, **{name: CHANGES[name]}))[0] == 4
    assert tokenized(settings.data) == (0, first[1])


def test_another_tokenizer_means_other_shards(settings, tokenized, make_texts, tmp_path):
    _, account = tokenized(settings.data)
    other = train_tokenizer(make_texts(50), 300)
    other.save_pretrained(tmp_path / "other")
    changed, after = tokenized(settings.data, (other, tmp_path / "other"))
    assert changed == 4 and after.tokens < account.tokens


def test_a_tokenizer_that_takes_the_place_of_another_is_read_anew(settings, files, tmp_path, make_texts):
    """Within one process, too: in a notebook, or where several data sets are prepared."""
    found = []
    for size in (300, 400):
        tokenizer = train_tokenizer(make_texts(100), size)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        _, folders = encode_all(settings.data, tokenizer, tmp_path / "tokenizer", tmp_path / "work")
        found.append(max(np.fromfile(of.folder / TOKENS, "<u2").max() for of in folders))
    assert found[0] < 300 <= found[1]


def test_benchmark_texts_that_take_the_place_of_others_are_read_anew(
    settings, files, byte_tokenizer, tmp_path
):
    file = tmp_path / "texts.of.tasks"
    text = json.loads((tmp_path / "0.jsonl").read_text().splitlines()[0])["text"]
    found = []
    for some in ("of something else " * 10, text):
        file.write_text(json.dumps({"task": "t", "text": some}) + "\n")
        data = dataclasses.replace(settings.data, decontaminate=str(file))
        (account,), _ = encode_all(data, *byte_tokenizer, tmp_path / "other")
        found.append(account.records["contaminated"])
    assert found[0] == 0 < found[1]


def test_what_a_mixture_takes_changes_no_shard(settings, tokenized):
    first = tokenized(settings.data)
    source = dataclasses.replace(settings.data.dataset_configs[0], weight=3, max_tokens=70)
    others = {
        "block_size": 8,
        "max_tokens": 500,
        "exhausted": "repeat",
        "max_eval_tokens": 99,
        "packing": "best_fit",
    }
    data = dataclasses.replace(settings.data, dataset_configs=[source], **others)
    assert tokenized(data) == (0, first[1])


@pytest.fixture
def reused(caplog):
    """How many shards of how many the last preparation found."""
    caplog.set_level(logging.INFO, "dynamic_transformers")

    def read():
        found = [match for line in caplog.messages if (match := re.search(r"(\d+) of (\d+) shards", line))]
        caplog.clear()
        return tuple(map(int, found[-1].groups())) if found else None

    return read


def test_the_shards_of_a_failed_preparation_serve_the_next(settings, tmp_path, files, reused):
    out = tmp_path / "data"
    too_large = dataclasses.replace(settings, data=dataclasses.replace(settings.data, block_size=100_000))
    with pytest.raises(UserError, match=r"less than data\.block_size=100000"):
        prepare(too_large, out)
    assert not out.exists() and len([*work_folder(out).glob("*/account.json")]) == 4
    assert reused() is None
    files(1, seed=7)
    with pytest.raises(UserError, match=r"less than data\.block_size=100000"):
        prepare(too_large, out)
    # The tokenizer is trained on these texts, and so is another one now.
    assert reused() is None
    made = prepare(settings, out)
    assert reused() == (4, 4)
    assert not work_folder(out).exists()
    assert sorted(path.name for path in out.parent.glob("*data*")) == ["data"]
    before = {path.name: path.read_bytes() for path in (made / "train").iterdir()}
    shutil.rmtree(out)
    prepare(settings, out)
    assert reused() is None
    assert {path.name: path.read_bytes() for path in (made / "train").iterdir()} == before


def test_what_was_tokenized_stays_where_a_later_file_is_damaged(settings, tmp_path, reused):
    out = tmp_path / "data"
    train_tokenizer(["a"], 257).save_pretrained(tmp_path / "own")
    settings.data.tokenizer_name = str(tmp_path / "own")
    sound = (tmp_path / "3.jsonl").read_bytes()
    (tmp_path / "3.jsonl").write_bytes(b"\x1f\x8b" + sound)
    with pytest.raises(UserError, match=r"3\.jsonl is cut off or damaged"):
        prepare(settings, out)
    (tmp_path / "3.jsonl").write_bytes(sound)
    prepare(settings, out)
    assert reused() == (3, 4)
