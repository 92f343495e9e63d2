"""A run as MLflow shows it: a SQLite store, and a server that is away."""

import json
import os
import shutil
import time

import mlflow
import pytest
from runs import DATA
from servers import SlowServer

from dynamic_transformers.evaluation.evaluate import track
from dynamic_transformers.settings import TrackingSettings, UserError
from dynamic_transformers.step_log import step_log
from dynamic_transformers.tracking import (
    ComparedRun,
    RunTracker,
    download,
    find_evaluated,
    forget_after,
    replace_run,
    track_comparison,
    tracking_uri,
    view_of,
)


def client(settings, output_dir):
    return mlflow.MlflowClient(tracking_uri(settings, output_dir))


def report_in(folder):
    (folder / "report").mkdir()
    (folder / "report" / "report.html").write_text("<p>")
    return folder / "report"


def shown(run_id):
    return ComparedRun(run_id, "mod", "#0072b2", 500, {"efficiency/kv_bytes_per_token": 64})


def write_metrics(tracker, steps):
    for step in steps:
        done = {"tokens": step * 100, "training_flops": step * 1e6}
        tracker.log(step, done | {"train/loss": 1.0 / step})


def test_a_run_has_both_axes_and_is_shown_in_the_view_of_its_report(store, tmp_path):
    settings, output_dir = store
    params = {"model": {"type": "mod"}, "data": {"long": "x" * 9000}}
    tracker = RunTracker(tmp_path, settings, output_dir, "mod-seed0", params, {"seed": "0"})
    write_metrics(tracker, range(1, 6))
    tracker.close("FINISHED")
    run = client(*store).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.type"] == "mod"
    history = client(*store).get_metric_history(tracker.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(s * 100, 1 / s) for s in range(1, 6)]
    flops = client(*store).get_metric_history(tracker.run_id, "progress/training_flops")
    assert [m.value for m in flops] == [s * 1e6 for s in range(1, 6)]
    track_comparison(settings, output_dir, "comparison", [shown(tracker.run_id)], report_in(tmp_path))
    run = client(*store).get_run(tracker.run_id)
    assert (run.info.run_name, run.data.tags["mlflow.runColor"]) == ("mod", "#0072b2")
    assert run.data.metrics["efficiency/kv_bytes_per_token"] == 64
    assert "mlflow.parentRunId" not in run.data.tags  # the pages fold away what hangs under another
    report = client(*store).get_run(run.data.tags["report"])
    assert report.info.status == "FINISHED" and report.data.tags["kind"] == "report"
    assert [a.path for a in client(*store).list_artifacts(report.info.run_id, "report")] == [
        "report/report.html"
    ]
    link = f"#/experiments/{run.info.experiment_id}/runs?compareRunsMode=CHART&viewStateShareKey="
    assert view_of(*store) == view_of(*store, report.info.run_id) == link + report.info.run_id
    experiment = client(*store).get_experiment(run.info.experiment_id)
    assert json.loads(experiment.tags[f"mlflow.sharedViewState.{report.info.run_id}"])["name"] == "comparison"


def test_a_run_that_a_task_was_given_is_used(store, tmp_path, monkeypatch):
    settings, output_dir = store
    experiment = client(*store).create_experiment("of KFP", artifact_location=tmp_path.as_uri())
    given = [client(*store).create_run(experiment, run_name=name).info.run_id for name in ("task", "compare")]
    monkeypatch.setenv("MLFLOW_RUN_ID", given[0])
    tags = {"run": "mod-seed0"}
    tracker = RunTracker(tmp_path, settings, output_dir, "mod-seed0", {"a": 1}, tags)
    write_metrics(tracker, [1])
    tracker.log_final(100, {"test/loss": 1.0})
    tracker.log_comparison("this")
    tracker.close(None)
    assert tracker.run_id == given[0]
    assert client(*store).get_run(given[0]).data.params == {"a": "1"}
    monkeypatch.setenv("MLFLOW_RUN_ID", given[1])
    assert RunTracker(tmp_path, settings, output_dir).run_id == given[0]  # a later step stays with the run
    assert find_evaluated(settings, output_dir, "this") == {"mod-seed0": given[0]}
    track_comparison(settings, output_dir, "comparison", [shown(given[0])], report_in(tmp_path))
    assert [a.path for a in client(*store).list_artifacts(given[1], "report")] == ["report/report.html"]
    assert client(*store).get_run(given[1]).info.status == "RUNNING"  # its owner ends it
    assert "mlflow.parentRunId" not in client(*store).get_run(given[0]).data.tags


