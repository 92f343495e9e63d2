"""The whole step: contents of the data folder, determinism, reuse, tasks, errors."""

import json
import logging
import platform
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dynamic_transformers.data import arithmetic
from dynamic_transformers.data.conversations import PLAIN_TEMPLATE
from dynamic_transformers.data.loading import batches_of, load_split, load_tokenizer
from dynamic_transformers.data.prepare import data_config, prepare, work_folder
from dynamic_transformers.data.shards import Account, documents_of
from dynamic_transformers.data.sources import shards_of
from dynamic_transformers.data.splits import SUMS
from dynamic_transformers.data.tokenization import train_tokenizer
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.settings import UserError

SPLITS = ("train", "validation", "test")
FACTS = (
    *("sources", "splits", "content_digest", "unigram_loss"),
    *("vocab_size", "block_size", "seed", "tokenizer_name"),
)
ACCOUNT = SUMS["documents_in"]


def tasks(folder):
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (folder / "tasks").glob("*.jsonl")
    }


def texts_of(settings, split):
    """Texts of a split by source."""
    found = {}
    for source in settings.data.dataset_configs:
        documents = documents_of(shards_of(source), source, settings.data, Account())
        found[source.name] = [document.text for _, document in documents if document.split == split]
    return found


def facts(folder):
    return {name: read_manifest(folder)[name] for name in FACTS}


def input_ids(folder):
    return {split: (folder / split / "tokens.bin").read_bytes() for split in SPLITS}


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, make_settings):
    """The three embedded sources, small."""
    sources = [
        {"name": name, "path": "embedded", "weight": weight, "max_documents": 1500}
        for name, weight in (("prose", 2), ("code", 2), ("math", 1))
    ]
    settings = make_settings(sources, vocab_size=512, block_size=64, max_tokens=40000, max_eval_tokens=5000)
    folder = prepare(settings, tmp_path_factory.mktemp("embedded") / "data")
    return settings, folder


def test_embedded_folder_holds_what_its_manifest_says(embedded):
    settings, folder = embedded
    manifest = read_manifest(folder)
    assert manifest["step"] == "prepare_data" and manifest["schema_version"] == 1
    assert manifest["config"] == {
        **data_config(settings),
        "fingerprints": {name: {"Python": platform.python_version()} for name in ("prose", "code", "math")},
    }
    assert manifest["vocab_size"] == len(load_tokenizer(folder)) == 512
    for split in SPLITS:
        told, blocks = manifest["splits"][split], load_split(folder, split)
        ids, positions, _ = (tensor.numpy() for tensor in blocks.batch(range(len(blocks))).values())
        assert ids.shape == positions.shape == (told["blocks"], 64)
        assert told["tokens"] == ids.size
        assert told["target_tokens"] == np.count_nonzero(positions)
        assert told["bytes"] == blocks.num_bytes
        assert set(np.unique(np.diff(positions)[positions[:, 1:] != 0])) == {1}
        assert 1.5 < told["bytes"] / told["target_tokens"] < 6
    for source in manifest["sources"]:
        asked = {"prose": 0.4, "code": 0.4, "math": 0.2}[source["name"]]
        assert source["proportion_asked"] == pytest.approx(asked)
        assert source["proportion_realised"] == pytest.approx(asked, abs=0.05)
        assert source["documents_in"] == sum(source[name] for name in ACCOUNT)
        assert source["documents_used"] > 0 < source["held_out"]
    assert sum(source["tokens"] for source in manifest["sources"]) >= manifest["splits"]["train"]["tokens"]
    assert 4 < manifest["unigram_loss"]["test"] < np.log(512)


def test_a_loader_gives_batches(embedded):
    batch = next(batches_of(load_split(embedded[1], "train"), 3))
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(3, 64)}
    unpredicted = batch["position_ids"] == 0
    assert (batch["labels"][unpredicted] == -100).all()
    assert (batch["labels"][~unpredicted] == batch["input_ids"][~unpredicted]).all()


