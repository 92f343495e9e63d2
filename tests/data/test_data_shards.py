"""The rows of all shards of a source do not depend on where its files are divided."""

import dataclasses
import gzip
import json

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamic_transformers.data import rows
from dynamic_transformers.data.fingerprints import shard_identity
from dynamic_transformers.data.sources import Shard, read_shard, shards_of
from dynamic_transformers.settings import SourceSettings, UserError
from tests.data.all_rows import read_records

TEXTS = [f"document {index} " + "é東" * (index % 7) for index in range(60)]


PLAIN = {"use_dictionary": False, "compression": "none"}  # sizes are those of the values


def source(**settings):
    return SourceSettings(name="mine", **settings)


def values(given):
    return [row.value for row in read_records(given)]


def jsonl(texts, end=b"\n"):
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + end for text in texts)


LINE_FILES = {
    "plain": jsonl(TEXTS),
    "crlf": jsonl(TEXTS, b"\r\n"),
    "no last newline": jsonl(TEXTS)[:-1],
    "mark": b"\xef\xbb\xbf" + jsonl(TEXTS),
    "empty lines": b"\n\r\n" + jsonl(TEXTS[:20], b"\n\n") + b" \n\n\n" + jsonl(TEXTS[20:]) + b"\n\n",
    "broken": jsonl(TEXTS[:30]) + b'{"text": \n\n[1]\n' + jsonl(TEXTS[30:]),
    "one long line": jsonl(["x" * 5000, *TEXTS]),
}


def seen(given):
    return [(row.value, row.fault, row.number) for row in read_records(given)]


@pytest.mark.parametrize("kind", LINE_FILES)
@pytest.mark.parametrize("builder", ["json", "text"])
def test_lines_are_the_same_wherever_a_file_is_cut(tmp_path, shard_bytes, kind, builder):
    file = tmp_path / "a"
    file.write_bytes(LINE_FILES[kind])
    given = source(path=builder, data_files=str(file))
    whole = seen(given)
    assert len(whole) >= len(TEXTS)
    line = len(jsonl(TEXTS[:1]))
    for size in (1, 2, 7, line - 1, line, line + 1, 2 * line, 100, 1000, 5000):
        shard_bytes(size)
        shards = shards_of(given)
        assert seen(given) == whole, size
        assert [shard.number for shard in shards] == list(range(len(shards)))
        ends = [0, *(shard.part[1] for shard in shards if shard.part)]
        assert [shard.part[0] for shard in shards if shard.part] == ends[:-1]
        assert len(shards) > 1 or size >= 1000
        assert sum(shard.size for shard in shards) == file.stat().st_size


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_paragraphs_are_the_same_wherever_a_file_is_cut(tmp_path, shard_bytes, end):
    paragraphs = [[f"line {line} of {index}" for line in range(index % 4 + 1)] for index in range(12)]
    text = (end + " " + end + end).join(end.join(lines) for lines in paragraphs)
    (tmp_path / "a.txt").write_bytes(text.encode())
    given = source(path="text", data_files=str(tmp_path / "a.txt"), sample_by="paragraph")
    for size in range(1, 80):
        shard_bytes(size)
        assert len(shards_of(given)) > 3
        assert values(given) == ["\n".join(lines) for lines in paragraphs]


def test_a_cut_that_falls_on_a_line_end_stays_there(tmp_path, shard_bytes):
    (tmp_path / "a.txt").write_text("line\n" * 6)
    shard_bytes(10)
    given = source(path="text", data_files=str(tmp_path / "a.txt"))
    assert [shard.part for shard in shards_of(given)] == [(0, 10), (10, 20), (20, 30)]


@pytest.mark.parametrize("split", ["train", "train[40%:90%]"])
def test_the_number_of_a_row_finds_it(tmp_path, shard_bytes, split):
    file = tmp_path / "a.jsonl"
    file.write_bytes(LINE_FILES["empty lines"])
    lines = file.read_bytes().split(b"\n")
    given = source(path="json", data_files=str(file), split=split)
    for size in (200, 2**20):
        shard_bytes(size)
        for row in read_records(given):
            assert json.loads(lines[row.number - 1])["text"] == row.value and row.file == str(file)


@given(
    text=st.text(st.sampled_from("ab \n\r"), max_size=60),
    size=st.integers(1, 20),
    sample_by=st.sampled_from(["line", "paragraph"]),
)
def test_any_text_is_the_same_wherever_it_is_cut(tmp_path_factory, text, size, sample_by):
    if not text:
        return
    file = tmp_path_factory.mktemp("texts") / "a.txt"
    file.write_bytes(text.encode())
    given = source(path="text", data_files=str(file), sample_by=sample_by)
    whole, numbered = values(given), seen(given)
    lines = text.removesuffix("\n").split("\n")
    if sample_by == "line":
        assert whole == [line.rstrip("\r") for line in lines]
    else:
        assert [line for value in whole for line in value.split("\n")] == [
            line.rstrip("\r") for line in lines if line.strip()
        ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "SHARD_BYTES", size)
        assert seen(given) == numbered
        given.max_documents = 2
        assert seen(given) == numbered[:2]


def test_text_files_by_line_paragraph_and_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\r\n\r\n \r\nthree\r\n".encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"four\n\nfive"))
    given = {"path": "text", "data_files": str(tmp_path / "*.txt*")}
    assert values(source(**given)) == ["one", "two", "", " ", "three", "four", "", "five"]
    assert values(source(**given, sample_by="paragraph")) == ["one\ntwo", "three", "four", "five"]
    assert values(source(**given, sample_by="document")) == [
        "one\r\ntwo\r\n\r\n \r\nthree\r\n",
        "four\n\nfive",
    ]
    assert [row.number for row in read_records(source(**given, sample_by="paragraph"))] == [1, 5, 1, 3]


