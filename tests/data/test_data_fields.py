"""Texts and conversations of the columns of a record, filters, and datatrove's token ids."""

import json

import pyarrow
import pytest

from dynamic_transformers.configure import settings_from_dict
from dynamic_transformers.data.fields import Conversation
from dynamic_transformers.data.sources import shards_of
from dynamic_transformers.settings import SourceSettings, UserError
from tests.data.all_rows import read_records

RECORDS = [
    {"title": "T1", "meta": {"text": "one", "lang": "en", "score": 0.25}, "a.b": "flat", "n": 3},
    {"title": "T2", "meta": {"text": "two", "lang": "de", "score": 0.75}, "a.b": "flat", "n": 4},
    {"title": None, "meta": None, "a.b": "flat", "n": None},
]


@pytest.fixture(params=["json", "parquet"])
def source(request, tmp_path):
    """Settings of a source that holds `records`."""

    def make(records=RECORDS, **settings):
        file = tmp_path / f"a.{request.param}"
        if request.param == "json":
            file.write_text("\n".join(map(json.dumps, records)))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
        return SourceSettings(name="mine", path=request.param, data_files=str(file), **settings)

    return make


def found(given):
    return [row.fault or ("dropped" if row.dropped else row.value) for row in read_records(given)]


@pytest.mark.parametrize(
    ("text_column", "expected"),
    [
        ("title", ["T1", "T2", "NoneType instead of str"]),
        ("meta.text", ["one", "two", "NoneType instead of str"]),
        ("a.b", ["flat"] * 3),
        ("{title}\n\n{meta.text}", ["T1\n\none", "T2\n\ntwo", "title: NoneType instead of str"]),
        ("{n}: {{{a.b}}}", ["3: {flat}", "4: {flat}", "n: NoneType instead of str"]),
        ("{n}", ["3", "4", "n: NoneType instead of str"]),
        ("n", ["int instead of str", "int instead of str", "NoneType instead of str"]),
    ],
)
def test_a_text_is_a_column_nested_or_a_template(source, text_column, expected):
    given = source(text_column=text_column)
    # A column with a null among whole numbers is one of floats to some writers, not to this one.
    assert found(given) == expected


def test_a_column_of_exactly_that_name_wins(source):
    assert found(source([{"{x}": "own", "x": "other"}], text_column="{x}")) == ["own"]
    assert found(source([{"a.b": "own", "a": {"b": "nested"}}], text_column="a.b")) == ["own"]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (["meta.lang", "==", "en"], ["one", "dropped", "dropped"]),
        (["meta.lang", "!=", "en"], ["dropped", "two", "dropped"]),
        (["meta.score", ">=", "0.75"], ["dropped", "two", "dropped"]),
        (["meta.score", "<", 0.75], ["one", "dropped", "dropped"]),
        (["n", "in", ["3", "5"]], ["one", "dropped", "dropped"]),
        (["n", "not in", [3, 5]], ["dropped", "two", "dropped"]),
        (["title", ">", "T1"], ["dropped", "two", "dropped"]),
        (["n", "<", "many"], ["filter: cannot tell whether n (int) < many"] * 2 + ["dropped"]),
    ],
)
def test_a_filter_drops_rows_and_null_holds_nothing(source, condition, expected):
    assert found(source(text_column="meta.text", filter=[condition])) == expected


def test_all_conditions_must_hold(source):
    both = [["meta.lang", "in", ["en", "de"]], ["n", ">", "3"]]
    assert found(source(text_column="meta.text", filter=both)) == ["dropped", "two", "dropped"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"text_column": "body"}, "text_column=body: no such column in"),
        ({"text_column": "meta.body"}, "there are title, meta, meta.text, meta.lang, meta.score, a.b, n"),
        ({"text_column": "{title} {body}"}, "text_column={title} {body}: no 'body' in"),
        (
            {"text_column": "title", "filter": [["language", "==", "en"]]},
            "filter=['language', '==', 'en']: no such",
        ),
        ({"type": "finetune"}, "columns: no conversation by the usual names"),
        ({"type": "finetune", "columns": {"messages": "chat"}}, "columns.messages=chat: no such column"),
    ],
)
def test_a_column_that_is_not_there_is_told_before_reading(source, settings, words):
    with pytest.raises(UserError) as error:
        shards_of(source(**settings))
    assert words in str(error.value) and "there are title" in str(error.value)
    assert str(error.value).startswith("data.dataset_configs.mine.") and "\n" not in str(error.value)


CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    ("record", "columns", "expected"),
    [
        ({"messages": CHAT, "prompt": "x"}, {}, CHAT),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, {}, CHAT),
        (
            {"conversations": [{"from": "system", "value": "S"}, *CHAT]},
            {},
            [{"role": "system", "content": "S"}, *CHAT],
        ),
        ({"prompt": "Q", "completion": "A"}, {}, CHAT),
        ({"question": "Q", "answer": "A", "source": "x"}, {}, CHAT),
        ({"query": "Q", "output": "A", "system_prompt": ""}, {}, CHAT),
        (
            {"system": "S", "question": "Q", "response": "A"},
            {},
            [{"role": "system", "content": "S"}, *CHAT],
        ),
        ({"instruction": "Q", "input": "", "output": "A"}, {}, CHAT),
        (
            {"instruction": "Q", "input": "more", "output": "A"},
            {},
            [{"role": "user", "content": "Q\n\nmore"}, CHAT[1]],
        ),
        ({"a": {"q": "Q"}, "b": "A", "prompt": "x"}, {"prompt": "a.q", "response": "b"}, CHAT),
        ({"chat": CHAT, "messages": []}, {"messages": "chat"}, CHAT),
    ],
)
def test_conversations_are_found_by_the_usual_names_or_by_those_given(source, record, columns, expected):
    assert found(source([record], type="finetune", columns=columns)) == [expected]


def test_messages_that_are_read_as_text_are_told_how_they_are_read(source):
    given = source([{"chat": CHAT}], text_column="chat")
    assert found(given) == ["list instead of str; conversations are read with type: finetune"]


def test_of_a_message_only_what_templates_read_is_kept():
    """Two conversations that differ in their times alone are one."""
    chat = [{**message, "timestamp": 5, "hashed_ip": "x"} for message in CHAT]
    assert Conversation({"messages": "m"})({"m": chat}) == CHAT


def test_calls_of_tools_are_kept():
    tool = {"role": "tool", "name": "sum", "content": "4"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    chat = [{"role": "user", "content": "2+2?", "name": None}, call, tool, CHAT[1]]
    assert Conversation({"messages": "m"})({"m": chat}) == [{"role": "user", "content": "2+2?"}, *chat[1:]]


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"messages": None}, "NoneType instead of list of messages"),
        ({"messages": []}, "no turn of the assistant"),
        ({"messages": CHAT[:1]}, "no turn of the assistant"),
        (
            {"messages": [{"role": "narrator", "content": "x"}]},
            "message 1: role 'narrator'; known are system",
        ),
        ({"messages": [*CHAT, {"role": "user", "content": None}]}, "message 3: content: NoneType instead of"),
        ({"messages": [*CHAT, {"role": "user", "content": "\ud800"}]}, "message 3: content: no valid UTF-8"),
        ({"messages": [*CHAT, {"content": "x"}]}, "message 3: role None"),
        ({"messages": ["x"]}, "message 1: str instead of an object"),
        ({"messages": "x"}, "str instead of list of messages"),
        ({"prompt": "Q", "response": None}, "response: NoneType instead of str"),
        ({"instruction": "Q", "input": 5, "output": "A"}, "input: int instead of str"),
    ],
)
def test_a_broken_conversation_is_a_fault(tmp_path, record, fault):
    file = tmp_path / "a.jsonl"
    sound = dict.fromkeys(record, "") if "messages" not in record else {"messages": CHAT}
    file.write_text(json.dumps(sound) + "\n" + json.dumps(record))
    given = SourceSettings(name="mine", path="json", data_files=str(file), type="finetune")
    sound, broken = read_records(given)
    assert sound.value and broken.fault.startswith(fault) and broken.number == 2


