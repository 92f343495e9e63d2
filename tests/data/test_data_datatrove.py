"""Tokens of datatrove: what is read, what is refused, and with which tokenizer."""

import dataclasses
import os
import struct
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders

from dynamic_transformers.data.datatrove import check_tokenizer, tokenizer_of
from dynamic_transformers.data.first_pass import encode_all
from dynamic_transformers.data.prepare import prepare
from dynamic_transformers.data.rows import UnreadableError
from dynamic_transformers.data.sources import read_shard, shards_of
from dynamic_transformers.data.tokenization import END_OF_TEXT, load_pretrained_tokenizer, train_tokenizer
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.settings import SourceSettings, UserError
from tests.data.all_rows import read_records


@pytest.fixture
def datatrove(tmp_path):
    """Writes a file as datatrove 0.10 does; its DocumentTokenizer ends each document with a marker."""
    tokenizer = train_tokenizer(["the gate selects a token"] * 5, 300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)

    def write(documents, letter="H", name=tmp_path / "tokenizer"):
        ids = [[*document, end] for document in documents]
        ends = [sum(map(len, ids[: index + 1])) for index in range(len(ids))]
        tokens = [token for document in ids for token in document]
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        (folder / "00000_x.ds").write_bytes(struct.pack(f"<{len(tokens)}{letter}", *tokens))
        (folder / "00000_x.ds.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
        metadata = f"{name}|{struct.calcsize(letter)}\n{len(tokens)}\n{len(tokens)} T"
        (folder / "00000_x.ds.metadata").write_text(metadata)
        return SourceSettings(name="mine", path="datatrove", data_files=str(folder))

    return write


DOCUMENTS = [[5, 6, 7], [], [8], list(range(10, 60))]


@pytest.mark.parametrize("letter", ["H", "I"])
def test_a_folder_of_datatrove_gives_the_tokens_of_its_documents(datatrove, monkeypatch, letter, tmp_path):
    given = datatrove(DOCUMENTS, letter)
    (shard,) = shards_of(given)
    assert (shard.builder, shard.part) == ("datatrove", (0, 4))
    assert [row.value.tolist() for row in read_records(given)] == DOCUMENTS
    assert tokenizer_of(shard.file) == str(tmp_path / "tokenizer")
    metadata = Path(f"{shard.file}.metadata")
    metadata.write_text(metadata.read_text().replace(f"|{struct.calcsize(letter)}", ""))
    assert tokenizer_of(shard.file) == str(tmp_path / "tokenizer")
    monkeypatch.setattr("dynamic_transformers.data.datatrove.PIECE", 1)
    monkeypatch.setattr("dynamic_transformers.data.tables.SHARD_BYTES", 1)
    shards = shards_of(given)
    assert [shard.part for shard in shards] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    rows = [row for shard in shards for row in read_shard(given, shard)]
    assert [row.value.tolist() for row in rows] == DOCUMENTS and [row.number for row in rows] == [1, 2, 3, 4]
    for most in (1, 3):
        some = dataclasses.replace(given, max_documents=most)
        assert [row.value.tolist() for row in read_records(some)] == DOCUMENTS[:most]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda file: file.with_name(f"{file.name}.index").unlink(), "00000_x.ds.index is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-2]), "do not fit the index beside it"),
        (lambda file: file.with_name(f"{file.name}.loss").touch(), "masks of datatrove are not read"),
        (lambda file: file.with_name(f"{file.name}.metadata").unlink(), "names no tokenizer"),
        (
            lambda file: file.with_name(f"{file.name}.metadata").write_text("Unknown Tokenizer\n1\n1 T"),
            "names no tokenizer",
        ),
        (
            lambda file: file.with_name(f"{file.name}.metadata").write_text("Unknown Tokenizer|2\n1\n1 T"),
            "names no tokenizer",
        ),
        (lambda file: file.with_name(f"{file.name}.metadata").write_text("no/such|2\n1\n1 T"), "no/such"),
    ],
)
def test_files_of_datatrove_that_cannot_be_read_are_told(datatrove, tmp_path, harm, words):
    given = datatrove(DOCUMENTS)
    harm(tmp_path / "out" / "00000_x.ds")
    with pytest.raises(UserError) as error:
        list(read_records(given))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("data.dataset_configs.mine: ")


def test_a_file_of_datatrove_that_is_cut_while_it_is_read_is_told(datatrove, tmp_path):
    rows = read_records(datatrove([[5] * 100_000] * 3))
    next(rows)
    os.truncate(tmp_path / "out" / "00000_x.ds", 250_000)
    with pytest.raises(UserError, match=r"00000_x\.ds: was cut while it was read: it ends in document 2$"):
        list(rows)


def test_tokens_of_datatrove_are_read_with_their_own_tokenizer_only(datatrove, tmp_path, make_settings):
    names = {
        "own": tmp_path / "tokenizer",
        "more": tmp_path / "more",
        "other": tmp_path / "other",
        "none": None,
    }
    own = load_pretrained_tokenizer(str(names["own"]))
    texts = [f"the gate {number} selects a token" for number in range(100)]
    source = vars(datatrove([own(text, add_special_tokens=False)["input_ids"] for text in texts]))
    own.add_tokens(["<|im_start|>"])
    own.save_pretrained(names["more"])
    train_tokenizer(["12 + 7 = 19"] * 5, 300).save_pretrained(names["other"])
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts))
    made = {}
    for name, tokenizer in names.items():
        given = {"tokenizer_name": tokenizer and str(tokenizer), "min_characters": 0}
        try:
            folder = prepare(make_settings([source], **given), tmp_path / f"of {name}")
            made[name] = read_manifest(folder)["sources"][0]
        except UserError as error:
            made[name] = str(error)
    text_source = {"name": "mine", "path": "text", "data_files": str(file)}
    settings = make_settings([text_source], tokenizer_name=str(names["own"]), min_characters=0)
    of_texts = read_manifest(prepare(settings, tmp_path / "of texts"))["sources"][0]
    assert made["own"]["documents_in"] == made["more"]["documents_in"] == 100
    assert made["own"]["tokens_in"] == made["more"]["tokens_in"] == of_texts["tokens_in"]
    assert "its tokens are those of" in made["other"] and "data.tokenizer_name does not have" in made["other"]
    assert "name the tokenizer that made them" in made["none"]
    assert all(made[name].startswith("data.dataset_configs.mine: ") for name in ("other", "none"))


def test_sums_that_stand_in_tokens_of_datatrove_are_no_unseen_questions(datatrove, tmp_path, make_settings):
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    sums = [f"{number} + {number + 1} = {2 * number + 1}" for number in range(100)]
    given = datatrove([tokenizer.encode(text).ids for text in sums])
    settings = make_settings([dataclasses.asdict(given)], tokenizer_name=str(tmp_path / "tokenizer"))
    loaded = load_pretrained_tokenizer(settings.data.tokenizer_name)
    (account,), _ = encode_all(settings.data, loaded, tmp_path / "tokenizer", tmp_path / "work")
    assert len(account.questions) > 50


def test_tokens_of_datatrove_need_a_byte_level_tokenizer(datatrove, tmp_path):
    file = str(shards_of(datatrove(DOCUMENTS))[0].file)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    check_tokenizer(file, tokenizer)
    tokenizer.decoder = decoders.Metaspace()
    with pytest.raises(UnreadableError, match="byte-level tokenizers only"):
        check_tokenizer(file, tokenizer)
