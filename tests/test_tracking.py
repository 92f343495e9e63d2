"""MLflow as it really is: a SQLite store, and a server that is away."""

import json
import socket
import time

import mlflow
import pytest

from dynamic_transformers.settings import TrackingSettings
from dynamic_transformers.tracking import RunTracker, finish_parent_run, start_parent_run, tracking_uri


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return TrackingSettings(experiment="test"), tmp_path / "outputs"


def client(settings, output_dir):
    return mlflow.MlflowClient(tracking_uri(settings, output_dir))


def write_metrics(tracker, steps):
    for step in steps:
        done = {"tokens": step * 100, "training_flops": step * 1e6}
        tracker.log(step, done | {"train/loss": 1.0 / step})


def test_a_run_hangs_under_its_parent_with_both_axes(store, tmp_path):
    settings, output_dir = store
    parent = start_parent_run(settings, output_dir, "comparison")
    params = {"model": {"type": "mod"}, "data": {"long": "x" * 9000}}
    tracker = RunTracker(tmp_path, settings, output_dir, "mod-seed0", params, {"seed": "0"}, parent)
    write_metrics(tracker, range(1, 6))
    tracker.close(finished=True)
    run = client(*store).get_run(tracker.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent and run.info.status == "FINISHED"
    assert run.data.params["model.type"] == "mod"
    history = client(*store).get_metric_history(tracker.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(s * 100, 1 / s) for s in range(1, 6)]
    flops = client(*store).get_metric_history(tracker.run_id, "progress/training_flops")
    assert [m.value for m in flops] == [s * 1e6 for s in range(1, 6)]
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.html").write_text("<p>")
    finish_parent_run(settings, output_dir, parent, report)
    assert client(*store).get_run(parent).info.status == "FINISHED"
    assert [a.path for a in client(*store).list_artifacts(parent, "report")] == ["report/report.html"]


def test_lines_are_sent_once_also_by_a_later_step(store, tmp_path):
    settings, output_dir = store
    first = RunTracker(tmp_path, settings, output_dir, "a")
    write_metrics(first, [1, 2])
    first.close(finished=False)
    later = RunTracker(tmp_path, settings, output_dir)
    assert later.run_id == first.run_id
    write_metrics(later, [3])
    later.close(finished=True)
    history = client(*store).get_metric_history(first.run_id, "train/loss")
    assert [m.step for m in history] == [100, 200, 300]


def test_an_outage_neither_stops_nor_slows_and_is_made_up_for(store, tmp_path, caplog):
    settings, output_dir = store
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{closed.getsockname()[1]}"
    gone = TrackingSettings(experiment="test", mlflow_uri=away)
    assert start_parent_run(gone, output_dir, "comparison") == ""
    tracker = RunTracker(tmp_path, gone, output_dir, "a", params={"x": 1})
    start = time.perf_counter()
    write_metrics(tracker, range(1, 51))
    assert time.perf_counter() - start < 1
    tracker.close(finished=False)
    assert tracker.run_id is None
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 50
    back = RunTracker(tmp_path, settings, output_dir, "a", params={"x": 1})
    assert back.sync()
    history = client(*store).get_metric_history(back.run_id, "train/loss")
    assert len(history) == 50


def test_switched_off_nothing_is_made(tmp_path):
    settings = TrackingSettings(mlflow=False)
    tracker = RunTracker(tmp_path, settings, tmp_path / "outputs", "a")
    write_metrics(tracker, [1])
    tracker.close(finished=True)
    assert start_parent_run(settings, tmp_path / "outputs", "c") == ""
    assert not (tmp_path / "outputs").exists()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train/loss"] == 1.0
