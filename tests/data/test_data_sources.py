"""Records of every kind of source, broken rows, odd paths, and mistakes told in one line."""

import bz2
import csv
import gzip
import json
import lzma
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest

from dynamic_transformers.settings import SourceSettings, UserError
from tests.data.all_rows import read_records

TEXTS = [f'document {index}, "quoted", 東京 é' for index in range(20)]
LINES = "".join(json.dumps({"other": 1, "text": text}) + "\n" for text in TEXTS).encode()


def zstd(data):
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return buffer.getvalue().to_pybytes()


COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def table(texts=TEXTS):
    return pyarrow.table({"other": range(len(texts)), "text": texts})


def write_csv(path, delimiter):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([("other", "text"), *enumerate(TEXTS)])


def write_arrow(path, kind):
    with kind(path, table().schema) as writer:
        writer.write_table(table(), max_chunksize=3)


FORMATS = {
    "a.txt": ("text", lambda path: path.write_text("\n".join(TEXTS), encoding="utf-8")),
    "crlf.txt": ("text", lambda path: path.write_bytes("\r\n".join(TEXTS).encode("utf-8-sig"))),
    "a.json": ("json", lambda path: path.write_text(json.dumps([{"text": t} for t in TEXTS], indent=1))),
    "a.csv": ("csv", lambda path: write_csv(path, ",")),
    "a.tsv": ("csv", lambda path: write_csv(path, "\t")),
    "a.parquet": ("parquet", lambda path: pyarrow.parquet.write_table(table(), path, row_group_size=3)),
    "stream.arrow": ("arrow", lambda path: write_arrow(path, pyarrow.ipc.new_stream)),
    "file.arrow": ("arrow", lambda path: write_arrow(path, pyarrow.ipc.new_file)),
    **{
        f"a.jsonl{ending}": ("json", lambda path, compress=compress: path.write_bytes(compress(LINES)))
        for ending, compress in COMPRESSIONS.items()
    },
}


def rows(**settings):
    return list(read_records(SourceSettings(name="mine", **settings)))


def read(**settings):
    found = rows(**settings)
    assert [row.fault for row in found] == [None] * len(found)
    return [row.value for row in found]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "train.jsonl").write_bytes(LINES)
    (folder / "deep" / "test.jsonl").write_bytes(LINES[: LINES.index(b"\n") + 1])
    (folder / ".hidden.jsonl").write_text("no JSON")
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records(tmp_path, name):
    builder, write = FORMATS[name]
    write(tmp_path / name)
    assert read(path=builder, data_files=str(tmp_path / name)) == TEXTS
    assert read(path=builder, data_files={"held": [str(tmp_path / name)]}, split="held") == TEXTS
    assert read(path=builder, data_files=str(tmp_path / name), max_documents=3) == TEXTS[:3]
    assert read(path=str(tmp_path)) == TEXTS  # `datasets` finds out what the folder holds


def test_a_folder_and_parts_of_its_splits(folder):
    assert read(path=str(folder)) == TEXTS
    assert read(path=str(folder), split="test") == TEXTS[:1]
    assert read(path=str(folder), split="train[5:8]") == TEXTS[5:8]
    assert read(path=str(folder), split="train[:10%]+test") == [*TEXTS[:2], TEXTS[0]]
    assert read(path=str(folder), data_files="**/*.jsonl") == [TEXTS[0], *TEXTS]
    # The configurations of a data set's own card count.
    card = "---\nconfigs:\n- config_name: small\n  data_files: deep/*.jsonl\n---\n"
    (folder / "README.md").write_text(card)
    assert read(path=str(folder), config="small") == TEXTS[:1]


def test_files_of_a_folder_that_are_not_read_are_told_once(folder, caplog):
    (folder / "dataset_info.json").write_text("{}")
    (folder / "licence.md").write_text("free")
    (folder / "deep" / "more.csv").write_text("text\nmore\n")
    (folder / "notes.txt").write_text("a note")
    assert read(path=str(folder)) == read(path=str(folder)) == TEXTS
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.endswith("corpus: read as json; other files are not: deep/more.csv, licence.md, notes.txt")


