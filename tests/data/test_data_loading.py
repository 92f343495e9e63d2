"""Data folders that were damaged after they were finished."""

import shutil
from pathlib import Path

import pytest

from dynamic_transformers.data.loading import load_split, load_tokenizer, verify_split
from dynamic_transformers.data.prepare import default_data_dir, prepare
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.settings import UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_settings, make_texts, write_jsonl):
    folder = tmp_path_factory.mktemp("loading")
    file = write_jsonl(folder / "a.jsonl", [{"text": text} for text in make_texts(300)])
    return prepare(make_settings([{"name": "a", "path": "json", "data_files": file}]), folder / "data")


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "data")


@pytest.mark.parametrize("name", ["exp[1]", "a::b", "50%25", "a b", "ümläut é", "./~home", "{x}*?", "#1"])
def test_a_data_folder_lies_anywhere(tmp_path, monkeypatch, make_settings, make_texts, write_jsonl, name):
    monkeypatch.chdir(tmp_path)
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in make_texts(300)])
    settings = make_settings(
        [{"name": "a", "path": "json", "data_files": file}], output_dir=name, max_tokens=3000
    )
    folder = prepare(settings, default_data_dir(settings))
    assert folder == Path(name)
    for place in (folder, tmp_path / folder):
        verify_split(place, "train")
        assert len(load_split(place, "train")) == read_manifest(place)["splits"]["train"]["blocks"]
        assert load_split(place, "test").input_ids(0).shape == (32,)
        assert len(load_tokenizer(place)) == read_manifest(place)["vocab_size"]
    assert prepare(settings, default_data_dir(settings)) == folder


def overwrite(folder):
    file = folder / "tokens.bin"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(bytes(400))


def truncate(folder):
    file = folder / "tokens.bin"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


def remove_the_file(folder):
    (folder / "ends.bin").unlink()


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("damage", [overwrite, truncate, remove_the_file, shutil.rmtree])
def test_a_damaged_split_is_noticed(folder, damage, split):
    verify_split(folder, split)
    damage(folder / split)
    with pytest.raises(UserError, match=r"damaged: .*; prepare the data again with --force$") as error:
        verify_split(folder, split)
    assert str(folder / split) in str(error.value) and "\n" not in str(error.value)
    verify_split(folder, "test")


@pytest.mark.parametrize("damage", [truncate, remove_the_file, shutil.rmtree])
def test_a_split_that_cannot_be_read_is_told_in_one_line(folder, damage):
    assert len(load_split(folder, "validation"))
    damage(folder / "validation")
    with pytest.raises(
        UserError, match=r"validation.*: damaged: .*; prepare the data again with --force$"
    ) as error:
        load_split(folder, "validation")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["changed", "removed"])
def test_a_tokenizer_that_is_not_the_one_of_the_data_is_refused(folder, damage):
    load_tokenizer(folder)
    file = folder / "tokenizer" / "tokenizer.json"
    if damage == "changed":
        file.write_bytes(file.read_bytes().replace(b"<|endoftext|>", b"<|endofdocs|>"))
    else:
        file.unlink()
    with pytest.raises(
        UserError, match=r"tokenizer\.json: damaged: .*; prepare the data again with --force$"
    ):
        load_tokenizer(folder)