def test_only_the_columns_that_are_needed_are_read(tmp_path, monkeypatch):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), file)
    asked = []
    iter_batches = pyarrow.parquet.ParquetFile.iter_batches

    def noted(self, *args, columns, **options):
        asked.append(columns)
        return iter_batches(self, *args, columns=columns, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", noted)
    condition = ["n", "<=", 4]
    given = SourceSettings(
        name="mine", path="parquet", data_files=str(file), text_column="meta.text", filter=[condition]
    )
    assert found(given) == ["one", "two", "dropped"]
    assert asked == [["n", "meta.text"]]


def test_nested_text_that_is_no_utf8_is_one_row(tmp_path):
    texts = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"meta": pyarrow.StructArray.from_arrays([texts], ["text"])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    given = SourceSettings(
        name="mine", path="parquet", data_files=str(tmp_path / "a.parquet"), text_column="meta.text"
    )
    one, two, three = found(given)
    assert (one, three) == ("a", "c") and two.startswith("no valid UTF-8")


# What the original project and its users write, and what comes of it.
@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ([{"dataset_name": "team/web", "dataset_config": "small", "text_column": "x"}], ["web-small"]),
        ([{"path": "team/web"}, {"dataset_name": "other/web"}, {"path": "web"}], ["web", "web-2", "web-3"]),
        ([{"path": "./my corpus/é.v1/"}], ["v1"]),
        ([{"path": "team/web", "name": "mine"}, {"path": "team/mine"}], ["mine", "mine-2"]),
        ([{"path": "embedded", "name": "math"}, {"type": "pretrain", "path": "math"}], ["math", "math-2"]),
        ([{"type": "finetune", "dataset_name": "a/b", "train_subset_ratio": 0.5}], ["b"]),
    ],
)
def test_the_originals_list_is_taken_and_names_are_made(entries, names):
    made = settings_from_dict({"training": {"max_steps": 1}, "data": {"dataset_configs": entries}})
    sources = made.data.dataset_configs
    assert [source.name for source in sources] == names
    assert [source.path for source in sources] == [
        entry.get("path", entry.get("dataset_name")) for entry in entries
    ]
    again = settings_from_dict(made.to_dict())
    assert again.data.dataset_configs == sources


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"path": "a/b", "dataset_name": "c/d"}, "dataset_name: is data.dataset_configs[0].path by another"),
        (
            {"dataset_nam": "c/d"},
            "dataset_nam: no such key; did you mean data.dataset_configs[0].dataset_name?",
        ),
        ({"unknown": 1}, "data.dataset_configs[0].unknown: no such key; there are name, type"),
        ({}, "data.dataset_configs[0]: give a path"),
        ({"path": "embedded"}, "data.dataset_configs[0]: give a path; with path=embedded a name too"),
        ({"path": "a/b", "type": "hub"}, "type=hub: must be one of pretrain, finetune"),
        ({"path": "a/b", "text_column": "{title"}, "text_column={title: must be the name of a column, or"),
        ({"path": "a/b", "text_column": "{}"}, "must be the name of a column, or"),
        ({"path": "a/b", "text_column": "{a!r}"}, "must be the name of a column, or"),
        ({"path": "a/b", "filter": [["n", "=", 1]]}, "no operator '='; there are ==, !=, <, <=, >, >=, in"),
        ({"path": "a/b", "filter": [["n", ">"]]}, "filter[0]=['n', '>']: must be [column, operator, value]"),
        ({"path": "a/b", "filter": [["n", "in", "x"]]}, "'in' needs a list of values"),
        ({"path": "a/b", "filter": [["n", "==", None]]}, "'==' needs one value"),
        ({"path": "a/b", "columns": {"prompt": "x"}}, "columns={'prompt': 'x'}: a source of type=pretrain"),
        (
            {"path": "a/b", "type": "finetune", "columns": {"prompt": "x"}},
            "give the column of each of messages |",
        ),
        (
            {"path": "a/b", "type": "finetune", "text_column": "x"},
            "text_column=x: a source of type=finetune has",
        ),
        ({"path": "datatrove", "type": "finetune"}, "has no conversations"),
        ({"path": "datatrove", "filter": [["n", "==", 1]]}, "a source of path=datatrove has none"),
        (
            {"name": "math", "path": "embedded", "split": "train", "config": "x"},
            "config=x: a source of path=emb",
        ),
        ({"path": "a/b", "sample_by": "word"}, "sample_by=word: must be one of line, paragraph, document"),
    ],
)
def test_an_entry_that_cannot_be_meant_is_refused(entry, words):
    with pytest.raises(UserError) as error:
        settings_from_dict({"training": {"max_steps": 1}, "data": {"dataset_configs": [entry]}})
    assert words in str(error.value) and "\n" not in str(error.value)
