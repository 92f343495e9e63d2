"""`python -m pipelines.run`, as `make quickstart` calls it, at a micro size."""

import json
import os
import subprocess
import sys

import mlflow
import pytest

from dynamic_transformers.settings import PROJECT_ROOT


def run_pipeline(output_dir, architectures, *arguments, **variables):
    command = [sys.executable, "-m", "pipelines.run", f"run.output_dir={output_dir}"]
    command += ["--architectures", architectures]
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    return subprocess.run(
        [*command, "training.max_flops=2.0e9", *arguments],
        cwd=PROJECT_ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, micro_overrides):
    output_dir = tmp_path_factory.mktemp("outputs")
    commits = tmp_path_factory.mktemp("commits")
    (commits / "git").write_text("#!/bin/sh\ndate +%s%N\n")  # somebody commits all the time
    (commits / "git").chmod(0o755)
    variables = {"PATH": f"{commits}:{os.environ['PATH']}", "MLFLOW_TRACKING_URI": ""}
    result = run_pipeline(output_dir, "sdt", "--seeds", "1", *micro_overrides, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return output_dir, result.stdout


def test_it_prints_table_report_and_mlflow_command(finished):
    output_dir, stdout = finished
    assert "SDT" in stdout and "unigram" in stdout
    assert str(output_dir / "quickstart" / "report" / "report.html") in stdout
    assert f"mlflow ui --backend-store-uri sqlite:///{output_dir}/mlflow.db" in stdout


def test_comparison_json_keeps_its_contract(finished):
    report = finished[0] / "quickstart" / "report"
    comparison = json.loads((report / "comparison.json").read_text())
    assert comparison["schema_version"] == 1
    (run,) = comparison["runs"]
    assert (run["architecture"], run["seed"]) == ("sdt", 1)
    assert run["training_flops"] == pytest.approx(2e9, rel=0.05)
    assert run["eval"]["causal"] is True and run["eval"]["loss"] > 0
    assert {"dt_arithmetic", "dt_cloze"} <= set(run["bench"])
    assert run["efficiency"]["prefill_tokens_per_second"] > 0
    assert set(run["efficiency"]["routed_fraction"]) == {"1", "3"}
    assert (PROJECT_ROOT / run["model_dir"] / "model.safetensors").is_file()
    assert (report / "report.html").stat().st_size > 10_000


def test_every_step_leaves_its_log(finished):
    logs = finished[0] / "quickstart" / "logs"
    names = {path.stem for path in logs.glob("*.log")}
    loop = {f"{step}-sdt-seed1" for step in ("train", "export", "evaluate")}
    assert names == loop | {"configure", "prepare-data", "compare", "pipeline"}
    assert "step" in (logs / "train-sdt-seed1.log").read_text()


def test_all_steps_are_of_one_revision(finished):
    manifests = [json.loads(path.read_text()) for path in finished[0].rglob("manifest.json")]
    assert {manifest["step"] for manifest in manifests} >= {"prepare_data", "train", "evaluate", "compare"}
    assert len({manifest["git_revision"] for manifest in manifests}) == 1


def test_mlflow_has_the_run_under_its_parent(finished):
    client = mlflow.MlflowClient(f"sqlite:///{finished[0]}/mlflow.db")
    experiment = client.get_experiment_by_name("dynamic-transformers")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"quickstart", "sdt-seed1"}
    assert all(run.info.status == "FINISHED" for run in runs.values())
    parent, child = runs["quickstart"].info.run_id, runs["sdt-seed1"]
    assert child.data.tags["mlflow.parentRunId"] == parent
    wanted = {"train/loss", "eval/loss", "test/loss", "efficiency/forward_flops_per_token"}
    assert wanted <= set(child.data.metrics)
    artifacts = {artifact.path for artifact in client.list_artifacts(parent, "report")}
    assert {"report/report.html", "report/comparison.json"} <= artifacts
    assert {"config", "evaluation", "model"} <= {a.path for a in client.list_artifacts(child.info.run_id)}


def test_a_failing_step_fails_the_run_and_shows_why(tmp_path, micro_overrides):
    sources = "data.dataset_configs=[{name: gone, path: json, data_files: /nowhere/gone.jsonl}]"
    result = run_pipeline(tmp_path, "standard", *micro_overrides, sources)
    assert result.returncode == 2
    assert "/nowhere/gone.jsonl" in result.stdout
    assert "prepare-data" in result.stderr and "Traceback" not in result.stdout + result.stderr
    assert "gone.jsonl" in (tmp_path / "quickstart" / "logs" / "prepare-data.log").read_text()


def test_what_finished_of_a_failed_pipeline_is_compared(tmp_path, micro_overrides):
    # Only STT refuses a predictor beside its student.
    result = run_pipeline(tmp_path, "mod,stt", *micro_overrides, "model.predictor_weight=0.01")
    assert result.returncode == 2
    assert "the pipeline failed" in result.stderr and "STT's student is its predictor" in result.stdout
    report = tmp_path / "quickstart" / "report"
    (run,) = json.loads((report / "comparison.json").read_text())["runs"]
    assert run["architecture"] == "mod" and run["efficiency"]["prefill_tokens_per_second"] > 0
    assert "without stt:0" in (report / "report.html").read_text()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("dynamic-transformers")
    runs = {entry.info.run_name: entry for entry in client.search_runs([experiment.experiment_id])}
    parent = runs["quickstart-unfinished"].info.run_id
    assert runs["mod-seed0"].data.tags["mlflow.parentRunId"] == parent
    assert "report/report.html" in {artifact.path for artifact in client.list_artifacts(parent, "report")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("transformer",), "architectures=transformer: must be one of"),
        (("mod", "--seeds", "x"), "--seeds x: must be whole numbers"),
        (("mod,mod",), "architectures and seeds: name at least one"),
    ],
)
def test_a_wrong_run_is_refused_before_anything_starts(arguments, message, tmp_path):
    result = run_pipeline(tmp_path, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())
