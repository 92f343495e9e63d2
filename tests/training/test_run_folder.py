"""Run folders: a refused command touches nothing, a run goes on from proven checkpoints, nothing is lost."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

from dynamic_transformers.folders import sole_writer
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.settings import UserError
from dynamic_transformers.training import checkpoint, run_folder
from dynamic_transformers.training.checkpoint import checkpoints, save_checkpoint
from dynamic_transformers.training.interruption import Interrupted
from dynamic_transformers.training.observers import Checkpoints
from dynamic_transformers.training.run_folder import claim, plan_start, run_identity
from dynamic_transformers.training.step import OptimizerStep
from dynamic_transformers.training.trainer import train

STEPS = {"max_steps": 12, "checkpoint_every": 4}


def snapshot(folder):
    """Contents and time of every file."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def numbers(run_dir):
    """The lines of metrics.jsonl without what a clock says."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if key not in ("time", "train/tokens_per_second")}
        for line in lines
    ]


def weights(run_dir):
    return load_file(run_dir / "weights" / "model.safetensors")


def assert_equal_ends(one, two):
    assert numbers(one) == numbers(two)
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(autouse=True)
def everything_logged(caplog):
    caplog.set_level(logging.INFO, logger="dynamic_transformers")


@pytest.fixture(scope="module")
def finished(make_settings, data_dir, tmp_path_factory):
    """A finished run of 12 steps with checkpoints at 4, 8 and 12."""
    return train(make_settings("mod", training=STEPS), data_dir, tmp_path_factory.mktemp("runs") / "mod")


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def unfinished(run):
    """The same, as a kill after step 12 leaves it."""
    (run / "manifest.json").unlink()
    shutil.rmtree(run / "weights")
    return run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"optimizer": {"lr": 3e-4}}}, r"training.optimizer.lr \(0.003 there, 0.0003 now\)"),
        ({"training": {"resume": "{own}", "optimizer": {"lr": 3e-4}}}, "training.optimizer.lr"),
        ({"training": {"resume": "{other}"}}, "model.type"),
        ({"training": {"resume": "/no/such/place"}}, "not a checkpoint"),
        ({"data": {"batch_size": 8}}, r"global_batch \(4 there, 8 now\)"),
        ({"run": {"seed": 3}}, "run.seed"),
        ({"model": {"capacity": 0.25, "predictor_weight": 0.5}}, "model.capacity.*model.predictor_weight"),
        (
            {"training": {"mode": "pretrained"}, "model": {"pretrained": "/no/such", "size": None},
             "data": {"tokenizer_name": "x"}, "force": True},
            "model.pretrained=/no/such",
        ),
    ],
)  # fmt: skip
def test_a_refused_command_touches_nothing(changes, message, unfinished, make_settings, data_dir, tmp_path):
    other = train(make_settings("sdt", training={"max_steps": 1}), data_dir, tmp_path / "other")
    changes = dict(changes)
    force = changes.pop("force", False)
    training = STEPS | changes.pop("training", {})
    places = {"own": unfinished / "checkpoints" / "step-00000004", "other": checkpoints(other)[0]}
    if "resume" in training:
        training["resume"] = training["resume"].format(**places)
    settings = make_settings("mod", training=training, **changes)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=message):
        train(settings, data_dir, unfinished, force=force)
    assert snapshot(tmp_path) == before


def test_a_full_disk_is_noticed_first(run, make_settings, data_dir, monkeypatch):
    usage = shutil.disk_usage(run)._replace(free=1000)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage)
    before = snapshot(run)
    with pytest.raises(UserError, match=r"0\.0 GB are free there, two checkpoints need"):
        train(make_settings("mod", training=STEPS), data_dir, run, force=True)
    assert snapshot(run) == before


@pytest.mark.parametrize("how", ["force", "none", "link"])
@pytest.mark.parametrize("architecture", ["mod", "sdt"])
def test_a_run_that_is_begun_anew_is_kept_under_another_name(
    how, architecture, run, make_settings, data_dir, tmp_path
):
    before = snapshot(run)
    training = STEPS | {"resume": "none" if how == "none" else "auto"}
    place = run
    if how == "link":
        (tmp_path / "elsewhere").mkdir()
        place = tmp_path / "elsewhere" / "link"
        place.symlink_to(run)
    train(make_settings(architecture, training=training), data_dir, place, force=how != "none")
    assert read_manifest(run)["architecture"] == architecture
    assert (run / "manifest.json").stat().st_mtime_ns > before["manifest.json"][1]
    (aside,) = (path for path in tmp_path.iterdir() if path.name.startswith("run.replaced-"))
    assert snapshot(aside) == before


def test_a_folder_that_is_no_run_is_left_alone(make_settings, data_dir, tmp_path):
    thesis = tmp_path / "run" / "checkpoints" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    for force in (False, True):
        with pytest.raises(UserError, match="holds something else than a run"):
            train(make_settings("mod"), data_dir, tmp_path / "run", force=force)
    assert thesis.read_text() == "years of work"


def test_going_back_to_an_earlier_checkpoint_keeps_what_came_after(
    unfinished, finished, make_settings, data_dir, tmp_path
):
    before = snapshot(unfinished)
    chosen = unfinished / "checkpoints" / "step-00000004"
    train(make_settings("mod", training=STEPS | {"resume": str(chosen)}), data_dir, unfinished)
    assert_equal_ends(unfinished, finished)
    (aside,) = (path for path in tmp_path.iterdir() if path.name.startswith("run.replaced-"))
    assert snapshot(aside) == before


def test_only_one_process_trains_in_a_folder(run, make_settings, data_dir):
    before = snapshot(run)
    with sole_writer(run), pytest.raises(UserError, match=rf"process {os.getpid()} on .* writes there now"):
        train(make_settings("mod", training=STEPS), data_dir, run, force=True)
    assert snapshot(run) == before


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    contents = bytearray(path.read_bytes())
    contents[-4000:] = bytes(255 - value for value in contents[-4000:])
    path.write_bytes(contents)


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


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


def test_a_damaged_checkpoint_is_kept_aside_and_does_not_stop_what_comes_after(
    unfinished, finished, make_settings, data_dir
):
    empty(checkpoints(unfinished)[-1] / "model.safetensors")
    often = {"checkpoint_every": 1, "keep_checkpoints": 2}
    train(make_settings("mod", training=STEPS | often), data_dir, unfinished)
    assert_equal_ends(unfinished, finished)
    names = [path.name for path in (unfinished / "checkpoints").iterdir()]
    assert any(name.startswith("step-00000012.damaged-") for name in names)


def test_a_folder_that_a_person_named_is_no_checkpoint(unfinished, make_settings, data_dir):
    kept = unfinished / "checkpoints" / "step-00000004-before-the-change"
    shutil.copytree(unfinished / "checkpoints" / "step-00000004", kept)
    train(make_settings("mod", training=STEPS | {"checkpoint_every": 1}), data_dir, unfinished)
    assert kept.is_dir() and kept not in checkpoints(unfinished)


def test_nothing_is_pruned_for_a_damaged_checkpoint(run):
    empty(checkpoints(run)[-1] / "model.safetensors")
    with pytest.raises(UserError):
        checkpoint.prune(run, 1)
    assert len(checkpoints(run)) == 3


def test_a_finished_run_is_extended_as_if_it_had_not_ended(make_settings, data_dir, tmp_path):
    optimizer = {"optimizer": {"min_lr_fraction": 0.1}}
    run = train(make_settings("stt", training=optimizer | {"max_steps": 4}), data_dir, tmp_path / "run")
    longer = make_settings("stt", training=optimizer | {"max_steps": 8})
    train(longer, data_dir, run)
    assert read_manifest(run)["training_steps"] == 8
    rates = [line["train/learning_rate"] for line in numbers(run) if "train/learning_rate" in line]
    assert rates[4:] == pytest.approx([3e-4] * 4)  # where the schedule of 4 steps had ended
    with pytest.raises(UserError, match="has done 8 steps, more than the budget of 4 steps"):
        train(make_settings("stt", training=optimizer | {"max_steps": 4}), data_dir, run)


def test_an_extended_run_gets_a_new_schedule_only_if_that_is_said(run, make_settings, data_dir):
    before = snapshot(run)
    with pytest.raises(UserError, match=r"training\.reschedule=true"):
        train(make_settings("mod", training=STEPS | {"max_steps": 16}), data_dir, run)
    assert snapshot(run) == before
    train(make_settings("mod", training=STEPS | {"max_steps": 16, "reschedule": True}), data_dir, run)
    rates = [line["train/learning_rate"] for line in numbers(run) if "train/learning_rate" in line]
    assert rates[11] < rates[12] > rates[15]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"max_steps": 5}, "has done 12 steps, more than the budget of 5 steps"),
        (
            {"max_steps": None, "max_tokens": 200.0},
            "has done 1536 tokens, more than the budget of 200 tokens",
        ),
        ({"max_steps": 20}, r"learning rate ends at 0 after 12 steps; training\.reschedule=true"),
        ({"max_steps": None, "max_tokens": 1e6}, r"after 12 steps; .* over the 1000000 tokens asked for"),
    ],
)
def test_an_unfinished_run_is_not_taken_for_one_of_another_length(
    budget, message, unfinished, make_settings, data_dir
):
    before = snapshot(unfinished)
    with pytest.raises(UserError, match=message):
        train(make_settings("mod", training=STEPS | budget), data_dir, unfinished)
    assert snapshot(unfinished) == before


@pytest.mark.parametrize("name", ["identity.json", "metrics.jsonl"])
def test_damaged_files_of_a_run_end_in_a_line_or_are_mended(
    name, unfinished, finished, make_settings, data_dir
):
    settings = make_settings("mod", training=STEPS)
    if name == "identity.json":
        empty(unfinished / name)
        with pytest.raises(UserError, match=r"identity\.json: damaged"):
            train(settings, data_dir, unfinished)
    else:
        with (unfinished / name).open("ab") as file:
            file.write(b'\x00\x00{"step": 12, "train/lo\n{"st')
        train(settings, data_dir, unfinished)
        assert_equal_ends(unfinished, finished)


def test_a_run_that_began_from_a_checkpoint_goes_on_from_its_own(
    finished, make_settings, data_dir, tmp_path, monkeypatch
):
    source = finished / "checkpoints" / "step-00000004"
    settings = make_settings("mod", training=STEPS | {"resume": str(source)})
    honest = OptimizerStep.__call__

    def with_a_signal(self, step, *rest):
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, step, *rest)

    monkeypatch.setattr(OptimizerStep, "__call__", with_a_signal)
    for _ in range(2):  # the second begins after step 9
        with pytest.raises(Interrupted):
            train(settings, data_dir, tmp_path / "run")
        monkeypatch.setattr(OptimizerStep, "__call__", honest)
        break
    train(settings, data_dir, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing was begun again and set aside
    assert [line["step"] for line in numbers(tmp_path / "run") if "train/loss" in line] == list(range(5, 13))
    first, second = weights(tmp_path / "run"), weights(finished)
    assert all(torch.equal(first[name], second[name]) for name in first)


def fatal_calls(action):
    """Runs `action` in a process that is killed before its n-th change of a file, for n = 1, 2, …"""

    def child(number):
        left = number

        def count(event, arguments):
            nonlocal left
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod")
            if changes or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        action()

    for number in range(1, 10**6):
        process = multiprocessing.get_context("fork").Process(target=child, args=(number,), daemon=True)
        process.start()
        process.join()
        if process.exitcode == 0:
            assert number > 5  # else nothing was counted
            return
        assert process.exitcode == -signal.SIGKILL
        yield number


@pytest.mark.parametrize("how", ["new", "force", "back", "extended", "on"])
def test_no_kill_while_a_folder_is_claimed_loses_or_wedges_a_run(
    how, finished, make_settings, data_dir, tmp_path
):
    training = STEPS | ({"max_steps": 16, "reschedule": True} if how == "extended" else {})
    run = tmp_path / "run"
    if how == "back":
        training["resume"] = str(run / "checkpoints" / "step-00000004")
    settings = make_settings("mod", training=training)
    identity = run_identity(settings, data_dir)

    def renewed():
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        if how != "new":
            shutil.copytree(finished, run)
        if how in ("back", "on"):
            (run / "manifest.json").unlink()

    def act():
        claim(run, plan_start(run, identity, settings, how == "force"), identity, settings)

    renewed()
    contents = {path.read_bytes() for path in run.rglob("*.safetensors") if "checkpoints" in path.parts}
    kills = 0
    for _ in fatal_calls(act):
        kills += 1
        left = {path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
        assert contents <= left
        with sole_writer(run):
            assert not list(tmp_path.glob(".run.new-*"))
            plan_start(run, identity, settings, False)
        renewed()
    assert kills


def test_a_run_without_a_checkpoint_says_that_it_begins_anew(unfinished, make_settings, data_dir, caplog):
    shutil.rmtree(unfinished / "checkpoints")
    train(make_settings("mod", training=STEPS), data_dir, unfinished)
    assert "holds no checkpoint yet: beginning anew" in caplog.text
    assert [line["step"] for line in numbers(unfinished) if "train/loss" in line] == list(range(1, 13))


def test_time_saves_where_no_interval_does(make_settings, data_dir, tmp_path):
    settings = make_settings(training={"max_steps": 4, "checkpoint_minutes": 1e-9, "keep_checkpoints": None})
    assert len(checkpoints(train(settings, data_dir, tmp_path / "run"))) == 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_the_run_goes_on(
    number, code, finished, make_settings, data_dir, tmp_path, monkeypatch, caplog
):
    honest = OptimizerStep.__call__

    def with_a_signal(self, step, *rest):
        if step == 4:  # the fifth
            os.kill(os.getpid(), number)
        return honest(self, step, *rest)

    monkeypatch.setattr(OptimizerStep, "__call__", with_a_signal)
    settings = make_settings("mod", training=STEPS)
    with pytest.raises(Interrupted) as ended:
        train(settings, data_dir, tmp_path / "run")
    assert ended.value.code == code
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000005"
    assert "interrupted after step 5" in caplog.text
    monkeypatch.setattr(OptimizerStep, "__call__", honest)
    train(settings, data_dir, tmp_path / "run")
    assert_equal_ends(tmp_path / "run", finished)


@pytest.mark.parametrize("step", [4, 8])
def test_the_evaluation_of_a_step_that_was_interrupted_is_made_up_for(
    step, make_settings, data_dir, tmp_path, monkeypatch
):
    settings = make_settings("stt", training={"max_steps": 8, "eval_every": 4})
    straight = train(settings, data_dir, tmp_path / "straight")
    honest = OptimizerStep.__call__

    def with_a_signal(self, number, *rest):
        if number == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, number, *rest)

    monkeypatch.setattr(OptimizerStep, "__call__", with_a_signal)
    with pytest.raises(Interrupted):
        train(settings, data_dir, tmp_path / "run")
    monkeypatch.setattr(OptimizerStep, "__call__", honest)
    before = numbers(tmp_path / "run")
    assert not any("eval/loss" in line and line["step"] == step for line in before)
    train(settings, data_dir, tmp_path / "run")
    assert_equal_ends(tmp_path / "run", straight)
    # As if it had been killed between the line and the next checkpoint: the line does not come twice.
    again = shutil.copytree(straight, tmp_path / "again")
    (again / "manifest.json").unlink()
    state = json.loads((checkpoints(again)[-1] / "state.json").read_text())
    state["progress"]["evaluation"] = {"step": 4, "loss": 1.0}
    (checkpoints(again)[-1] / "state.json").write_text(json.dumps(state))
    train(settings, data_dir, again)
    assert_equal_ends(again, straight)


def test_means_of_a_line_do_not_depend_on_where_a_run_was_interrupted(make_settings, data_dir, tmp_path):
    training = {"max_steps": 8, "log_every": 4, "checkpoint_every": 3}
    settings = make_settings("sdt", training=training)
    straight = train(settings, data_dir, tmp_path / "straight")
    resumed = shutil.copytree(straight, tmp_path / "resumed")
    (resumed / "manifest.json").unlink()
    for later in checkpoints(resumed)[1:]:
        shutil.rmtree(later)
    train(settings, data_dir, resumed)
    assert_equal_ends(resumed, straight)


def test_damaged_data_are_noticed_before_anything_else(unfinished, make_settings, data_dir, tmp_path):
    damaged = shutil.copytree(data_dir, tmp_path / "data")
    (file,) = (damaged / "train").glob("*.arrow")
    flip(file)
    before = snapshot(unfinished)
    with pytest.raises(UserError, match=r"train/.*\.arrow: damaged: sha256 differs"):
        train(make_settings("mod", training=STEPS), damaged, unfinished)
    assert snapshot(unfinished) == before


def test_a_size_and_its_dimensions_are_the_same_model(make_settings, data_dir):
    named, spelt = (
        run_identity(make_settings("mod", model=model), data_dir)
        for model in ({"size": "micro"}, {"size": "micro", "dimensions": {"hidden_size": 64}})
    )
    assert named == spelt
    assert run_identity(make_settings("mod", model={"size": "tiny"}), data_dir) != named
