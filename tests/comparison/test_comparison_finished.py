"""The exit handler's step after every kind of end. MLflow and the report are real; speed is not measured."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
from kfp import dsl
from kfp.dsl import PipelineTaskFinalStatus
from synthetic_evaluations import make_run, write_run

from components.compare import compare as compare_component
from components.report_finished import report_finished
from dynamic_transformers.comparison.compare import compare
from dynamic_transformers.comparison.tracked import track_report
from dynamic_transformers.evaluation.evaluate import comparison_of
from dynamic_transformers.settings import TrackingSettings
from dynamic_transformers.tracking import RunTracker

RUNS = ("mod-seed0", "stt-seed0")


@pytest.fixture(autouse=True)
def no_measurement(monkeypatch):
    # The evaluations hold made-up speeds, the models are none.
    monkeypatch.setattr("dynamic_transformers.comparison.compare.measure", lambda *arguments: None)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


class Pipeline:
    """What a pipeline of `RUNS` leaves in MLflow."""

    def __init__(self, settings, folder, uri):
        settings.tracking = TrackingSettings(mlflow_uri=uri, experiment=folder.name)
        settings.run.output_dir, settings.run.name = str(folder), "pipeline"
        settings.study.baseline = None
        self.settings, self.folder = settings, folder
        self.client = mlflow.MlflowClient(settings.tracking.mlflow_uri)

    def evaluate(self, name, artifacts=("evaluation", "model")):
        """Id of a run that evaluate has seen."""
        architecture, seed = name.split("-seed")
        run_dir = self.folder / architecture
        run_dir.mkdir()
        tags = {"run": f"pipeline-{name}"}
        tracker = RunTracker(run_dir, self.settings.tracking, self.folder, name, tags=tags)
        tracker.sync()
        run = make_run(architecture, int(seed)) | {"mlflow_run_id": tracker.run_id}
        write_run(run_dir / "evaluation", run)
        (run_dir / "model").mkdir()
        (run_dir / "model" / "weights").write_text("none")
        for artifact in artifacts:
            tracker.log_artifacts(run_dir / artifact, artifact)
        tracker.log_final(1, {"test/loss": 1.0})
        tracker.log_comparison(comparison_of(self.settings))
        assert tracker.close("FINISHED")
        return tracker.run_id

    def compare(self):
        report = self.folder / "compare" / "report"
        compare([self.folder / run.split("-")[0] / "evaluation" for run in RUNS], report)
        track_report(self.settings, "pipeline", report)

    def end(self, state):
        """The report of the exit handler's step."""
        report = self.folder / "report-finished" / "report"
        report_finished.python_func(
            status=PipelineTaskFinalStatus(state, "pipeline", "comparison", None, None),
            settings=self.settings.to_json(),
            variants='{"mod": ["model.type=mod"], "stt": ["model.type=stt"]}',
            grid="",
            overrides=[],
            dataset_configs="",
            max_flops=0.0,
            mlflow_uri="",
            mlflow_experiment="",
            report=SimpleNamespace(path=str(report)),
        )
        return report

    def reports(self):
        experiment = self.client.get_experiment_by_name(self.settings.tracking.experiment)
        runs = self.client.search_runs([experiment.experiment_id])
        return {run.info.run_name: run.data.tags.get("report") for run in runs}


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def pipeline(make_settings, tmp_path, uri):
    return Pipeline(make_settings(), tmp_path, uri)


def shown_in(folder):
    """The artifacts that KFP's pages show."""
    return {
        "page": dsl.HTML(uri=str(folder / "page.html")),
        "metrics": dsl.Metrics(uri=str(folder / "metrics")),
    }


def compared(report):
    return [run["architecture"] for run in json.loads((report / "comparison.json").read_text())["runs"]]


def told(report):
    """What a report that compares nothing says; an artifact that is never written is a dead link in KFP."""
    (page,) = report.iterdir()
    return re.search("<p>(.*)</p>", page.read_text())[1]


@pytest.mark.parametrize("state", ["SUCCEEDED", "COMPLETE", "CACHED"])
def test_after_a_success_nothing_is_done(pipeline, state):
    pipeline.evaluate("mod-seed0")
    assert told(pipeline.end(state)) == "All runs have finished: the report is the output of compare."
    assert pipeline.reports() == {"mod-seed0": None}


