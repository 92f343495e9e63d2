"""`python -m pipelines.run`, as `make quickstart` calls it, at a micro size."""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest

from dynamic_transformers.configure import compose_settings
from dynamic_transformers.data.prepare import prepare
from dynamic_transformers.manifest import read_manifest, write_manifest
from dynamic_transformers.settings import PROJECT_ROOT, TrackingSettings
from dynamic_transformers.tracking import view_of
from pipelines.arguments import add_pipeline_arguments, pipeline_arguments
from pipelines.run import execution_identity, execution_of, main


def pipeline_command(output_dir, architectures, *arguments):
    command = [sys.executable, "-m", "pipelines.run", f"run.output_dir={output_dir}"]
    return [*command, "--variants", architectures, "training.max_flops=2.0e9", *arguments]


def environment(**variables):
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MLFLOW_TRACKING_URI", *SET_BY_PIPELINES)
    }
    return kept | variables


def run_pipeline(output_dir, architectures, *arguments, **variables):
    command = pipeline_command(output_dir, architectures, *arguments)
    return subprocess.run(
        command, cwd=PROJECT_ROOT, env=environment(**variables), capture_output=True, text=True
    )


SET_BY_PIPELINES = ("OMP_WAIT_POLICY", "DYNAMIC_TRANSFORMERS_REVISION")  # what a pipeline sets by itself


