"""A run goes on with the data that it began with, whatever has become of their sources."""

import logging
import shutil

import pytest

from dynamic_transformers.cli import data_folder
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.settings import UserError
from dynamic_transformers.training.checkpoint import checkpoint_folder
from dynamic_transformers.training.trainer import train


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("".join(f"note number {n}: a gate selects {n * n} tokens of depth\n" for n in range(300)))
    return file


@pytest.fixture
def asked(make_settings, source, tmp_path):
    """Settings of a run on that file; keyword arguments go to `training`."""

    def make(name="mine", named=False, **training):
        sources = [{"name": "notes", "path": "text", "data_files": str(source)}]
        data = {"dataset_configs": sources, "output_dir": str(tmp_path / "named") if named else None}
        run = {"name": name, "output_dir": str(tmp_path / "out")}
        training = {"max_steps": 4, "checkpoint_every": 2, "keep_checkpoints": None} | training
        return make_settings(run=run, data=data, training=training)

    return make


def unfinished(settings):
    """The run after its second step."""
    train(settings, data_folder(settings), settings.run_dir)
    (settings.run_dir / "manifest.json").unlink()
    shutil.rmtree(checkpoint_folder(settings.run_dir, 4))


@pytest.mark.parametrize("named", [False, True])
def test_an_unfinished_run_finds_its_own_data(asked, source, caplog, named):
    settings = asked(named=named)
    first = data_folder(settings)
    made = read_manifest(first)
    unfinished(settings)
    source.write_text(source.read_text().replace("depth", "width"))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dynamic_transformers"):
        assert data_folder(settings) == first
    (line,) = caplog.messages
    assert "notes.txt has changed" in line and f"goes on with its own data, {first}" in line
    assert read_manifest(first) == made
    train(settings, first, settings.run_dir)
    assert read_manifest(settings.run_dir)["inputs"]["data"]["digest"] == made["digest"]


def test_a_run_that_begins_anew_takes_the_changed_sources(asked, source):
    settings = asked()
    first = data_folder(settings)
    unfinished(settings)
    source.write_text(source.read_text().replace("depth", "width"))
    checkpoint = str(checkpoint_folder(settings.run_dir, 2))
    assert data_folder(asked("other", resume=checkpoint)) == first
    for anew in (
        data_folder(settings, force=True),
        data_folder(asked(resume="none")),
        data_folder(asked("new")),
    ):
        assert anew != first


def test_a_run_whose_data_are_gone_is_refused(asked, source):
    settings = asked()
    first = data_folder(settings)
    unfinished(settings)
    source.write_text(source.read_text().replace("depth", "width"))
    shutil.rmtree(first)
    with pytest.raises(UserError, match="data_digest"):
        train(settings, data_folder(settings), settings.run_dir)