@pytest.mark.parametrize("state", ["FAILED", "RUNNING"])
def test_what_finished_is_compared_whatever_the_failure_is_called(pipeline, state):
    run_id = pipeline.evaluate("mod-seed0")
    report = pipeline.end(state)
    assert compared(report) == ["mod"]
    assert "(without stt-seed0)" in (report / "report.html").read_text()
    assert set(pipeline.reports()) == {"mod", "pipeline-unfinished report"}
    parent = pipeline.reports()["mod"]
    assert pipeline.client.get_run(run_id).data.tags["report"] == parent
    assert pipeline.client.list_artifacts(parent, "report")


@pytest.mark.parametrize("given", [False, True])
def test_a_success_that_is_not_told_changes_nothing(pipeline, monkeypatch, given):
    for run in RUNS:
        pipeline.evaluate(run)
    if given:
        experiment = pipeline.client.create_experiment(f"{pipeline.folder.name} in KFP")
        task = pipeline.client.create_run(experiment).info.run_id
        monkeypatch.setenv("MLFLOW_TRACKING_URI", pipeline.settings.tracking.mlflow_uri)
        monkeypatch.setenv("MLFLOW_RUN_ID", task)
    pipeline.compare()
    before = pipeline.reports()
    assert told(pipeline.end("RUNNING")).startswith("No comparison: ")
    assert pipeline.reports() == before


def test_when_only_the_comparison_failed_its_report_has_all_runs(pipeline):
    for run in RUNS:
        pipeline.evaluate(run)
    report = pipeline.end("FAILED")
    assert compared(report) == ["mod", "stt"]
    assert "(all runs)" in (report / "report.html").read_text()


def test_a_run_that_lacks_an_artifact_is_missing_alone(pipeline, caplog):
    pipeline.evaluate("mod-seed0", artifacts=["evaluation"])
    pipeline.evaluate("stt-seed0")
    logging.getLogger("dynamic_transformers").addHandler(caplog.handler)
    report = pipeline.end("FAILED")
    assert compared(report) == ["stt"]
    assert "(without mod-seed0)" in (report / "report.html").read_text()
    assert "mod-seed0: cannot be compared (MLflow: model of run" in caplog.text


def test_runs_of_another_revision_are_not_of_this_pipeline(pipeline, monkeypatch):
    monkeypatch.setenv("DYNAMIC_TRANSFORMERS_REVISION", "older")
    pipeline.evaluate("mod-seed0")
    monkeypatch.setenv("DYNAMIC_TRANSFORMERS_REVISION", "this")
    assert told(pipeline.end("FAILED")).startswith("No comparison: ")


def test_without_tracking_it_ends_in_peace(pipeline):
    pipeline.settings.tracking.mlflow = False
    assert told(pipeline.end("RUNNING")).startswith("No comparison: ")


def test_a_comparison_that_is_made_again_is_tracked_once(pipeline):
    for run in RUNS:
        pipeline.evaluate(run)
    folders = [SimpleNamespace(path=str(pipeline.folder / run.split("-")[0] / "evaluation")) for run in RUNS]
    report = SimpleNamespace(path=str(pipeline.folder / "compare" / "report"))
    experiment = pipeline.client.get_experiment_by_name(pipeline.settings.tracking.experiment)
    for _ in range(2):
        compare_component.python_func(
            settings=pipeline.settings.to_json(),
            models=[],
            evaluations=folders,
            report=report,
            **shown_in(pipeline.folder),
        )
        runs = pipeline.client.search_runs([experiment.experiment_id])
        assert sorted(run.info.run_name for run in runs) == ["mod", "pipeline report", "stt"]


def test_compare_opens_no_store_where_tracking_is_off(pipeline, monkeypatch):
    for run in RUNS:
        pipeline.evaluate(run)
    pipeline.settings.tracking.mlflow = False

    opened = []
    monkeypatch.setattr("dynamic_transformers.tracking.search.open_store", opened.append)
    report = SimpleNamespace(path=str(pipeline.folder / "compare" / "report"))
    folders = [SimpleNamespace(path=str(pipeline.folder / run.split("-")[0] / "evaluation")) for run in RUNS]
    for _ in range(2):
        compare_component.python_func(
            settings=pipeline.settings.to_json(),
            models=[],
            evaluations=folders,
            report=report,
            **shown_in(pipeline.folder),
        )
    assert compared(Path(report.path)) == ["mod", "stt"] and opened == []
