"""MLflow as it really is: a SQLite store, and a server that is away."""

import json
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import mlflow
import pytest

from dynamic_transformers.evaluation.evaluate import track
from dynamic_transformers.settings import TrackingSettings, UserError
from dynamic_transformers.step_log import step_log
from dynamic_transformers.tracking import (
    RunTracker,
    download,
    find_evaluated,
    forget_after,
    track_comparison,
    tracking_uri,
)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return TrackingSettings(experiment="test"), tmp_path / "outputs"


class Server(BaseHTTPRequestHandler):
    """The one run of an MLflow server that takes its time to store and to fetch some files."""

    slow = "artifacts/model"
    seconds = 2
    stored: ClassVar[list[str]] = []  # what it was asked to store

    def answer(self):
        length = int(self.headers["Content-Length"] or 0)
        self.rfile.read(length)
        if self.command == "PUT":
            self.stored.append(self.path.rpartition("/")[2])
        if self.slow in self.path:
            time.sleep(self.seconds)
        run_id = f"at-{self.server.server_port}"  # MLflow's client remembers the server of a run's artifacts
        info = {
            "run_id": run_id,
            "experiment_id": "1",
            "artifact_uri": f"mlflow-artifacts:/1/{run_id}/artifacts",
        }
        answer = {"experiment": {"experiment_id": "1"}, "run": {"info": info}, "run_info": info}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_GET = do_POST = do_PUT = answer  # noqa: N815 (names of http.server)

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    """Of a `Server`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def nowhere():
    """Address at which nothing answers."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{closed.getsockname()[1]}"


def client(settings, output_dir):
    return mlflow.MlflowClient(tracking_uri(settings, output_dir))


def report_in(folder):
    (folder / "report").mkdir()
    (folder / "report" / "report.html").write_text("<p>")
    return folder / "report"


def write_metrics(tracker, steps):
    for step in steps:
        done = {"tokens": step * 100, "training_flops": step * 1e6}
        tracker.log(step, done | {"train/loss": 1.0 / step})


def test_a_run_hangs_under_its_parent_with_both_axes(store, tmp_path):
    settings, output_dir = store
    params = {"model": {"type": "mod"}, "data": {"long": "x" * 9000}}
    tracker = RunTracker(tmp_path, settings, output_dir, "mod-seed0", params, {"seed": "0"})
    write_metrics(tracker, range(1, 6))
    tracker.close(finished=True)
    run = client(*store).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.type"] == "mod"
    history = client(*store).get_metric_history(tracker.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(s * 100, 1 / s) for s in range(1, 6)]
    flops = client(*store).get_metric_history(tracker.run_id, "progress/training_flops")
    assert [m.value for m in flops] == [s * 1e6 for s in range(1, 6)]
    track_comparison(settings, output_dir, "comparison", [tracker.run_id], report_in(tmp_path))
    parent = client(*store).get_run(tracker.run_id).data.tags["mlflow.parentRunId"]
    assert client(*store).get_run(parent).info.status == "FINISHED"
    assert [a.path for a in client(*store).list_artifacts(parent, "report")] == ["report/report.html"]


def test_a_run_that_a_task_was_given_is_used(store, tmp_path, monkeypatch):
    settings, output_dir = store
    experiment = client(*store).create_experiment("of KFP", artifact_location=tmp_path.as_uri())
    given = [client(*store).create_run(experiment, run_name=name).info.run_id for name in ("task", "compare")]
    monkeypatch.setenv("MLFLOW_RUN_ID", given[0])
    tags = {"architecture": "mod", "seed": "0"}
    tracker = RunTracker(tmp_path, settings, output_dir, "mod-seed0", {"a": 1}, tags)
    write_metrics(tracker, [1])
    tracker.log_final(100, {"test/loss": 1.0}, "this")
    tracker.close(finished=False)
    assert tracker.run_id == given[0]
    assert client(*store).get_run(given[0]).data.params == {"a": "1"}
    monkeypatch.setenv("MLFLOW_RUN_ID", given[1])
    assert RunTracker(tmp_path, settings, output_dir).run_id == given[0]  # a later step stays with the run
    assert find_evaluated(settings, output_dir, "this") == {"mod:0": given[0]}
    track_comparison(settings, output_dir, "comparison", [given[0]], report_in(tmp_path))
    assert [a.path for a in client(*store).list_artifacts(given[1], "report")] == ["report/report.html"]
    assert client(*store).get_run(given[1]).info.status == "RUNNING"  # its owner ends it
    assert "mlflow.parentRunId" not in client(*store).get_run(given[0]).data.tags