def test_files_that_no_name_gives_to_a_split_are_not_left_out_in_silence(folder):
    (folder / "more.jsonl").write_bytes(LINES)
    with pytest.raises(UserError) as error:
        read(path=str(folder))
    assert str(error.value).endswith(
        f"path={folder}: names make splits of some of its files (train: train.jsonl; test: deep/test.jsonl) "
        "and leave out more.jsonl; name those that are meant with data_files"
    )
    card = "---\nconfigs:\n- config_name: a\n  data_files: more.jsonl\n---\n"
    (folder / "README.md").write_text(card)
    assert read(path=str(folder)) == TEXTS


def test_notes_beside_a_text_file_do_not_decide_how_it_is_read(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("one line\n")
    for number in range(5):
        (tmp_path / f"{number}.md").write_text("a note\n")
    assert read(path=str(tmp_path)) == ["one line"]
    (told,) = caplog.messages
    assert told.endswith(": read as text; other files are not: 0.md, 1.md, 2.md and 2 more")


def test_folders_behind_links_are_read(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "corpus").symlink_to(folder)
    assert read(path=str(linked)) == TEXTS


@pytest.mark.parametrize("max_documents", [None, 5])
def test_what_we_do_not_read_goes_to_the_library(folder, max_documents):
    url = f"file://{folder}/train.jsonl"
    assert read(path="json", data_files=url, max_documents=max_documents) == TEXTS[:max_documents]


@pytest.mark.parametrize(
    "name", ["exp[1]", "a::b", "50%25", "a b", "ümläut é", "{x}", "~home", "a*b?c", "#1"]
)
def test_any_path_is_a_path(tmp_path, monkeypatch, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / f"{name}.jsonl").write_bytes(LINES)
    monkeypatch.chdir(tmp_path)
    for written in (folder / f"{name}.jsonl", folder / "*.jsonl", Path(name) / "*.jsonl"):
        assert read(path="json", data_files=str(written)) == TEXTS
    assert read(path=str(folder)) == TEXTS
    assert read(path=f"./{name}", data_files="*.jsonl") == TEXTS


@pytest.mark.parametrize(
    "source",
    [
        {"path": "~/corpus"},
        {"path": "json", "data_files": "~/corpus/t*.jsonl"},
        {"path": "json", "data_files": {"train": ["~/corpus/t*.jsonl"]}},
    ],
)
def test_a_tilde_is_the_home(folder, monkeypatch, make_settings, source):
    monkeypatch.setenv("HOME", str(folder.parent))
    (given,) = make_settings([{"name": "a", **source}]).data.dataset_configs
    assert [row.value for row in read_records(given)] == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "number", "fault"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "cut o', 2, "broken JSON (Unterminated string"),
        ("a.jsonl", b'{"text": "a"}\n\n[1, 2]\n{"text": "b"}\n', 3, "list instead of an object"),
        ("a.jsonl", b'[1, 2]\n{"text": "a"}\n', 1, "list instead of an object"),
        ("a.jsonl", b'[cut off\n{"text": "a"}\n', 1, "broken JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"other": "b"}\n', 2, "no 'text'"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100000 + b"\n", 2, "broken JSON"),
        ("a.jsonl", b'{"text": "a"}\n' + b"\0" * 500, 2, "broken JSON"),
        ("a.csv", b"other,text\n1,a\n2\n3,b\n", 3, "1 columns instead of 2"),
        ("a.csv", b"other,text\n1,a\n2,3,b\n", 3, "3 columns instead of 2"),
    ],
)
def test_a_row_that_cannot_be_read_is_one_row(tmp_path, name, content, number, fault):
    file = tmp_path / name
    file.write_bytes(content)
    found = rows(path=file.suffix.strip(".").replace("jsonl", "json"), data_files=str(file))
    (broken,) = [row for row in found if row.fault]
    assert (broken.file, broken.number) == (str(file), number) and broken.fault.startswith(fault)
    assert {row.value for row in found if not row.fault} <= {"a", "b"}
    assert len(found) > 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.parquet"])
def test_bytes_that_are_no_utf8_are_one_row(tmp_path, name):
    file = tmp_path / name
    texts = [b"a", b"caf\xe9 \xff", b"b"]
    if name == "a.jsonl":
        file.write_bytes(b"".join(b'{"text": "%s"}\n' % text for text in texts))
    elif name == "a.txt":
        file.write_bytes(b"\n".join(texts))
    elif name == "a.csv":
        file.write_bytes(b"text\n" + b"\n".join(texts))
    else:
        wrong = pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())
        pyarrow.parquet.write_table(pyarrow.table({"text": wrong}), file)
    found = [row.value for row in rows(path=FORMATS[name][0], data_files=str(file))]
    assert found[::2] == ["a", "b"]
    with pytest.raises(UnicodeEncodeError):
        found[1].encode()