def processes_of(folder):
    """Command lines of the processes that know of a folder, and their environments."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if str(folder) in (command := (path / "cmdline").read_text()):
                found[command] = (path / "environ").read_text().split("\0")
    return found


def wait_for(condition, process):
    deadline = time.monotonic() + 240
    while not (value := condition()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def ended(tmp_path_factory, micro_overrides):
    """A pipeline that SIGTERM ended in the midst of its training, and what was seen of it."""
    output_dir = tmp_path_factory.mktemp("outputs")
    commits = tmp_path_factory.mktemp("commits")
    (commits / "git").write_text("#!/bin/sh\ndate +%s%N\n")  # somebody commits all the time
    (commits / "git").chmod(0o755)
    variables = environment(PATH=f"{commits}:{os.environ['PATH']}", MLFLOW_TRACKING_URI="")
    # Long enough to be ended in its midst.
    budget = ("training.max_flops=1.0e10", "training.checkpoint_every=5")
    arguments = ("sdt", "--seeds", "1", *micro_overrides, *budget)
    command = pipeline_command(output_dir, *arguments)
    options = dict(cwd=PROJECT_ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = subprocess.Popen(command, **options)
    wait_for(lambda: (output_dir / ".quickstart.lock").exists(), first)
    second = subprocess.run(command, cwd=PROJECT_ROOT, env=variables, capture_output=True, text=True)
    wait_for(lambda: list(output_dir.glob("*/pipeline/*/*/train/**/step-*")), first)
    steps = processes_of(output_dir)
    first.terminate()  # it alone; its steps are in groups of their own
    output, errors = first.communicate(timeout=120)
    left = processes_of(output_dir)
    again = subprocess.run(command, cwd=PROJECT_ROOT, env=variables, capture_output=True, text=True)
    return SimpleNamespace(
        output_dir=output_dir,
        process=first,
        output=output,
        errors=errors,
        second=second,
        steps=steps,
        left=left,
        again=again,
    )


@pytest.fixture(scope="module")
def finished(ended):
    assert ended.again.returncode == 0, ended.again.stdout + ended.again.stderr
    return ended.output_dir, ended.again.stdout


def test_a_signal_ends_the_steps_with_the_pipeline(ended):
    assert ended.process.returncode == 128 + signal.SIGTERM
    assert ended.errors == "ended by SIGTERM; the same command goes on where it stopped\n"
    assert ended.steps and not ended.left
    assert "report-finished" not in ended.output and "Traceback" not in ended.output


def test_steps_wait_without_spinning(ended):
    assert all(
        "OMP_WAIT_POLICY=PASSIVE" in variables
        for command, variables in ended.steps.items()
        if "kfp" in command
    )


def test_a_second_pipeline_of_the_same_name_is_refused_meanwhile(ended):
    folder = ended.output_dir / "quickstart"
    assert ended.second.returncode == 2 and ended.second.stdout == ""
    owner = f"process {ended.process.pid} on {socket.gethostname()}"
    assert ended.second.stderr == (
        f"error: {folder}: {owner} writes there now; wait for its end, or choose another name\n"
    )


def test_begun_again_it_goes_on_from_what_has_finished_and_from_the_checkpoint(ended, finished):
    output_dir, stdout = finished
    (execution,) = (path for path in (output_dir / "quickstart" / "pipeline").iterdir() if path.is_dir())
    assert f"goes on in {execution}; --force begins anew" in stdout
    assert re.search(r"warning: it was begun with \d+-dirty-\S+, and goes on with \d+", ended.again.stderr)
    logs = output_dir / "quickstart" / "logs"
    assert "data is finished" in (logs / "prepare-data.log").read_text()
    assert "going on from" in (logs / "train-sdt-seed1.log").read_text()


def test_it_prints_table_report_and_the_link_to_all_charts(finished):
    output_dir, stdout = finished
    assert "sdt" in stdout and "unigram" in stdout
    assert str(output_dir / "quickstart" / "report" / "report.html") in stdout
    link = view_of(TrackingSettings(mlflow_uri=f"sqlite:///{output_dir}/mlflow.db"), output_dir)
    command = f"MLFLOW_TRACKING_URI=sqlite:///{output_dir}/mlflow.db make mlflow-ui"
    assert f"MLflow: {command}, then http://127.0.0.1:5000/{link}\n" in stdout


def test_comparison_json_keeps_its_contract(finished):
    report = finished[0] / "quickstart" / "report"
    comparison = json.loads((report / "comparison.json").read_text())
    assert comparison["schema_version"] == 2
    (run,) = comparison["runs"]
    assert (run["architecture"], run["seed"]) == ("sdt", 1)
    assert run["training_flops"] == pytest.approx(1e10, rel=0.05)
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
    revisions = {manifest["step"]: manifest["git_revision"] for manifest in manifests}
    prepared = revisions.pop("prepare_data")  # before the pipeline was begun again
    assert revisions.keys() == {"train", "export", "evaluate", "compare"}
    assert len(set(revisions.values())) == 1 and prepared not in revisions.values()


def test_mlflow_has_the_run_and_its_report(finished, tmp_path):
    client = mlflow.MlflowClient(f"sqlite:///{finished[0]}/mlflow.db")
    experiment = client.get_experiment_by_name("dynamic-transformers")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"quickstart report", "sdt"}
    assert all(run.info.status == "FINISHED" for run in runs.values())
    parent, child = runs["quickstart report"].info.run_id, runs["sdt"]
    assert child.data.tags["report"] == parent
    wanted = {"train/loss", "eval/loss", "test/loss", "efficiency/forward_flops_per_token"}
    assert wanted <= set(child.data.metrics)
    artifacts = {artifact.path for artifact in client.list_artifacts(parent, "report")}
    assert {"report/report.html", "report/comparison.json"} <= artifacts
    assert {"config", "evaluation", "model"} <= {a.path for a in client.list_artifacts(child.info.run_id)}
    assert [a.path for a in client.list_artifacts(child.info.run_id, "data")] == ["data/preview.html"]
    report = Path(client.download_artifacts(parent, "report/report.html", str(tmp_path)))
    assert "Training blocks, decoded" in report.read_text()


def identity_of(output_dir, *arguments):
    """What makes two calls one execution."""
    parser = argparse.ArgumentParser()
    add_pipeline_arguments(parser)
    asked = parser.parse_intermixed_args(pipeline_command(output_dir, *arguments)[3:])
    return execution_identity(pipeline_arguments(asked)[0])


FREE = (
    "training.log_every=3",
    "training.keep_checkpoints=1",
    "training.checkpoint_every=7",
    "data.processes=2",
    "tracking.mlflow=false",
    ("training.gradient_accumulation_steps=2", "data.batch_size=2"),  # the same batch of 4
)
OTHERS = (
    "training.max_flops=3.0e9",
    "training.gradient_accumulation_steps=2",
    "data.vocab_size=999",
    "evaluation.limit=3",
    ("--seeds", "1"),
)


@pytest.mark.parametrize("change", FREE)
def test_settings_that_change_no_result_go_on_in_the_same_folder(change, tmp_path):
    changes = (change,) if isinstance(change, str) else change
    assert identity_of(tmp_path, "mod", *changes) == identity_of(tmp_path, "mod")


@pytest.mark.parametrize("change", OTHERS)
def test_other_settings_begin_anew_and_are_named(change, tmp_path, capsys):
    changes = (change,) if isinstance(change, str) else change
    first = execution_of(tmp_path, identity_of(tmp_path, "mod"), force=False)
    first.mkdir()
    assert execution_of(tmp_path, identity_of(tmp_path, "mod"), force=False) == first
    assert capsys.readouterr().out == ""
    other = execution_of(tmp_path, identity_of(tmp_path, "mod", *changes), force=False)
    assert other != first
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match(rf"begins anew, since settings differ from {first.name}: \S+ \(.* there, .* now\)$", line)


def test_a_failing_step_fails_the_run_and_shows_why(tmp_path, micro_overrides):
    sources = "data.dataset_configs=[{name: gone, path: json, data_files: /nowhere/gone.jsonl}]"
    root = tmp_path / "quickstart" / "pipeline"
    root.mkdir(parents=True)
    execution = execution_of(root, identity_of(tmp_path, "standard", *micro_overrides, sources), force=False)
    (execution / "earlier").mkdir(parents=True)
    result = run_pipeline(tmp_path, "standard", *micro_overrides, sources, "--force")
    (aside,) = execution.parent.glob(f"{execution.name}.replaced-*")
    assert (aside / "earlier").is_dir() and not (execution / "earlier").exists()
    assert f"moved aside: {aside}" in result.stdout
    assert result.returncode == 2
    assert "/nowhere/gone.jsonl" in result.stdout
    assert "prepare-data" in result.stderr and "Traceback" not in result.stdout + result.stderr
    assert "gone.jsonl" in (tmp_path / "quickstart" / "logs" / "prepare-data.log").read_text()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, micro_overrides):
    """A folder of prepared data, an empty one and one of another step."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(compose_settings("quickstart", micro_overrides), folder / "data")
    (folder / "empty").mkdir()
    (folder / "run").mkdir()
    write_manifest(folder / "run", "train", {}, {})
    return folder