def test_a_run_that_another_server_gave_is_not_used(store, tmp_path, monkeypatch):
    settings, output_dir = store
    settings.mlflow_uri = f"sqlite:///{tmp_path}/ours.db"
    theirs = f"sqlite:///{tmp_path}/theirs.db"
    given = mlflow.MlflowClient(theirs).create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", theirs)
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    tags = {"architecture": "mod", "seed": "0"}
    tracker = RunTracker(tmp_path, settings, output_dir, "mod-seed0", tags=tags)
    tracker.log_final(100, {"test/loss": 1.0}, "this")
    assert tracker.run_id not in (None, given)
    assert find_evaluated(settings, output_dir, "this") == {"mod:0": tracker.run_id}
    track_comparison(settings, output_dir, "comparison", [tracker.run_id], report_in(tmp_path))
    parent = client(*store).get_run(tracker.run_id).data.tags["mlflow.parentRunId"]
    assert [a.path for a in client(*store).list_artifacts(parent, "report")] == ["report/report.html"]


def test_a_run_that_could_not_be_described_is_not_made_again(store, tmp_path, monkeypatch):
    settings, output_dir = store
    log_batch = mlflow.MlflowClient.log_batch
    calls = []

    def fail_at_first(self, *arguments, **values):
        calls.append(values)
        if len(calls) == 1:
            raise ConnectionError("away")
        log_batch(self, *arguments, **values)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", fail_at_first)
    first = RunTracker(tmp_path, settings, output_dir, "a", {"x": 1}, {"seed": "0"})
    assert not first.sync()
    later = RunTracker(tmp_path, settings, output_dir)
    assert later.sync() and later.run_id == first.run_id
    experiment = client(*store).get_experiment_by_name("test").experiment_id
    (run,) = client(*store).search_runs([experiment])
    assert run.data.params == {"x": "1"} and run.data.tags["seed"] == "0"
    described = len(calls)
    assert later.sync() and len(calls) == described


def test_an_interrupted_run_does_not_repeat_itself_in_the_run_it_was_given(store, tmp_path, monkeypatch):
    settings, output_dir = store
    RunTracker(tmp_path / "other", settings, output_dir, "makes the experiment").sync()
    experiment = client(*store).get_experiment_by_name("test").experiment_id
    monkeypatch.setenv("MLFLOW_RUN_ID", client(*store).create_run(experiment).info.run_id)
    first = RunTracker(tmp_path, settings, output_dir, "a")
    write_metrics(first, [1, 2, 3])
    first.close(finished=False)
    forget_after(tmp_path, 1)
    again = RunTracker(tmp_path, settings, output_dir, "a")
    write_metrics(again, [2])
    again.close(finished=False)
    assert again.run_id != first.run_id
    history = client(*store).get_metric_history(again.run_id, "train/loss")
    assert [m.step for m in history] == [100, 200]


def test_what_was_evaluated_is_found_again_by_its_comparison(store, tmp_path):
    settings, output_dir = store
    for place, (seed, comparison) in enumerate([(0, "this"), (0, "this"), (1, "this"), (2, "other")]):
        folder = tmp_path / str(place)
        folder.mkdir()
        tags = {"architecture": "mod", "seed": str(seed)}
        tracker = RunTracker(folder, settings, output_dir, f"{place}", tags=tags)
        write_metrics(tracker, [1])
        tracker.log_artifacts(report_in(folder), "evaluation")
        tracker.log_final(100, {"test/loss": 1.0}, comparison)
        tracker.close(finished=True)
    found = find_evaluated(settings, output_dir, "this")
    assert set(found) == {"mod:0", "mod:1"}
    assert client(*store).get_run(found["mod:0"]).info.run_name == "1"  # the newest
    copied = download(settings, output_dir, found["mod:1"], "evaluation", tmp_path / "copies")
    assert (copied / "report.html").read_text() == "<p>"
    with pytest.raises(UserError, match="MLflow: nothing of run"):
        download(settings, output_dir, found["mod:1"], "nothing", tmp_path / "copies")