def test_a_run_that_another_server_gave_is_not_used(store, tmp_path, monkeypatch, empty_database):
    settings, output_dir = store
    for name in ("ours", "theirs"):
        shutil.copy(empty_database, tmp_path / f"{name}.db")
    settings.mlflow_uri = f"sqlite:///{tmp_path}/ours.db"
    theirs = f"sqlite:///{tmp_path}/theirs.db"
    given = mlflow.MlflowClient(theirs).create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", theirs)
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    tags = {"run": "mod-seed0"}
    tracker = RunTracker(tmp_path, settings, output_dir, "mod-seed0", tags=tags)
    tracker.log_final(100, {"test/loss": 1.0})
    tracker.log_comparison("this")
    assert tracker.close("FINISHED")
    assert tracker.run_id not in (None, given)
    assert find_evaluated(settings, output_dir, "this") == {"mod-seed0": tracker.run_id}
    track_comparison(settings, output_dir, "comparison", [shown(tracker.run_id)], report_in(tmp_path))
    report = client(*store).get_run(tracker.run_id).data.tags["report"]
    assert [a.path for a in client(*store).list_artifacts(report, "report")] == ["report/report.html"]


def runs_of(store):
    experiment = client(*store).get_experiment_by_name("test").experiment_id
    return client(*store).search_runs([experiment])


@pytest.mark.parametrize("lost", ["create_run", "log_batch"])
def test_a_run_is_not_made_twice_whatever_answer_was_lost(store, tmp_path, monkeypatch, lost):
    settings, output_dir = store
    real = getattr(mlflow.MlflowClient, lost)
    calls = []

    def answer_lost_at_first(self, *arguments, **values):
        result = real(self, *arguments, **values)
        calls.append(values)
        if len(calls) == 1:
            raise ConnectionError("away")
        return result

    monkeypatch.setattr(mlflow.MlflowClient, lost, answer_lost_at_first)
    first = RunTracker(tmp_path, settings, output_dir, "a", {"x": 1}, {"seed": "0"})
    first.close("FINISHED")
    later = RunTracker(tmp_path, settings, output_dir)
    assert later.sync()
    (run,) = runs_of(store)
    assert run.info.run_id == later.run_id and run.info.run_name == "a"
    assert run.data.params == {"x": "1"} and run.data.tags["seed"] == "0"
    described = len(calls)
    assert later.sync() and len(calls) == described