def test_tasks_come_from_the_test_split_only(embedded):
    settings, folder = embedded
    held_out = texts_of(settings, "test")
    found = tasks(folder)
    assert set(found) == {"perplexity_prose", "perplexity_code", "perplexity_math", "cloze", "arithmetic"}
    for name, texts in held_out.items():
        examples = [example["text"] for example in found[f"perplexity_{name}"]]
        assert 0 < len(examples) <= 40 and max(map(len, examples)) <= 1200
        assert set(examples) <= {text[:1200] for text in texts}
    assert len(found["cloze"]) == 8
    for index, example in enumerate(found["cloze"]):
        texts = held_out[("prose", "code")[index % 2]]
        true = example["context"] + example["choices"][example["answer"]]
        assert 150 <= len(example["context"]) <= 200
        owners = [text for text in texts if true in text]
        assert owners
        assert len(set(example["choices"])) == 4 and {len(choice) for choice in example["choices"]} == {40}
        for choice in example["choices"]:
            assert any(choice in text for text in texts)
    assert sorted(example["answer"] for example in found["cloze"]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_arithmetic_questions_are_unseen_and_their_answers_right(embedded):
    settings, folder = embedded
    training = texts_of(settings, "train")
    seen = {key for texts in training.values() for text in texts for key in arithmetic.expressions(text)}
    math = "\n".join(training["math"])
    examples = tasks(folder)["arithmetic"]
    assert len(examples) == 8 == len({example["question"] for example in examples})
    assert sorted(example["answer"] for example in examples) == [0, 0, 1, 1, 2, 2, 3, 3]
    for example in examples:
        (key,) = arithmetic.expressions(example["question"])
        assert key not in seen
        expression = example["question"].removeprefix("Question: ").removesuffix(" =")
        assert f" {expression} =" not in math
        assert [choice == f" {eval(expression)}" for choice in example["choices"]].index(True) == example[
            "answer"
        ]
        assert len(set(example["choices"])) == 4
        assert f"\n{example['question'].split(expression)[0]}" in math  # the form is the documents' own


def test_two_runs_are_the_same_to_the_byte(tmp_path, make_settings, make_source):
    settings = make_settings(
        [make_source("a", 300), make_source("b", 300, seed=1, weight=3)], max_tokens=8000
    )
    first, second = prepare(settings, tmp_path / "1"), prepare(settings, tmp_path / "2")
    assert input_ids(first) == input_ids(second)
    assert facts(first) == facts(second)
    assert tasks(first) == tasks(second) and "cloze" in tasks(first)


def test_another_seed_changes_the_training_order_alone(tmp_path, make_settings, make_source):
    sources = [make_source("a", 300)]
    first, second = (prepare(make_settings(sources, seed=seed), tmp_path / str(seed)) for seed in (0, 1))
    ids = input_ids(first), input_ids(second)
    assert ids[0]["train"] != ids[1]["train"]
    assert ids[0]["validation"] == ids[1]["validation"] and ids[0]["test"] == ids[1]["test"]
    assert tasks(first) == tasks(second)


def test_a_finished_folder_is_reused_unless_forced(tmp_path, make_settings, make_source, caplog):
    settings = make_settings([make_source("a", 200)])
    folder = prepare(settings, tmp_path / "data")
    made, digest = (folder / "manifest.json").stat().st_ino, read_manifest(folder)["digest"]
    other_batch = replace(settings, data=replace(settings.data, batch_size=3, output_dir="elsewhere"))
    assert prepare(other_batch, folder) == folder
    assert (folder / "manifest.json").stat().st_ino == made
    with caplog.at_level(logging.INFO, "dynamic_transformers"):
        prepare(settings, folder, force=True)
    assert (folder / "manifest.json").stat().st_ino != made
    assert read_manifest(folder)["digest"] == digest  # runs on these data still find them
    lines = caplog.text
    assert "source a: 200 records read" in lines and "tokenizer: " in lines and "train: " in lines


lines = st.sampled_from([b"broken", b'{"text": 5}', b'{"text": "short"}'])
texts = st.integers(0, 400).map(lambda index: json.dumps({"text": f"document number {index} " * 3}).encode())


@given(
    sources=st.lists(st.lists(texts | lines, max_size=300), min_size=1, max_size=3),
    max_tokens=st.none() | st.integers(30, 3000),
)
@hypothesis_settings(max_examples=12, deadline=None, phases=[Phase.generate])  # shrinking takes minutes
def test_no_document_disappears(tmp_path_factory, make_settings, sources, max_tokens):
    folder = tmp_path_factory.mktemp("account")
    always = [json.dumps({"text": f"of every source, {index} " * 3}).encode() for index in range(60)]
    configs = []
    for index, records in enumerate(sources):
        file = folder / f"{index}.jsonl"
        file.write_bytes(b"\n".join([*records, *always]))
        always = [line.replace(b"every", b"every other") for line in always]
        configs.append({"name": f"source{index}", "path": "json", "data_files": str(file)})
    settings = make_settings(
        configs,
        max_tokens=max_tokens,
        max_eval_tokens=300,
        max_broken_fraction=1,
        block_size=8,
        cloze_examples=0,
    )
    manifest = read_manifest(prepare(settings, folder / "data"))
    for told, records in zip(manifest["sources"], sources, strict=True):
        assert told["documents_in"] == len(records) + 60 == sum(told[name] for name in ACCOUNT)
        assert told["quarantined"] == sum(record in (b"broken", b'{"text": 5}') for record in records)
        assert told["filtered"] == records.count(b'{"text": "short"}')
        assert told["documents_used"] > 0 < told["held_out"]
    used = sum(told["documents_used"] for told in manifest["sources"])
    assert used == manifest["splits"]["train"]["documents"]


def test_quarantine_file_and_a_tokenizer_by_name(tmp_path, make_settings, make_source, make_texts):
    records = [{"text": text} for text in make_texts(200)] + [{"text": 7}]
    source = make_source("a", records=records)
    first = prepare(make_settings([source]), tmp_path / "1")
    (entry,) = map(json.loads, (first / "quarantine.jsonl").read_text().splitlines())
    place = {"source": "a", "file": source["data_files"], "row": 201}
    assert entry == {**place, "reason": "int instead of str", "record": "7"}
    assert read_manifest(first)["sources"][0]["quarantined"] == 1
    named = make_settings([source], tokenizer_name=str(first / "tokenizer"), vocab_size=9999)
    second = prepare(named, tmp_path / "2")
    assert input_ids(first) == input_ids(second)
    assert read_manifest(second)["tokenizer_name"] == str(first / "tokenizer")


def test_a_failed_run_leaves_the_old_folder_and_no_other(tmp_path, make_settings, make_source):
    folder = prepare(make_settings([make_source("a", 200)]), tmp_path / "out" / "data")
    broken = make_settings([make_source("b", records=[{"text": 1}] * 200)])
    with pytest.raises(UserError, match="200 of 200 records are broken"):
        prepare(broken, folder, force=True)
    # What was tokenized stays for the next try.
    assert {path.name for path in folder.parent.iterdir()} == {"data", work_folder(folder).name}
    assert read_manifest(folder)["sources"][0]["name"] == "a"


@pytest.mark.parametrize("limit", ["max_tokens", "max_eval_tokens"])
def test_a_quota_that_leaves_nothing_is_told(tmp_path, make_settings, make_source, limit):
    sources = [make_source(name, seed=seed) for seed, name in enumerate("abc")]
    split = {"max_tokens": "train", "max_eval_tokens": "validation"}[limit]
    with pytest.raises(UserError, match=f"^the {split} split has 0 tokens, less than data.block_size=32: "):
        prepare(make_settings(sources, **{limit: 1}), tmp_path / "data")


@pytest.mark.parametrize("given", [False, True])
def test_the_saved_tokenizer_gives_the_trained_ids_of_a_chat(tmp_path, make_settings, make_source, given):
    """Without options, as other people's programs call it."""
    chats = [{"prompt": f"what is {n}?", "response": f"{n} <|endoftext|> it is"} for n in range(200)]
    options = {}
    if given:
        tokenizer = train_tokenizer(["what is it? 0 1 2"], 300, PLAIN_TEMPLATE)
        tokenizer.save_pretrained(tmp_path / "given")
        config = tmp_path / "given" / "tokenizer_config.json"
        known = json.loads(config.read_text())
        del known["split_special_tokens"]
        config.write_text(json.dumps(known))
        options = {"tokenizer_name": str(tmp_path / "given")}
    settings = make_settings([make_source("a", records=chats, type="finetune")], block_size=64, **options)
    prepare(settings, tmp_path / "data")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer")
    train = load_split(tmp_path / "data", "train")
    asked = re.search(r"what is \d+\?", tokenizer.decode(train.input_ids(0)))
    messages = [{"role": "user", "content": asked[0]}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == ids[0]
    trained = [train.input_ids(place).tolist() for place in range(len(train))]
    assert any(row[i : i + len(ids)] == ids for row in trained for i in range(len(row)))


def test_mistakes_are_told_in_one_line(tmp_path, make_settings, make_source):
    source = make_source("a", 200)
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("precious")
    (tmp_path / "file").touch()
    cases = [
        (make_settings([source]), home, "holds something else than an output of prepare_data"),
        (make_settings([source]), tmp_path / "file", "is a file"),
        (
            make_settings([source], block_size=2000, max_tokens=100),
            tmp_path / "out",
            "less than data.block_size=2000",
        ),
    ]
    for settings, folder, words in cases:
        with pytest.raises(UserError, match=words) as error:
            prepare(settings, folder, force=True)
        assert "\n" not in str(error.value)
    assert (home / "thesis.tex").read_text() == "precious"
    with pytest.raises(UserError, match="no such folder"):
        load_split(tmp_path / "out", "train")