def test_data_that_were_prepared_before_come_in(prepared, tmp_path, micro_overrides):
    result = run_pipeline(tmp_path, "standard", *micro_overrides, "--data-uri", str(prepared / "data"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "'importer'" in result.stdout and not list(tmp_path.rglob("prepare-data*"))
    there = read_manifest(prepared / "data")
    manifests = [read_manifest(path.parent) for path in tmp_path.rglob("manifest.json")]
    used = {made["step"]: made["inputs"]["data"] for made in manifests if "data" in made["inputs"]}
    assert used.keys() == {"train", "export", "evaluate"}
    assert all(data["digest"] == there["digest"] for data in used.values())
    # Other data would be another execution.
    (record,) = tmp_path.glob("quickstart/pipeline/*.identity.json")
    assert json.loads(record.read_text())["--data-uri"] == there["content_digest"]


@pytest.mark.parametrize(
    ("place", "overrides", "reason"),
    [
        ("nowhere", (), "no such folder"),
        ("empty", (), "unfinished: it has no manifest.json"),
        ("run", (), "is the output of train, not of prepare_data"),
        (
            "data",
            ("data.block_size=64", "run.seed=3"),
            "holds data of other settings: data.block_size=64 (there 32), run.seed=3 (there 0); "
            "give the settings that they were prepared with",
        ),
    ],
)
def test_what_are_no_data_of_these_settings_do_not_come_in(
    place, overrides, reason, prepared, tmp_path, micro_overrides, call
):
    folder = prepared / place
    refusal = call(tmp_path, "standard", *micro_overrides, "--data-uri", str(folder), *overrides)
    assert refusal == f"error: --data-uri: {folder}: {reason}\n"
    assert not list(tmp_path.iterdir())


def test_what_finished_of_a_failed_pipeline_is_compared(tmp_path, micro_overrides):
    command = pipeline_command(tmp_path, "mod,stt", *micro_overrides, "training.log_every=1")
    options = dict(
        cwd=PROJECT_ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pipeline = subprocess.Popen(command, **options)
    # The second training is killed, as the kernel does where memory is short.
    second = "quickstart/pipeline/*/for-loop*-1/train/**/metrics.jsonl"
    wait_for(lambda: list(tmp_path.glob(second)), pipeline)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if f"{tmp_path}" in (arguments := path.read_text()) and "-1/train/run_folder" in arguments:
                os.kill(int(path.parent.name), signal.SIGKILL)
    _, errors = pipeline.communicate(timeout=240)
    assert pipeline.returncode == 2 and "the pipeline failed" in errors
    report = tmp_path / "quickstart" / "report"
    (run,) = json.loads((report / "comparison.json").read_text())["runs"]
    assert run["architecture"] == "mod" and run["efficiency"]["prefill_tokens_per_second"] > 0
    assert "without stt-seed0" in (report / "report.html").read_text()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("dynamic-transformers")
    runs = {entry.info.run_name: entry for entry in client.search_runs([experiment.experiment_id])}
    parent = runs["quickstart-unfinished report"].info.run_id
    assert runs["mod"].data.tags["report"] == parent
    assert "report/report.html" in {artifact.path for artifact in client.list_artifacts(parent, "report")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("transformer",), "--variants transformer: no variant 'transformer'; there are standard, shallow"),
        (("mod", "--seeds", "x"), "study.variants.mod: run.seed=x: must be a whole number"),
        (("mod", "study.baseline=none"), "study.baseline=none: must be one of"),
    ],
)
def test_a_wrong_run_is_refused_before_anything_starts(arguments, message, tmp_path, call):
    assert call(tmp_path, *arguments).startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command in this process that must be refused in one line, and gives it."""

    def run(output_dir, *arguments):
        monkeypatch.setattr(sys, "argv", ["pipelines.run", *pipeline_command(output_dir, *arguments)[3:]])
        monkeypatch.setattr(os, "environ", environment())
        with pytest.raises(SystemExit) as end:
            main()
        errors = capsys.readouterr().err
        assert end.value.code == 2 and len(errors.splitlines()) == 1
        return errors

    return run


@pytest.mark.parametrize("place", ["/proc/x", "/etc/passwd"])
def test_a_place_that_cannot_be_written_is_named(place, call):
    assert call(place, "mod").startswith(f"error: run.output_dir: {place}")


def test_what_is_no_report_is_not_replaced(tmp_path, call):
    mine = tmp_path / "quickstart" / "report" / "thesis.tex"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert f"{mine.parent}: is no report of a pipeline" in call(tmp_path, "mod")
    assert mine.read_text() == "mine"
