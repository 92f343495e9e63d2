"""Stores that cannot be reached, opened or written, and a new one that several runs open at once."""

import json
import logging
import multiprocessing
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack

import mlflow
import pytest
from runs import DATA, track_run
from servers import SlowServer, answering, closed_port, hanging, serving

from dynamic_transformers.settings import TrackingSettings, UserError
from dynamic_transformers.tracking import RunTracker, find_evaluated
from dynamic_transformers.tracking.store import open_store


class Trouble:
    """What a user has done to the store; each gives its address."""

    def __init__(self, folder, empty_database):
        self.folder, self.empty, self.stack = folder, empty_database, ExitStack()

    def database(self):
        path = self.folder / "mlflow.db"
        shutil.copy(self.empty, path)
        return path, f"sqlite:///{path}"

    def refused_port(self):
        return f"http://{closed_port()}"

    def hanging_server(self):
        return f"http://{self.stack.enter_context(hanging())}"

    def another_web_page(self):
        return f"http://{self.stack.enter_context(serving(answering(200, b'<html>Welcome</html>')))}"

    def password_asked(self):
        return f"http://{self.stack.enter_context(serving(answering(401, b'who are you?')))}"

    def server_in_trouble(self):
        return f"http://{self.stack.enter_context(serving(answering(503, b'later')))}"

    def no_database(self):
        path, uri = self.database()
        path.write_text("shopping list\n" * 100)
        return uri

    def a_folder(self):
        path, uri = self.database()
        path.unlink()
        path.mkdir()
        return uri

    def read_only(self):
        path, _ = self.database()
        return f"sqlite:///file:{path}?mode=ro&uri=true"

    def old_schema(self):
        path, uri = self.database()
        with sqlite3.connect(path) as database:
            database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        return uri

    def half_made(self):
        path, uri = self.database()
        with sqlite3.connect(path) as database:
            database.execute("DROP TABLE latest_metrics")
        return uri

    def file_store(self):
        return str(self.folder / "mlruns")

    def unknown_scheme(self):
        return "mongodb://somewhere/runs"

    def deleted_experiment(self):
        _, uri = self.database()
        client = mlflow.MlflowClient(uri)
        client.delete_experiment(client.create_experiment("test"))
        return uri


WAITING = "sends what is missing"
TROUBLES = {
    "refused_port": f"cannot be reached: connection refused; .*{WAITING}",
    "hanging_server": f"does not answer; .*{WAITING}",
    "server_in_trouble": f"is in trouble; .*{WAITING}",
    "another_web_page": "is no MLflow server that can be used: see tracking.mlflow_uri.*until then",
    "password_asked": "refuses the credentials: see MLFLOW_TRACKING_USERNAME.*until then",
    "no_database": r"mlflow.db is no database: move it away.*until then",
    "a_folder": r"cannot be written: change its mode, or set tracking.mlflow_uri.*until then",
    "read_only": r"cannot be written: change its mode, or set tracking.mlflow_uri.*until then",
    "old_schema": r"is old: back it up, then `mlflow db upgrade sqlite:.*until then",
    "half_made": r"is half made or damaged: move it away.*until then",
    "file_store": "MLflow no longer writes into folders.*name a server or sqlite:///FILE.*until then",
    "unknown_scheme": "is no MLflow server that can be used.*until then",
    "deleted_experiment": r"'test' was deleted: restore it \(`mlflow experiments restore -x 1`\).*until then",
}


RUN = """
import sys
from pathlib import Path
from dynamic_transformers.settings import TrackingSettings
from dynamic_transformers.tracking import RunTracker
folder, uri = Path(sys.argv[1]), sys.argv[2]
settings = TrackingSettings(mlflow=uri != "", mlflow_uri=uri or None)
tracker = RunTracker(folder, settings, folder, "a", {"x": 1})
tracker.log(1, {"tokens": 1, "train/loss": 1.0})
tracker.close("FINISHED")
"""


