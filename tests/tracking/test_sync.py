"""`dynamic-transformers sync`: a run as its folder is left, and what MLflow shows of it afterwards."""

import argparse
import copy
import json
import shutil

import mlflow
import pytest
import yaml
from runs import DATA
from servers import closed_port

from dynamic_transformers.folders import sole_writer
from dynamic_transformers.settings import UserError
from dynamic_transformers.tracking import RunTracker, description, reopened, send_rest
from dynamic_transformers.tracking.sync import sync_command


@pytest.fixture
def settings(store, make_settings):
    tracking, output_dir = store
    return make_settings(
        "mod", run={"name": "my-run", "output_dir": str(output_dir)}, tracking=vars(tracking)
    )


@pytest.fixture
def run(settings, run_dir):
    """The folder of a run whose server was away all the time, and that was killed by `kill -9`."""
    folder = settings.run_dir
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings.to_dict()))
    tracking = settings.tracking
    away = type(tracking)(**vars(tracking) | {"mlflow_uri": f"http://{closed_port()}"})
    tracker = RunTracker(folder, away, settings.run.output_dir, **description(settings))
    tracker.log_data(folder, DATA)
    for step in (1, 2, 3):
        tracker.log(step, {"tokens": step * 100, "train/loss": 1 / step})
    tracker.sender.stop()
    return folder


def sync(*folders):
    sync_command(argparse.Namespace(runs=list(folders)))


def tracked(settings, output_dir=None):
    uri = f"sqlite:///{output_dir or settings.run.output_dir}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("test")
    return client, client.search_runs([experiment.experiment_id]) if experiment else []


@pytest.mark.parametrize("finished", [False, True])
def test_what_the_server_missed_is_sent_once(run, settings, finished):
    if finished:
        (run / "manifest.json").write_text("{}")
    sync(run)
    sync(run)
    client, (mlflow_run,) = tracked(settings)
    assert mlflow_run.info.status == ("FINISHED" if finished else "KILLED")
    assert mlflow_run.info.run_name == "my-run" and mlflow_run.data.tags["architecture"] == "mod"
    assert mlflow_run.data.params["model.type"] == "mod" and len(mlflow_run.inputs.dataset_inputs) == 2
    history = client.get_metric_history(mlflow_run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [100, 200, 300]


def test_how_a_run_ended_is_kept(run, settings):
    state = json.loads((run / "tracking.json").read_text())
    (run / "tracking.json").write_text(json.dumps(state | {"status": "FAILED"}))
    sync(run)
    _, (mlflow_run,) = tracked(settings)
    assert mlflow_run.info.status == "FAILED"


def test_a_run_that_was_not_tracked_is_sent_when_asked_for(run, settings):
    (run / "tracking.json").unlink()
    settings.tracking.mlflow = False
    (run / "config.yaml").write_text(yaml.safe_dump(settings.to_dict()))
    assert send_rest(settings, run) and not tracked(settings)[1]
    sync(run)
    _, (mlflow_run,) = tracked(settings)
    assert mlflow_run.info.run_name == "my-run" and mlflow_run.data.metrics["train/loss"] == 1 / 3


def test_an_output_folder_that_was_moved_has_its_database_with_it(run, settings, tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    shutil.move(settings.run.output_dir, moved)
    monkeypatch.chdir(moved)
    sync((moved / run.name).relative_to(moved))
    assert len(tracked(settings, moved)[1]) == 1
    assert not (tmp_path / "outputs").exists()


def test_a_run_that_goes_on_is_left_alone(run, settings):
    with sole_writer(run), pytest.raises(UserError, match=r"process .* writes there now"):
        sync(run)
    assert not tracked(settings)[1]


def test_what_could_not_be_sent_is_named(run, settings, monkeypatch, caplog):
    settings.tracking.mlflow_uri = f"http://{closed_port()}"
    (run / "config.yaml").write_text(yaml.safe_dump(settings.to_dict()))
    with pytest.raises(UserError, match=f"not everything was sent of: {run}"):
        sync(run)
    assert "connection refused" in caplog.text


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_folder_that_is_no_run_is_refused(run, name):
    (run / name).unlink()
    with pytest.raises(UserError, match=f"{run}: no run that has begun .it has no {name}"):
        sync(run)


def test_another_store_gets_all_of_a_run_that_one_has(run, settings, tmp_path, empty_database, capsys):
    sync(run)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(empty_database, other / "mlflow.db")
    settings.tracking.mlflow_uri = f"sqlite:///{other}/mlflow.db"
    (run / "config.yaml").write_text(yaml.safe_dump(settings.to_dict()))
    capsys.readouterr()
    for _ in range(2):
        sync(run)
    client, (mlflow_run,) = tracked(settings, other)
    assert mlflow_run.info.status == "KILLED" and mlflow_run.data.params["model.type"] == "mod"
    assert len(client.get_metric_history(mlflow_run.info.run_id, "train/loss")) == 3
    assert capsys.readouterr().out == f"{run} → {settings.tracking.mlflow_uri}\n" * 2
    settings.tracking.mlflow_uri = None
    (run / "config.yaml").write_text(yaml.safe_dump(settings.to_dict()))
    sync(run)  # the first store knows it by its key
    client, (mlflow_run,) = tracked(settings)
    assert len(client.get_metric_history(mlflow_run.info.run_id, "train/loss")) == 3


def test_the_store_is_named_without_a_secret(run, settings, monkeypatch, capsys):
    sync(run)
    address = f"http://user:sesame@{closed_port()}/?token=tulip"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(UserError, match="not everything was sent"):
        sync(run)
    shown = capsys.readouterr().out + (run / "tracking.json").read_text()
    assert "→ http://***@127.0.0.1" in shown and "sesame" not in shown and "tulip" not in shown


DAMAGED = ['{"name": "my-', "[]", '{"sent_bytes": "many"}', "\udcff"]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_record_is_set_aside(run, settings, text, caplog):
    (run / "tracking.json").write_text(text, errors="surrogateescape")
    sync(run)
    assert len(tracked(settings)[1]) == 1
    (line,) = [line for line in caplog.messages if "damaged" in line]
    assert line.startswith(f"{run / 'tracking.json'}: ")
    (aside,) = run.glob("tracking.json.damaged-*")
    assert aside.name in line and aside.read_text(errors="surrogateescape") == text


def test_a_record_of_another_version_is_read(run, settings):
    values = json.loads((run / "tracking.json").read_text())
    values.pop("store", None)
    (run / "tracking.json").write_text(json.dumps(values | {"of_the_future": 1}))
    sync(run)
    assert len(tracked(settings)[1]) == 1 and not list(run.glob("tracking.json.damaged-*"))


def test_a_later_step_tells_what_the_training_did_not(run, settings):
    (run / "tracking.json").unlink()
    other = copy.deepcopy(settings)  # as a pipeline gives evaluate
    other.model.type, other.run.name = "standard", "pipeline"
    tracker = reopened(other, run)
    tracker.log_final(300, {"test/loss": 1.0})
    assert tracker.close("FINISHED")
    _, (mlflow_run,) = tracked(settings)
    assert mlflow_run.info.run_name == "my-run" and mlflow_run.info.status == "FINISHED"
    assert mlflow_run.data.params["model.type"] == mlflow_run.data.tags["architecture"] == "mod"


def test_a_later_step_begins_no_run_of_wandb(run, settings, monkeypatch):
    monkeypatch.setattr("dynamic_transformers.tracking.tracker.WandbRun", None)
    (run / "tracking.json").unlink()
    settings.tracking.wandb = True
    assert reopened(settings, run).close("FINISHED")