@pytest.mark.parametrize("given", [False, True])
def test_a_resumed_run_goes_on_in_its_own_mlflow_run(store, tmp_path, monkeypatch, given):
    settings, output_dir = store
    if given:
        experiment = client(*store).create_experiment("of KFP", artifact_location=tmp_path.as_uri())
        monkeypatch.setenv("MLFLOW_RUN_ID", client(*store).create_run(experiment).info.run_id)
    first = RunTracker(tmp_path, settings, output_dir, "a")
    write_metrics(first, [1, 2, 3])
    assert first.close("KILLED")
    assert client(*store).get_run(first.run_id).info.status == "KILLED"
    forget_after(tmp_path, 1)
    again = RunTracker(tmp_path, settings, output_dir, "a")
    assert again.sync() and client(*store).get_run(first.run_id).info.status == "RUNNING"
    write_metrics(again, [2, 3])
    again.log(3, {"tokens": 300, "eval/loss": 0.5})  # which the first had not got to
    write_metrics(again, [4])
    assert again.close("FINISHED") and again.run_id == first.run_id
    steps = {
        key: [m.step for m in client(*store).get_metric_history(first.run_id, key)]
        for key in ("train/loss", "eval/loss", "progress/training_flops")
    }
    assert steps["train/loss"] == steps["progress/training_flops"] == [100, 200, 300, 400]
    assert steps["eval/loss"] == [300]
    assert client(*store).get_run(first.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("ended", [None, "FINISHED", "FAILED"])
@pytest.mark.parametrize("given", [False, True])
def test_a_run_that_was_replaced_is_marked_and_ended(store, run_dir, monkeypatch, ended, given):
    settings, output_dir = store
    if given:
        experiment = client(*store).create_experiment("of KFP", artifact_location=run_dir.as_uri())
        monkeypatch.setenv("MLFLOW_RUN_ID", client(*store).create_run(experiment).info.run_id)
    first = RunTracker(run_dir, settings, output_dir, "a", {"lr": 1})
    write_metrics(first, [1, 2])
    assert first.close(ended)  # None: as `kill -9` leaves it
    aside = run_dir.rename(output_dir / "run.replaced")
    run_dir.mkdir()
    replace_run(aside, run_dir)
    again = RunTracker(run_dir, settings, output_dir, "a", {"lr": 2})
    write_metrics(again, [1])
    assert again.close("FINISHED") and again.run_id != first.run_id
    old, new = (client(*store).get_run(run.run_id) for run in (first, again))
    assert old.info.status == (ended or "KILLED") and old.data.tags["replaced_by"] == again.run_id
    assert new.data.params["lr"] == "2" and "replaced_by" not in new.data.tags
    assert [m.step for m in client(*store).get_metric_history(again.run_id, "train/loss")] == [100]


def test_runs_that_were_replaced_in_an_outage_stay_owed(store, nowhere, run_dir):
    settings, output_dir = store
    away = TrackingSettings(experiment="test", mlflow_uri=f"http://{nowhere}")
    first = RunTracker(run_dir, settings, output_dir, "a")
    assert first.close("FINISHED")
    for number in (1, 2):
        aside = run_dir.rename(output_dir / f"run.replaced-{number}")
        run_dir.mkdir()
        replace_run(aside, run_dir)
        again = RunTracker(run_dir, away, output_dir, "a")
        again.sender.stop()
        again.file.frozen = True
    last = RunTracker(run_dir, settings, output_dir, "a")
    assert last.close("FINISHED")
    assert client(*store).get_run(first.run_id).data.tags["replaced_by"] == last.run_id


def test_a_parameter_that_is_there_with_another_value_keeps_it(store, run_dir, monkeypatch, caplog):
    settings, output_dir = store
    real = mlflow.MlflowClient.log_batch

    def answer_lost(self, *arguments, **values):
        real(self, *arguments, **values)
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_batch", answer_lost)
        first = RunTracker(run_dir, settings, output_dir, "a", {"x": 1, "log_every": 1}, {"seed": "0"})
        assert not first.close("KILLED")
    again = RunTracker(run_dir, settings, output_dir, "a", {"x": 1, "log_every": 2, "y": 3}, {"seed": "0"})
    write_metrics(again, [1])
    assert again.close("FINISHED")
    (run,) = runs_of(store)
    assert run.data.params == {"x": "1", "log_every": "1", "y": "3"}
    assert run.data.tags["changed.log_every"] == "2" and "changed.x" not in run.data.tags
    assert run.info.status == "FINISHED" and run.data.metrics["train/loss"] == 1.0
    (line,) = [line for line in caplog.messages if "other values" in line]
    assert run.info.run_id in line and "log_every" in line


def test_a_store_that_does_not_know_the_run_gets_all_of_it(store, run_dir, empty_database):
    settings, output_dir = store
    first = RunTracker(run_dir, settings, output_dir, "a", {"x": 1})
    first.log_data(run_dir, DATA)
    write_metrics(first, [1, 2])
    assert first.close("FINISHED")
    other = output_dir.parent / "other"
    other.mkdir()
    shutil.copy(empty_database, other / "mlflow.db")
    assert RunTracker(run_dir, settings, other).close(None)
    (run,) = runs_of((settings, other))
    assert run.info.status == "FINISHED" and run.data.params == {"x": "1"}
    assert len(run.inputs.dataset_inputs) == 2
    history = client(settings, other).get_metric_history(run.info.run_id, "train/loss")
    assert [m.step for m in history] == [100, 200]


def test_the_data_are_an_input_once_over_resumes(store, run_dir):
    for _ in range(2):
        tracker = RunTracker(run_dir, *store, "a")
        tracker.log_data(run_dir, DATA)
        assert tracker.close("KILLED")
    assert len(tracker.file.record.attachments) == 2
    inputs = client(*store).get_run(tracker.run_id).inputs.dataset_inputs
    assert [entry.dataset.name for entry in inputs] == ["web", "web"]  # a mixture of one source, and that
    assert inputs[0].dataset.digest == DATA["content_digest"][:36]


def test_the_log_is_not_read_anew_at_each_line(store, run_dir):
    tracker = RunTracker(run_dir, *store, "a")
    write_metrics(tracker, range(1, 11))
    assert tracker.sync()
    log = run_dir / "metrics.jsonl"
    log.write_bytes(b"?" * (log.stat().st_size - 1) + b"\n")  # whoever reads that again fails
    write_metrics(tracker, [11])
    assert tracker.close("FINISHED")
    history = client(*store).get_metric_history(tracker.run_id, "train/loss")
    assert [m.step for m in history] == [step * 100 for step in range(1, 12)]


def test_half_a_line_waits_for_its_end(store, run_dir):
    tracker = RunTracker(run_dir, *store, "a")
    write_metrics(tracker, [1, 2])
    log = run_dir / "metrics.jsonl"
    whole = log.read_bytes()
    tracker.sync()
    with log.open("ab") as file:
        file.write(b'{"step": 3, "time": 1e10, "toke')
    assert tracker.sync()
    with log.open("ab") as file:
        file.write(b'ns": 300, "train/loss": 0.5}\n')
    assert tracker.close("FINISHED") and log.stat().st_size > len(whole)
    history = client(*store).get_metric_history(tracker.run_id, "train/loss")
    assert [m.step for m in history] == [100, 200, 300]


def test_what_was_evaluated_is_found_again_by_its_comparison(store, tmp_path):
    settings, output_dir = store
    for place, (seed, comparison) in enumerate([(0, "this"), (0, "this"), (1, "this"), (2, "other")]):
        folder = tmp_path / str(place)
        folder.mkdir()
        tags = {"run": f"mod-seed{seed}"}
        tracker = RunTracker(folder, settings, output_dir, f"{place}", tags=tags)
        write_metrics(tracker, [1])
        tracker.log_artifacts(report_in(folder), "evaluation")
        tracker.log_final(100, {"test/loss": 1.0})
        tracker.log_comparison(comparison)
        assert tracker.close("FINISHED")
    found = find_evaluated(settings, output_dir, "this")
    assert set(found) == {"mod-seed0", "mod-seed1"}
    assert client(*store).get_run(found["mod-seed0"]).info.run_name == "1"  # the newest
    copied = download(settings, output_dir, found["mod-seed1"], "evaluation", tmp_path / "copies")
    assert (copied / "report.html").read_text() == "<p>"
    with pytest.raises(UserError, match="MLflow: nothing of run"):
        download(settings, output_dir, found["mod-seed1"], "nothing", tmp_path / "copies")


def test_a_model_may_take_longer_to_store_than_a_metric(address, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    settings = TrackingSettings(mlflow_uri=f"http://{address}")
    tracker = RunTracker(tmp_path, settings, tmp_path, "a")
    tracker.log_artifacts(report_in(tmp_path), "model", large=True)
    assert tracker.close("FINISHED")
    assert download(settings, tmp_path, tracker.run_id, "model/report.html", tmp_path / "copies").is_file()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"


def track_evaluation(tracker):
    """Attach what steps leave in the run folder."""
    for file in ("config.yaml", "manifest.json", "evaluation/evaluation.json", "model/weights"):
        (tracker.run_dir / file).parent.mkdir(exist_ok=True)
        (tracker.run_dir / file).write_text("{}")
    result = {"training_tokens": 1, "bench": {}}
    result["eval"] = {"loss": 1.0, "bits_per_byte": 1.0, "domains": {}}
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
    monkeypatch.setattr("dynamic_transformers.tracking.store.FILE_TIMEOUT", 2)
    monkeypatch.setattr(SlowServer, "slow", f"artifacts/{stuck}")
    monkeypatch.setattr(SlowServer, "seconds", 4 if stuck == "model" else 1.5)
    monkeypatch.setattr(SlowServer, "stored", stored := [])
    track_evaluation(RunTracker(tmp_path, TrackingSettings(mlflow_uri=f"http://{address}"), tmp_path, "a"))
    assert list(dict.fromkeys(stored)) == tried


@pytest.mark.parametrize("lost", ["evaluation", "model", None])
def test_only_what_has_arrived_can_be_found(store, tmp_path, monkeypatch, lost):
    def log_artifacts(self, run_id, local_dir, artifact_path):
        if artifact_path == lost:
            raise ConnectionError("away")

    settings, output_dir = store
    monkeypatch.setattr(mlflow.MlflowClient, "log_artifacts", log_artifacts)
    tracker = RunTracker(tmp_path, settings, output_dir, "a", tags={"run": "mod-seed0"})
    track_evaluation(tracker)
    assert client(*store).get_run(tracker.run_id).data.metrics["test/loss"] == 1.0
    assert set(find_evaluated(settings, output_dir, "this")) == (set() if lost else {"mod-seed0"})
    monkeypatch.undo()
    assert RunTracker(tmp_path, settings, output_dir).sync()
    assert set(find_evaluated(settings, output_dir, "this")) == {"mod-seed0"}


def test_lines_are_sent_once_also_by_a_later_step(store, tmp_path):
    settings, output_dir = store
    first = RunTracker(tmp_path, settings, output_dir, "a")
    write_metrics(first, [1, 2])
    first.close(None)
    later = RunTracker(tmp_path, settings, output_dir)
    assert later.run_id == first.run_id
    write_metrics(later, [3])
    later.close("FINISHED")
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
    tracker.log_data(tmp_path, DATA)
    start = time.perf_counter()
    write_metrics(tracker, range(1, 251))
    assert time.perf_counter() - start < 1
    assert not tracker.close("FINISHED")
    assert tracker.run_id is None
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 250
    back = RunTracker(tmp_path, settings, output_dir)
    assert back.sync()
    run = client(*store).get_run(back.run_id)
    assert run.info.status == "FINISHED" and run.data.params == {"x": "1"} and run.inputs.dataset_inputs
    assert len(client(*store).get_metric_history(back.run_id, "train/loss")) == 250


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
    RunTracker(tmp_path, settings, output_dir, "a").close("FINISHED")
    shown = "".join([caplog.text, log.with_name("step.log").read_text(), *capfd.readouterr()])
    assert "http://***@127" in shown and "sesame" not in shown and "tulip" not in shown


def test_switched_off_nothing_is_made(tmp_path):
    settings = TrackingSettings(mlflow=False)
    tracker = RunTracker(tmp_path, settings, tmp_path / "outputs", "a")
    write_metrics(tracker, [1])
    tracker.close("FINISHED")
    track_comparison(settings, tmp_path / "outputs", "c", [], tmp_path)
    assert find_evaluated(settings, tmp_path / "outputs", "any") == {}
    assert not (tmp_path / "outputs").exists()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train/loss"] == 1.0