def test_a_model_may_take_longer_to_store_than_a_metric(address, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    settings = TrackingSettings(mlflow_uri=f"http://{address}")
    tracker = RunTracker(tmp_path, settings, tmp_path, "a")
    assert tracker.log_artifacts(report_in(tmp_path), "model", large=True)
    run_id = tracker.run_id
    assert download(settings, tmp_path, run_id, "model/report.html", tmp_path / "copies").is_file()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"


def track_evaluation(tracker):
    """Attach what steps leave in the run folder."""
    for file in ("config.yaml", "manifest.json", "evaluation/evaluation.json", "model/weights"):
        (tracker.run_dir / file).parent.mkdir(exist_ok=True)
        (tracker.run_dir / file).write_text("{}")
    result = {"training_tokens": 1, "eval": {"loss": 1.0, "bits_per_byte": 1.0}, "bench": {}}
    result["efficiency"] = {"forward_flops_per_token": 1}
    track(tracker, tracker.run_dir / "model", tracker.run_dir / "evaluation", result, "this")


SMALL = ["config.yaml", "manifest.json", "evaluation.json"]


@pytest.mark.parametrize(
    ("stuck", "tried"), [("config", SMALL[:1]), ("evaluation", SMALL), ("model", [*SMALL, "weights"])]
)
def test_once_a_file_does_not_get_through_no_other_is_tried(address, tmp_path, monkeypatch, stuck, tried):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    # Where a small file is given as long as a large one, it gets through.
    monkeypatch.setattr("dynamic_transformers.tracking.FILE_TIMEOUT", 2)
    monkeypatch.setattr(Server, "slow", f"artifacts/{stuck}")
    monkeypatch.setattr(Server, "seconds", 4 if stuck == "model" else 1.5)
    monkeypatch.setattr(Server, "stored", stored := [])
    track_evaluation(RunTracker(tmp_path, TrackingSettings(mlflow_uri=f"http://{address}"), tmp_path, "a"))
    assert stored == tried


@pytest.mark.parametrize("lost", ["evaluation", "model", None])
def test_only_what_has_arrived_can_be_found(store, tmp_path, monkeypatch, lost):
    def log_artifacts(self, run_id, local_dir, artifact_path):
        if artifact_path == lost:
            raise ConnectionError("away")

    settings, output_dir = store
    monkeypatch.setattr(mlflow.MlflowClient, "log_artifacts", log_artifacts)
    tracker = RunTracker(tmp_path, settings, output_dir, "a", tags={"architecture": "mod", "seed": "0"})
    track_evaluation(tracker)
    assert client(*store).get_run(tracker.run_id).data.metrics["test/loss"] == 1.0
    assert set(find_evaluated(settings, output_dir, "this")) == (set() if lost else {"mod:0"})


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


def test_an_outage_neither_stops_nor_slows_and_is_made_up_for(store, nowhere, tmp_path, caplog):
    settings, output_dir = store
    gone = TrackingSettings(experiment="test", mlflow_uri=f"http://{nowhere}")
    track_comparison(gone, output_dir, "comparison", [], report_in(tmp_path))
    assert "the report was not logged" in caplog.text
    with pytest.raises(UserError, match="MLflow"):
        find_evaluated(gone, output_dir, "any")
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


def test_a_password_in_the_uri_is_shown_nowhere(
    store, address, nowhere, tmp_path, monkeypatch, capfd, caplog
):
    settings, output_dir = store
    log = tmp_path / "step"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:sesame@tulip@{nowhere}")
    with pytest.raises(SystemExit), step_log(log):
        track_comparison(settings, output_dir, "comparison", [], report_in(tmp_path))
        assert not RunTracker(tmp_path, settings, output_dir, "a").sync()
        with pytest.raises(UserError, match="MLflow: model of run one"):
            download(settings, output_dir, "one", "model", tmp_path)
        find_evaluated(settings, output_dir, "any")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:sesame@{address}")
    RunTracker(tmp_path, settings, output_dir, "a").close(finished=True)
    shown = "".join([caplog.text, log.with_name("step.log").read_text(), *capfd.readouterr()])
    assert "http://***@127" in shown and "sesame" not in shown and "tulip" not in shown


def test_switched_off_nothing_is_made(tmp_path):
    settings = TrackingSettings(mlflow=False)
    tracker = RunTracker(tmp_path, settings, tmp_path / "outputs", "a")
    write_metrics(tracker, [1])
    tracker.close(finished=True)
    track_comparison(settings, tmp_path / "outputs", "c", [], tmp_path)
    assert find_evaluated(settings, tmp_path / "outputs", "any") == {}
    assert not (tmp_path / "outputs").exists()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train/loss"] == 1.0
