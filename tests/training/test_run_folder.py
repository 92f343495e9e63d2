"""Run folders: a refused command touches nothing, a run goes on from proven checkpoints, nothing is lost."""

import multiprocessing
import os
import shutil
import signal
import sys

import pytest
import torch
from run_contents import STEPS, assert_equal_ends, empty, flip, numbers, snapshot, weights

from dynamic_transformers.folders import sole_writer
from dynamic_transformers.interruption import Interrupted
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.settings import UserError
from dynamic_transformers.training import run_folder
from dynamic_transformers.training.checkpoint import checkpoints
from dynamic_transformers.training.identity import settings_identity
from dynamic_transformers.training.run_folder import claim, plan_start, run_identity
from dynamic_transformers.training.step import OptimizerStep
from dynamic_transformers.training.trainer import train
from tests.models.tiny import ROUTED


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
    with pytest.raises(UserError, match=r"0 MB are free there, two checkpoints need"):
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


@pytest.mark.parametrize("name", ["identity.json", "manifest.json"])
def test_a_damaged_file_of_a_run_is_named(name, unfinished, make_settings, data_dir):
    empty(unfinished / name)
    before = snapshot(unfinished)
    with pytest.raises(UserError, match=rf"{name}: damaged; (--force begins anew|of a run remove this file)"):
        train(make_settings("mod", training=STEPS), data_dir, unfinished)
    assert snapshot(unfinished) == before


def test_a_run_without_its_identity_is_refused(unfinished, make_settings, data_dir):
    (unfinished / "identity.json").unlink()
    before = snapshot(unfinished)
    with pytest.raises(UserError, match=r"its identity\.json is missing"):
        train(make_settings("mod", training=STEPS), data_dir, unfinished)
    assert snapshot(unfinished) == before


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("metrics.jsonl", b'\x00\x00{"step": 12, "train/lo\n{"st'),
        ("tracking.json", b'{"name": "mod", "pa'),
        ("tracking.json", b"\xff\xfe"),
    ],
)
def test_a_damaged_file_of_a_run_costs_nothing(name, rest, unfinished, finished, make_settings, data_dir):
    with (unfinished / name).open("ab") as file:
        file.write(rest)
    train(make_settings("mod", training=STEPS), data_dir, unfinished)
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
    file = damaged / "train" / "tokens.bin"
    flip(file)
    before = snapshot(unfinished)
    with pytest.raises(UserError, match=r"train/tokens\.bin: damaged: sha256 differs"):
        train(make_settings("mod", training=STEPS), damaged, unfinished)
    assert snapshot(unfinished) == before


def test_a_size_and_its_dimensions_are_the_same_model(make_settings, data_dir):
    named, spelt = (
        run_identity(make_settings("mod", model=model), data_dir)
        for model in ({"size": "micro"}, {"size": "micro", "dimensions": {"hidden_size": 64}})
    )
    assert named == spelt
    assert run_identity(make_settings("mod", model={"size": "tiny"}), data_dir) != named


@pytest.mark.parametrize(
    ("model", "counts"),
    [
        ({}, False),
        ({"selection_rule": "even"}, False),
        ({"selection_rule": "random"}, True),
        ({"training_rule": "threshold"}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ROUTED)
def test_how_the_batch_is_split_counts_where_it_changes_numbers(architecture, model, counts, make_settings):
    one, two = (
        settings_identity(make_settings(architecture, model=model, data={"batch_size": 4 // n}), processes=n)
        for n in (1, 2)
    )
    assert (one != two) == counts
