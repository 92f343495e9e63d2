"""Records through `datasets.load_dataset`: builders, folders, streaming, and mistakes told in one line."""

import datasets
import pytest

from dynamic_transformers.data.sources import read_records
from dynamic_transformers.settings import SourceSettings, UserError

TEXTS = [f"document {index}" for index in range(20)]


@pytest.fixture
def folder(tmp_path, write_jsonl):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"text": text, "other": 1} for text in TEXTS])
    return folder


def read(**settings):
    return list(read_records(SourceSettings(name="mine", type="hub", **settings)))


def test_json_parquet_text_and_folder_give_the_same_records(folder, tmp_path):
    parquet, plain = tmp_path / "a.parquet", tmp_path / "a.txt"
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(str(parquet))
    plain.write_text("\n".join(TEXTS))
    assert read(path="json", data_files=str(folder / "train.jsonl")) == TEXTS
    assert read(path="parquet", data_files={"held": [str(parquet)]}, split="held") == TEXTS
    assert read(path="text", data_files=str(plain)) == TEXTS
    assert read(path=str(folder)) == TEXTS
    assert read(path=str(folder), split="train[5:8]") == TEXTS[5:8]


def test_max_documents_streams_the_first_ones(folder, monkeypatch):
    streamed = []
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *args, **kwargs: streamed.append(kwargs["streaming"]) or load(*args, **kwargs),
    )
    assert read(path=str(folder), max_documents=3) == TEXTS[:3]
    assert read(path=str(folder)) == TEXTS
    assert streamed == [True, False]


@pytest.mark.parametrize("max_documents", [None, 5])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": None}, "path is missing"),
        ({"path": "json"}, "data_files is missing"),
        ({"path": "json", "data_files": "{folder}/none.jsonl"}, "none.jsonl"),
        ({"path": "{folder}/none"}, "none"),
        ({"path": "nobody/nothing"}, "nobody/nothing"),
        ({"path": "{folder}", "split": "dev"}, "dev"),
        ({"path": "{folder}", "config": "big"}, "big"),
        ({"path": "{folder}", "text_column": "content"}, "there are text, other"),
        ({"path": "json", "data_files": "{folder}/broken.jsonl"}, "JSON parse error"),
    ],
)
def test_mistakes_are_told_in_one_line(folder, settings, words, max_documents):
    (folder.parent / "broken.jsonl").write_text('{"text": "good"}\n{"text": "cut o')
    filled = {
        key: value and value.format(folder=folder.parent if "broken" in value else folder)
        for key, value in settings.items()
    }
    with pytest.raises(UserError) as error:
        read(**filled, max_documents=max_documents)
    assert words in str(error.value)
    assert "data.dataset_configs.mine" in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_embedded_source_is_told():
    with pytest.raises(UserError, match="only prose, code, math"):
        list(read_records(SourceSettings(name="poems", type="embedded")))