def seconds_of_a_process(run_dir, uri):
    """From its start to its end, with all imports: of a run that does nothing but track."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", RUN, run_dir, uri], check=True)
    return time.perf_counter() - start


@pytest.mark.parametrize("trouble", ["refused_port", "hanging_server"])
def test_a_server_that_is_away_adds_less_than_5_seconds_to_a_process(trouble, tmp_path, run_dir):
    made = Trouble(tmp_path, None)
    with made.stack:
        uri = getattr(made, trouble)()
        without = seconds_of_a_process(run_dir, "")
        assert seconds_of_a_process(run_dir, uri) - without < 5


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_store_that_cannot_be_used_costs_seconds_and_says_what_helps(
    trouble, tmp_path, run_dir, empty_database, monkeypatch, caplog, capfd
):
    made = Trouble(tmp_path, empty_database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", getattr(made, trouble)())
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.chdir(tmp_path)  # MLflow makes folders named after an address that is none
    caplog.set_level(logging.INFO)
    with made.stack:
        start = time.perf_counter()  # MLflow is imported, as it is after the first seconds of a training
        tracker = RunTracker(run_dir, TrackingSettings(experiment="test"), tmp_path, "a", {"x": 1})
        tracker.log_data(run_dir, DATA)
        for step in range(1, 6):
            tracker.log(step, {"tokens": step, "train/loss": 1.0})
        assert not tracker.close("FINISHED")
        assert time.perf_counter() - start < 5
    (line,) = [record.message for record in caplog.records if record.name == "dynamic_transformers"]
    assert re.search(TROUBLES[trouble], line), line
    assert f"`dynamic-transformers sync {run_dir}`" in line
    assert "Traceback" not in "".join(capfd.readouterr())
    assert len(json.loads((run_dir / "tracking.json").read_text())["attachments"]) == 2


def test_a_server_that_hangs_in_the_end_costs_seconds(run_dir, monkeypatch, caplog):
    monkeypatch.setattr(SlowServer, "slow", "runs/log-batch")
    monkeypatch.setattr(SlowServer, "seconds", 20)
    with serving(SlowServer) as address:
        tracker = RunTracker(
            run_dir, TrackingSettings(mlflow_uri=f"http://{address}"), run_dir, "a", {"x": 1}
        )
        start = time.perf_counter()
        assert not tracker.close("FINISHED")
        assert time.perf_counter() - start < 5
    # Where the machine is busy, the question before the first line is the one that gets no answer in time.
    told = rf"(no answer for 4 seconds|does not answer); `dynamic-transformers sync {run_dir}`"
    assert re.search(told, caplog.text)


def test_a_question_to_a_server_that_hangs_takes_seconds(tmp_path):
    with hanging() as address:
        start = time.perf_counter()
        with pytest.raises(UserError, match=r"MLflow: http://.* does not answer"):
            find_evaluated(TrackingSettings(mlflow_uri=f"http://{address}"), tmp_path, "any")
        assert time.perf_counter() - start < 5


def test_trouble_is_told_once_and_its_end_too(store, run_dir, caplog):
    settings, output_dir = store
    caplog.set_level(logging.INFO)
    database = output_dir / "mlflow.db"
    database.rename(output_dir / "away")
    database.mkdir()
    tracker = RunTracker(run_dir, settings, output_dir, "a")
    for _ in range(3):
        assert not tracker.sync()
    database.rmdir()
    (output_dir / "away").rename(database)
    assert tracker.sync() and tracker.close("FINISHED")
    first, second = [record.message for record in caplog.records if record.name == "dynamic_transformers"]
    assert "cannot be written" in first and "has everything" in second


@pytest.fixture(scope="module")
def processes():
    """A context whose processes have MLflow imported when they start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs", "mlflow.store.tracking.sqlalchemy_store"])
    return context


def test_three_runs_that_start_at_once_share_one_sound_database(tmp_path, monkeypatch, processes):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    together = processes.Barrier(3)
    started = [processes.Process(target=track_run, args=(tmp_path / name, together)) for name in "abc"]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0, 0]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("dynamic-transformers").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["a", "b", "c"]
    for run in runs:
        assert run.info.status == "FINISHED" and len(run.inputs.dataset_inputs) == 2
        assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 20
    assert not list(tmp_path.glob(".mlflow.db*"))


def test_a_kill_while_the_database_is_made_leaves_none(tmp_path, processes):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    process = processes.Process(target=open_store, args=(uri,))
    process.start()
    while not list(tmp_path.glob(".mlflow.db.new-*/mlflow.db")):
        time.sleep(0.005)
        assert process.is_alive()
    process.kill()
    process.join()
    assert not (tmp_path / "mlflow.db").exists()
    assert open_store(uri).search_experiments()
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
