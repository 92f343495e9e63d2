"""SIGTERM and SIGINT: nothing is lost, and a tracking server is told."""

import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest
from run_contents import STEPS, assert_equal_ends, numbers

from dynamic_transformers.interruption import Interrupted
from dynamic_transformers.tracking import RunTracker, tracking_uri
from dynamic_transformers.tracking.store import open_store
from dynamic_transformers.training import trainer
from dynamic_transformers.training.checkpoint import checkpoints
from dynamic_transformers.training.step import OptimizerStep
from dynamic_transformers.training.trainer import train

# Forked: imports are done, and a signal hits nothing but the training.
FORK = multiprocessing.get_context("fork")


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


TRACKED = {"max_steps": 6, "eval_every": 4}


@pytest.fixture(scope="module")
def straight(make_settings, data_dir, tmp_path_factory):
    """A run that no signal has met, and that MLflow is not told of."""
    return train(
        make_settings("mod", training=TRACKED), data_dir, tmp_path_factory.mktemp("straight") / "run"
    )


@pytest.fixture
def tracked(make_settings, tmp_path, monkeypatch):
    """Settings of a run that MLflow is told of; and a function that says how the run stands there."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = {"output_dir": str(tmp_path / "outputs")}
    settings = make_settings("mod", run=place, training=TRACKED, tracking={"mlflow": True})
    store = open_store(tracking_uri(settings.tracking, settings.run.output_dir))

    def status():
        run_id = json.loads((tmp_path / "run" / "tracking.json").read_text())["run_id"]
        return store.get_run(run_id).info.status

    return settings, status


def exit_code(settings, data_dir, run_dir, number=0, reached=None):
    """Exit code of a process that trains; a signal is sent when it has got somewhere."""
    process = FORK.Process(target=train, args=(settings, data_dir, run_dir), daemon=True)
    process.start()
    if reached is not None:
        assert reached.wait(60)
        os.kill(process.pid, number)
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (RunTracker, "log_data"),
        (trainer, "evaluate_heldout"),  # that a run owes which was interrupted in its last step
        (trainer, "calibrate"),
        (trainer, "save_model"),
        (RunTracker, "close"),
    ],
)
def test_a_signal_outside_of_the_steps_is_told_and_loses_nothing(
    owner, name, number, code, tracked, straight, data_dir, tmp_path, monkeypatch
):
    settings, status = tracked
    run_dir, honest, reached = tmp_path / "run", getattr(owner, name), FORK.Event()

    def slow(*args, **kwargs):
        reached.set()
        time.sleep(1)
        return honest(*args, **kwargs)

    if name == "evaluate_heldout":
        owing(shutil.copytree(straight, run_dir))
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, slow)
        assert exit_code(settings, data_dir, run_dir, number, reached) == code
    assert not (run_dir / "manifest.json").exists()
    assert status() == ("FINISHED" if name == "close" else "KILLED")
    assert exit_code(settings, data_dir, run_dir) == 0
    assert status() == "FINISHED"
    assert_equal_ends(run_dir, straight)


def owing(run_dir):
    """Leave a finished run as an interruption of its last step leaves it."""
    (run_dir / "manifest.json").unlink()
    shutil.rmtree(run_dir / "weights")
    state = checkpoints(run_dir)[-1] / "state.json"
    values = json.loads(state.read_text())
    values["progress"]["evaluation"] = {}
    state.write_text(json.dumps(values))


def test_a_failure_before_the_first_step_is_told(tracked, data_dir, tmp_path, monkeypatch):
    settings, status = tracked

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(RunTracker, "log_data", fail)
    with pytest.raises(OSError, match="no space left"):
        train(settings, data_dir, tmp_path / "run")
    assert status() == "FAILED"
