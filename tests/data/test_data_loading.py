"""Data folders that were damaged after they were finished."""

import shutil

import pytest

from dynamic_transformers.data.loading import load_split, verify_split
from dynamic_transformers.data.prepare import prepare
from dynamic_transformers.settings import UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_settings, make_texts, write_jsonl):
    folder = tmp_path_factory.mktemp("loading")
    file = write_jsonl(folder / "a.jsonl", [{"text": text} for text in make_texts(300)])
    return prepare(make_settings([{"name": "a", "path": "json", "data_files": file}]), folder / "data")


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "data")


def overwrite(folder):
    (file,) = folder.glob("*.arrow")
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(bytes(400))


def truncate(folder):
    (file,) = folder.glob("*.arrow")
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


def remove_the_file(folder):
    next(folder.glob("*.arrow")).unlink()


def empty_the_state(folder):
    (folder / "state.json").write_text("")


def no_state(folder):
    (folder / "state.json").write_text("{}")


def cut_the_information(folder):
    (folder / "dataset_info.json").write_text('{"features": {"input')


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("damage", [overwrite, truncate, remove_the_file, shutil.rmtree])
def test_a_damaged_split_is_noticed(folder, damage, split):
    verify_split(folder, split)
    damage(folder / split)
    with pytest.raises(UserError, match=r"damaged: .*; prepare the data again with --force$") as error:
        verify_split(folder, split)
    assert str(folder / split) in str(error.value) and "\n" not in str(error.value)
    verify_split(folder, "test")


@pytest.mark.parametrize(
    "damage",
    [truncate, remove_the_file, shutil.rmtree, empty_the_state, no_state, cut_the_information],
)
def test_a_split_that_cannot_be_read_is_told_in_one_line(folder, damage):
    assert len(load_split(folder, "validation"))
    damage(folder / "validation")
    with pytest.raises(
        UserError, match=r"validation: damaged: .*; prepare the data again with --force$"
    ) as error:
        load_split(folder, "validation")
    assert "\n" not in str(error.value)