def test_tables_are_the_same_wherever_they_are_cut(tmp_path, shard_bytes):
    table = pyarrow.table({"text": TEXTS, "other": [b"%04d" % index * 250 for index in range(60)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7, **PLAIN)
    with pyarrow.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    with pyarrow.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    for name in ("a.parquet", "file.arrow", "stream.arrow"):
        given = source(path=name.rpartition(".")[2], data_files=str(tmp_path / name))
        shard_bytes(2**20)
        assert len(shards_of(given)) == 1 and values(given) == TEXTS
        shard_bytes(14000)
        shards = shards_of(given)
        assert [shard.part for shard in shards] == [(0, 14), (14, 28), (28, 42), (42, 56), (56, 60)]
        assert values(given) == TEXTS
        found = [row.number for shard in shards for row in read_shard(given, shard)]
        assert found == list(range(1, 61))  # of the file, not of the part
        for most in (1, 7, 21, 22, 60, 100):
            assert values(dataclasses.replace(given, max_documents=most)) == TEXTS[:most]
        assert values(dataclasses.replace(given, split="train[10:30]")) == TEXTS[10:30]


WRITERS = {
    "json": lambda texts, path: path.write_bytes(jsonl(texts, b"\n\n")),
    "csv": lambda texts, path: path.write_text("\n".join(["text", *texts]), encoding="utf-8"),
    "text": lambda texts, path: path.write_text("\n".join(texts), encoding="utf-8"),
    "parquet": lambda texts, path: pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), path, row_group_size=4
    ),
    "gz": lambda texts, path: path.write_bytes(gzip.compress(jsonl(texts))),
    "list": lambda texts, path: path.write_text(json.dumps([{"text": text} for text in texts])),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("size", [50, 2**26])
def test_the_first_records_and_parts_of_splits_go_over_files(tmp_path, shard_bytes, kind, size):
    for index in range(3):
        WRITERS[kind](TEXTS[20 * index : 20 * (index + 1)], tmp_path / f"{index}")
    builder = {"gz": "json", "list": "json"}.get(kind, kind)
    shard_bytes(size)
    files = {"train": [str(tmp_path / "0"), str(tmp_path / "1")], "test": str(tmp_path / "2")}
    given = source(path=builder, data_files=files)
    for most in (1, 19, 20, 21, 40, 41):
        assert values(dataclasses.replace(given, max_documents=most)) == TEXTS[: min(most, 40)]
    for split, expected in {
        "train+test": TEXTS,
        "train[:10%]": TEXTS[:4],
        "train[15:25]": TEXTS[15:25],
        "train[-5:]+test[:1]": [*TEXTS[35:40], TEXTS[40]],
    }.items():
        assert values(dataclasses.replace(given, split=split)) == expected
    some = dataclasses.replace(given, split="train[15:30]+test[5:]", max_documents=7)
    assert values(some) == TEXTS[15:22]
    both = dataclasses.replace(given, split="test+train", max_documents=30)
    assert values(both) == [*TEXTS[40:], *TEXTS[:10]]


def test_the_sources_own_validation_split_has_its_shards(tmp_path):
    for name, texts in {"a": TEXTS[:20], "held": TEXTS[20:30]}.items():
        (tmp_path / name).write_bytes(jsonl(texts))
    files = {"train": str(tmp_path / "a"), "held": str(tmp_path / "held")}
    given = source(path="json", data_files=files, validation_split="held", max_documents=5)
    assert values(given) == TEXTS[:5]
    shards = shards_of(given)
    assert [shard.split for shard in shards] == ["train", "validation"]
    assert [row.value for row in read_shard(given, shards[1])] == TEXTS[20:30]
    with pytest.raises(UserError, match=r"mine\.validation_split=dev: no such split; there are train, held"):
        shards_of(dataclasses.replace(given, validation_split="dev"))


def test_a_shard_travels_as_json(tmp_path):
    (tmp_path / "a").write_bytes(jsonl(TEXTS))
    (shard,) = shards_of(source(path="json", data_files=str(tmp_path / "a"), max_documents=3))
    back = Shard(**json.loads(json.dumps(dataclasses.asdict(shard))))
    assert [row.value for row in read_shard(source(), back)] == TEXTS[:3]


def test_what_a_shard_depends_on_is_its_identity(tmp_path, shard_bytes):
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl(TEXTS))
    given = source(path="json", data_files=str(file))

    def identities(given):
        return [shard_identity(given, shard) for shard in shards_of(given)]

    first = identities(given)
    moved = file.rename(tmp_path / "b.jsonl")
    same = [
        {"data_files": str(moved)},
        {"data_files": str(moved), "weight": 3.0, "max_tokens": 5},
        {"data_files": f"file://{moved}"},
    ]
    assert all(identities(dataclasses.replace(given, **change)) == first for change in same)
    given.data_files = str(moved)
    others = [
        {"type": "finetune", "columns": {"prompt": "text", "response": "text"}},
        {"text_column": "{text}!"},
        {"filter": [["text", "!=", "x"]]},
        {"max_documents": 3},
        {"split": "train[:5]"},
    ]
    found = [identities(dataclasses.replace(given, **change)) for change in others]
    shard_bytes(500)
    found.append(identities(given))
    moved.write_bytes(jsonl(TEXTS[:-1]))
    found.append(identities(given))
    every = [*first, *(identity for group in found for identity in group)]
    assert len(set(every)) == len(every) > 10
