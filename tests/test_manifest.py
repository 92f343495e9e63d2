"""Folders are finished, whole and ours, or not touched."""

import json
from pathlib import Path

import pytest

from dynamic_transformers.manifest import (
    MANIFEST,
    digest,
    finished,
    fresh_folder,
    input_folder,
    read_manifest,
    write_json,
    write_manifest,
)
from dynamic_transformers.settings import UserError


def test_digest_ignores_key_order_and_sees_values():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_a_failing_body_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "out"
    with fresh_folder(folder, "train") as temporary:
        (temporary / "x").write_text("old")
        write_manifest(temporary, "train", {}, {})
    with pytest.raises(RuntimeError), fresh_folder(folder, "train") as temporary:
        (temporary / "x").write_text("new")
        raise RuntimeError
    assert (folder / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_foreign_folders_are_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="something else"), fresh_folder(tmp_path, "train"):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_manifest_names_inputs_by_digest(tmp_path):
    for name in ("data", "run"):
        (tmp_path / name).mkdir()
    data = write_manifest(tmp_path / "data", "prepare_data", {"x": 1}, {})
    run = write_manifest(tmp_path / "run", "train", {"y": 2}, {"data": tmp_path / "data"}, seed=3)
    assert run["inputs"]["data"]["digest"] == data["digest"]
    assert run["seed"] == 3 and run["packages"]["torch"]
    assert finished(tmp_path / "run", "train", {"y": 2})
    assert not finished(tmp_path / "run", "train", {"y": 3})
    assert not finished(tmp_path / "run", "export", {"y": 2})


def test_manifest_names_the_revision_of_the_image_or_else_of_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr("dynamic_transformers.manifest.source_revision", lambda: "c0ffee-dirty-1")
    monkeypatch.delenv("DYNAMIC_TRANSFORMERS_REVISION", raising=False)
    assert write_manifest(tmp_path, "train", {}, {})["git_revision"] == "c0ffee-dirty-1"
    monkeypatch.setenv("DYNAMIC_TRANSFORMERS_REVISION", "of the image")
    assert write_manifest(tmp_path, "train", {}, {})["git_revision"] == "of the image"


def test_folders_without_a_manifest_are_unfinished(tmp_path):
    with pytest.raises(UserError, match="unfinished"):
        read_manifest(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read_manifest(tmp_path / "nowhere")


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / MANIFEST
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == [MANIFEST]


@pytest.fixture
def outputs(tmp_path):
    """`outputs` with data, and a run made from it."""
    outputs = tmp_path / "outputs"
    for name in ("data", "run"):
        (outputs / name).mkdir(parents=True)
    write_manifest(outputs / "data", "prepare_data", {"x": 1}, {})
    return outputs


@pytest.mark.parametrize("named", ["absolute", "relative"])
@pytest.mark.parametrize("move", ["nothing", "all", "run alone", "link"])
def test_an_input_is_found_from_anywhere_and_after_a_move(outputs, tmp_path, monkeypatch, named, move):
    monkeypatch.chdir(tmp_path)
    write_manifest(outputs / "run", "train", {}, {"data": {
        "absolute": outputs / "data", "relative": Path("outputs/data")
    }[named]})  # fmt: skip
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = outputs / "run"
    if move == "all":
        run = outputs.rename(tmp_path / "elsewhere/kept") / "run"
    elif move == "run alone":
        run = run.rename(tmp_path / "elsewhere/run")
    elif move == "link":
        run = tmp_path / "elsewhere/link"
        run.symlink_to(outputs / "run")
    assert read_manifest(input_folder(run, "data"))["config"] == {"x": 1}


def test_an_input_that_is_gone_or_another_is_told(outputs):
    write_manifest(outputs / "run", "train", {}, {"data": outputs / "data"})
    write_manifest(outputs / "data", "prepare_data", {"x": 2}, {})
    with pytest.raises(UserError, match=r"run: its data, .*/outputs/data, is not what it was"):
        input_folder(outputs / "run", "data")
    (outputs / "data").rename(outputs / "other")
    with pytest.raises(UserError, match=r"run: its data, .*/outputs/data, is not there any more"):
        input_folder(outputs / "run", "data")
