"""Checkpoints: when they are written, which stay, and what a damaged one costs."""

import shutil

import pytest
import torch
from run_contents import STEPS, assert_equal_ends, cut, empty, flip, remove, snapshot
from safetensors.torch import load_file

from dynamic_transformers.settings import UserError
from dynamic_transformers.training import checkpoint, run_folder
from dynamic_transformers.training.checkpoint import checkpoints, save_checkpoint
from dynamic_transformers.training.observers import Checkpoints
from dynamic_transformers.training.trainer import train


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", flip),
        ("model.safetensors", empty),
        ("optimizer.safetensors", remove),
        ("state.json", empty),
        ("state.json", remove),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    name, harm, unfinished, finished, make_settings, data_dir, caplog
):
    shutil.rmtree(unfinished / "checkpoints" / "step-00000012")
    damaged = unfinished / "checkpoints" / "step-00000008" / name
    harm(damaged)
    train(make_settings("mod", training=STEPS), data_dir, unfinished)
    warning = next(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert str(damaged) in warning or (name == "state.json" and str(damaged.parent) in warning)
    assert_equal_ends(unfinished, finished)


def test_no_whole_checkpoint_stops_the_command(unfinished, make_settings, data_dir):
    for folder in checkpoints(unfinished):
        empty(folder / "optimizer.safetensors")
    before = snapshot(unfinished)
    with pytest.raises(UserError, match="no checkpoint is whole"):
        train(make_settings("mod", training=STEPS), data_dir, unfinished)
    assert snapshot(unfinished) == before


def test_a_damaged_checkpoint_is_kept_aside_and_does_not_stop_what_comes_after(
    unfinished, finished, make_settings, data_dir
):
    empty(checkpoints(unfinished)[-1] / "model.safetensors")
    often = {"checkpoint_every": 1, "keep_checkpoints": 2}
    train(make_settings("mod", training=STEPS | often), data_dir, unfinished)
    assert_equal_ends(unfinished, finished)
    names = [path.name for path in (unfinished / "checkpoints").iterdir()]
    assert any(name.startswith("step-00000012.damaged-") for name in names)


def test_nothing_is_pruned_for_a_damaged_checkpoint(run):
    empty(checkpoints(run)[-1] / "model.safetensors")
    with pytest.raises(UserError):
        checkpoint.prune(run, 1)
    assert len(checkpoints(run)) == 3


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    def made(*names):
        model = torch.nn.ParameterDict({name: torch.ones(2) for name in names})
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        sum(model.values()).sum().backward()
        optimizer.step()
        return model, optimizer

    progress, schedule = run_folder.Budget("step", 1), run_folder.Budget("step", 1)
    progress = checkpoint.Progress(step=1)
    save_checkpoint(tmp_path / "step-1", *made("a", "b"), progress, {}, schedule)
    model, optimizer = made("a", "b")
    saved = checkpoint.read_checkpoint(tmp_path / "step-1")
    tensors = load_file(tmp_path / "step-1" / "optimizer.safetensors")
    checkpoint.save_file({**tensors, "c/step": torch.ones(1)}, tmp_path / "step-1" / "optimizer.safetensors")
    with pytest.raises(UserError, match="c/step"):
        checkpoint.load_checkpoint(saved, model, optimizer)
    checkpoint.save_file({}, tmp_path / "step-1" / "optimizer.safetensors")
    with pytest.raises(UserError, match="is empty"):
        checkpoint.load_checkpoint(saved, model, torch.optim.AdamW(model.parameters()))


def test_leftovers_of_killed_writers_go(unfinished, make_settings, data_dir):
    for place in (unfinished, unfinished / "checkpoints"):
        (place / ".step-00000004.new-abc").mkdir()
        (place / ".state.json.new-abc").write_text("{")
    train(make_settings("mod", training=STEPS), data_dir, unfinished)
    assert not [path for path in unfinished.rglob(".*")]


def test_the_last_checkpoints_and_the_best_are_kept(make_settings, data_dir, tmp_path, monkeypatch):
    losses = iter([5.0, 1.0, 4.0, 3.0, 2.0, 6.0])
    settings = make_settings(
        training={"max_steps": 6, "checkpoint_every": 1, "eval_every": 1, "keep_checkpoints": 2}
    )
    honest = Checkpoints.after_step

    def with_that_loss(self, moment):
        moment.progress.evaluation["loss"] = next(losses)
        honest(self, moment)

    monkeypatch.setattr(Checkpoints, "after_step", with_that_loss)
    run = train(settings, data_dir, tmp_path / "run")
    assert [path.name[-1] for path in checkpoints(run)] == ["2", "5", "6"]


def test_a_folder_that_a_person_named_is_no_checkpoint(unfinished, make_settings, data_dir):
    kept = unfinished / "checkpoints" / "step-00000004-before-the-change"
    shutil.copytree(unfinished / "checkpoints" / "step-00000004", kept)
    train(make_settings("mod", training=STEPS | {"checkpoint_every": 1}), data_dir, unfinished)
    assert kept.is_dir() and kept not in checkpoints(unfinished)


def test_time_saves_where_no_interval_does(make_settings, data_dir, tmp_path):
    settings = make_settings(training={"max_steps": 4, "checkpoint_minutes": 1e-9, "keep_checkpoints": None})
    assert len(checkpoints(train(settings, data_dir, tmp_path / "run"))) == 4