def test_max_documents_reads_no_further(tmp_path):
    texts = [str(random.random()) * 50 for _ in range(2000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-2000])
    source = {"path": "json", "data_files": str(tmp_path / "cut.jsonl.gz")}
    assert read(**source, max_documents=150) == texts[:150]
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz is cut off or damaged after row 1\d\d\d: "):
        rows(**source)


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "a.parquet", "file.arrow"]
)
@pytest.mark.parametrize("fault", ["cut", "overwritten", "empty"])
def test_a_damaged_file_is_named(tmp_path, name, fault):
    file = tmp_path / name
    builder, write = FORMATS[name]
    write(file)
    data = file.read_bytes()
    half = len(data) // 2
    file.write_bytes(
        {"cut": data[:half], "overwritten": data[: half // 2] + bytes(half), "empty": b""}[fault]
    )
    with pytest.raises(UserError, match=r"a\.|file\.") as error:
        rows(path=builder, data_files=str(tmp_path / f"*{''.join(file.suffixes)}"))
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert ("is empty (0 bytes)" if fault == "empty" else "is cut off or damaged") in str(error.value)


CUT_WHILE_READ = """
import os, sys
from dynamic_transformers.data.sources import read_shard, shards_of
from dynamic_transformers.settings import SourceSettings, UserError

source = SourceSettings(name="mine", path="arrow", data_files=sys.argv[1])
(shard,) = shards_of(source)
rows = read_shard(source, shard)
next(rows)
os.truncate(sys.argv[1], 5000)
try:
    list(rows)
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
@pytest.mark.parametrize("batch_rows", [100, 2000])
def test_an_arrow_file_that_is_cut_while_it_is_read_is_told(tmp_path, kind, batch_rows):
    file = tmp_path / "a.arrow"
    content = table(TEXTS * 100)
    with kind(file, content.schema) as writer:
        writer.write_table(content, max_chunksize=batch_rows)
    size, read = file.stat().st_size, min(batch_rows, 256)
    # In a process of its own: it dies of SIGBUS where what is not there is looked at.
    program = [sys.executable, "-c", CUT_WHILE_READ, str(file)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"data.dataset_configs.mine: {file} is cut off or damaged after row {read}: "
        f"5000 of its {size} bytes are left since it was opened\n"
    )


@pytest.mark.parametrize("max_documents", [None, 5])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": None}, "path is missing"),
        ({"path": "json"}, "data_files is missing"),
        ({"path": "json", "data_files": []}, "data_files is missing"),
        ({"path": "json", "data_files": 5}, "data_files=5: must be a pattern"),
        ({"path": "json", "data_files": {"train": [1]}}, "must be a pattern"),
        ({"path": "json", "data_files": "{folder}/none.jsonl"}, "no file matches '{folder}/none.jsonl'"),
        (
            {"path": "json", "data_files": ["{folder}/*.jsonl", "{folder}/z*"]},
            "no file matches '{folder}/z*'",
        ),
        ({"path": "json", "data_files": "{folder}"}, "name its files, as in {folder}/*"),
        ({"path": "{folder}/none"}, "none: no such file or folder"),
        ({"path": "./nothing"}, "nothing: no such file or folder"),
        ({"path": "hos/good.jsonl"}, "hos/good.jsonl: no such file or folder"),
        ({"path": "{folder}/train.jsonl"}, "is a file; give path: json, data_files: {folder}/train.jsonl"),
        ({"path": "{folder}/a.csv.gz"}, "is a file; give path: csv, data_files: {folder}/a.csv.gz"),
        ({"path": "{folder}/deep"}, "there are test"),
        (
            {"path": "{folder}", "data_files": "*"},
            "{folder}/a.csv.gz is csv and {folder}/train.jsonl is json: name files of one format",
        ),
        (
            {"path": "{folder}", "data_files": {"train": "*.jsonl", "held": "*.csv.gz"}},
            "{folder}/train.jsonl is json and {folder}/a.csv.gz is csv",
        ),
        ({"path": "{folder}/empty"}, "{folder}/empty doesn't contain any data files"),
        (
            {"path": "{folder}/notes"},
            ".tsv, .txt, .xml; others are read as text with path: text, data_files: {folder}/notes/**/*",
        ),
        (
            {"path": "{folder}/notes", "data_files": "*.md"},
            "others are read as text with path: text, data_files: {folder}/notes/a.md",
        ),
        ({"path": "json", "data_files": "{folder}/train.jsonl", "sample_by": "document"}, "only text files"),
        ({"path": "{folder}", "sample_by": "paragraph"}, "only text files"),
        (
            {"path": "json", "data_files": "{folder}/notes/chat"},
            "there are messages; conversations are read with type: finetune",
        ),
        ({"path": "nobody/nothing"}, "nobody/nothing"),
        ({"path": "{folder}", "split": "dev"}, "split=dev: no such split; there are train, test"),
        ({"path": "{folder}", "split": "train[:"}, "split=train[:"),
        ({"path": "{folder}", "config": "big"}, "big"),
        ({"path": "{folder}", "text_column": "content"}, "in {folder}/train.jsonl; there are other, text"),
        ({"path": "text", "data_files": "{folder}/train.jsonl", "text_column": "x"}, "there are text"),
        ({"path": "csv", "data_files": "{folder}/a.csv.gz", "text_column": "x"}, "there are a, b"),
        ({"path": "json", "data_files": "file://{folder}/none.jsonl"}, "none.jsonl"),
        ({"path": "json", "data_files": "file://{folder}/train.jsonl", "text_column": "x"}, "there are"),
    ],
)
def test_mistakes_are_told_in_one_line(folder, settings, words, max_documents):
    (folder / "empty").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "a.md").write_text("a note")
    (folder / "notes" / "chat").write_text('{"messages": []}')
    (folder / "a.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n"))

    def filled(value):
        if isinstance(value, list):
            return [filled(entry) for entry in value]
        if isinstance(value, dict):
            return {split: filled(entry) for split, entry in value.items()}
        return value.replace("{folder}", str(folder)) if isinstance(value, str) else value

    given = {"max_documents": max_documents} | {key: filled(value) for key, value in settings.items()}
    with pytest.raises(UserError) as error:
        rows(**given)
    assert filled(words) in str(error.value)
    assert "data.dataset_configs.mine" in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_embedded_source_is_told():
    with pytest.raises(UserError, match="only the names prose, code, math"):
        list(read_records(SourceSettings(name="poems", path="embedded")))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_text_that_is_no_utf8_as_a_whole_is_told(tmp_path, name, encoding, compress):
    mark = "\ufeff" if encoding.endswith("be") else ""
    (tmp_path / name).write_bytes(compress((mark + "text\nsome\n" * 20).encode(encoding)))
    builder = {".txt": "text", ".jsonl": "json", ".csv": "csv"}[Path(name).suffix]
    with pytest.raises(UserError, match=rf"{name}: is text in UTF-16 or UTF-32: save it as UTF-8$"):
        read(path=builder, data_files=str(tmp_path / name))


def test_zstandard_with_frames_to_be_skipped(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x53\x2a\x4d\x18\x04\x00\x00\x00abcd" + zstd(LINES))
    assert read(path="json", data_files=str(tmp_path / "a.jsonl.zst")) == TEXTS


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        (["score", "==", 5], [5]),
        (["score", "!=", 5], [0, *range(6, 30)]),
        (["score", ">=", 9.5], range(10, 30)),
        (["score", "<", 10], [0, *range(5, 10)]),
        (["score", "in", [5, 7, 100]], [5, 7]),
        (["score", "not in", [5]], [0, *range(6, 30)]),
        (["odd", "==", True], [*range(5, 30, 2)]),
    ],
)
def test_a_filter_by_a_number_does_the_same_in_every_format(tmp_path, condition, kept):
    scores = [0, *range(5, 30)]
    records = [{"text": f"text {n}", "score": n, "odd": n % 2 == 1} for n in scores]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = [",".join(map(str, record.values())) + "\n" for record in records]
    (tmp_path / "a.csv").write_text("".join(["text,score,odd\n", *lines]))
    expected = [f"text {number}" for number in kept]
    for builder, name in (("json", "a.jsonl"), ("csv", "a.csv")):
        given = SourceSettings(name="mine", path=builder, data_files=str(tmp_path / name), filter=[condition])
        assert [row.value for row in read_records(given) if not row.dropped] == expected
