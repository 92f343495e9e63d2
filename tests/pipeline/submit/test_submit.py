"""`python -m pipelines.submit` against a loopback server: what is uploaded and asked for."""

import json
import re

import pytest
import yaml
from submissions import PUSHED, TOKEN, command, pushed, write_package, write_record

from dynamic_transformers import __version__
from dynamic_transformers.configure import settings_from_json
from dynamic_transformers.settings import PROJECT_ROOT
from dynamic_transformers.study import study_runs


def test_a_user_sees_what_was_submitted_and_nothing_else(guarded, package):
    arguments = ("--package", package, "--run-name", "mine")
    result = command(*arguments, KFP_HOST=guarded.url + "/", KFP_TOKEN=TOKEN)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    (started,) = guarded.runs
    assert started["experiment_id"] == guarded.experiments[0]["experiment_id"]
    version = guarded.versions[0]["description"].removeprefix("first version: ")
    assert version.startswith(f"{__version__}-")
    assert result.stdout.splitlines() == [
        "experiment: dynamic-transformers",
        f"pipeline:   small-comparison, {version}, uploaded",
        f"run:        mine, {started['run_id']}",
        f"link:       {guarded.url}/#/runs/details/{started['run_id']}",
    ]


def test_our_own_pipeline_is_compiled_for_the_cluster_and_accepted(fake, refused, tmp_path):
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("image_pull_secrets: [registry-of-ours]")
    record = write_record(tmp_path / "images.json")
    result = command("--host", fake.url, "--cluster", cluster, DYNAMIC_TRANSFORMERS_IMAGES=record)
    assert (result.returncode, result.stderr) == (0, "")
    assert fake.pipelines[0]["display_name"] == "dynamic-transformers-comparison"
    spec = json.dumps(fake.versions[0]["pipeline_spec"])
    assert "registry-of-ours" in spec and PUSHED in spec
    assert refused(fake.url, "--cluster", cluster).startswith("--cluster is for a pipeline that is compiled")


def test_prepared_data_of_the_clusters_storage_come_in(fake, refused, tmp_path):
    record = write_record(tmp_path / "images.json")
    arguments = ("--host", fake.url, "--data-uri", "s3://bucket/data")
    result = command(*arguments, DYNAMIC_TRANSFORMERS_IMAGES=record)
    assert (result.returncode, result.stderr) == (0, "")
    assert "s3://bucket/data" in json.dumps(fake.versions[0]["pipeline_spec"])
    assert refused(*arguments[1:]).startswith("--data-uri is for a pipeline that is compiled")
    result = command("--host", fake.url, "--data-uri", "outputs/data/a", DYNAMIC_TRANSFORMERS_IMAGES=record)
    assert result.returncode == 2 and len(fake.runs) == 1
    assert result.stderr.startswith("error: --data-uri outputs/data/a: must be like s3://bucket/folder")


def test_data_are_tokenized_in_as_many_groups_as_are_asked_for(fake, refused, tmp_path):
    record = write_record(tmp_path / "images.json")
    result = command("--host", fake.url, "--data-shards", "3", DYNAMIC_TRANSFORMERS_IMAGES=record)
    assert (result.returncode, result.stderr) == (0, "")
    assert '"raw": "[1, 2, 3]"' in json.dumps(fake.versions[0]["pipeline_spec"])
    line = refused(fake.url, "--data-shards", "3")
    assert line.startswith("--data-shards is for a pipeline that is compiled now; --package has its own")


def test_task_files_that_no_pod_can_read_are_refused(fake, refused):
    line = refused(fake.url, "evaluation.task_dir=tasks")
    assert line.startswith("evaluation.task_dir=tasks: a cluster cannot read this folder; ")
    assert not fake.requests


def test_images_of_another_program_are_told(fake, tmp_path):
    record = write_record(tmp_path / "images.json", revision="0123abc")
    result = command("--host", fake.url, DYNAMIC_TRANSFORMERS_IMAGES=record)
    assert result.returncode == 0 and len(fake.runs) == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: registry.example/prepare:1 is of 0123abc, these sources are ")


@pytest.mark.parametrize("record", ["unpushed.json", "gone.json"])
def test_images_that_no_cluster_can_pull_are_refused(record, fake, tmp_path):
    write_record(tmp_path / "unpushed.json", digest=None)
    result = command("--host", fake.url, DYNAMIC_TRANSFORMERS_IMAGES=str(tmp_path / record))
    assert result.returncode == 2 and not fake.requests
    (line,) = result.stderr.splitlines()
    assert re.match(r"error: \S+ was not pushed: run `make build-images push-images REGISTRY=...`", line)


def test_images_of_this_machine_are_for_a_cluster_on_it(fake, run, refused, tmp_path):
    package = write_package(tmp_path / "pipeline.yaml", image="train:1")
    assert refused(fake.url, "--package", package).startswith("train:1 was not pushed")
    code, _, errors = run(fake.url, "--package", package, "--local-images")
    assert (code, errors, len(fake.runs)) == (0, "", 1)


def test_the_same_content_is_uploaded_once(fake, run, tmp_path):
    package = tmp_path / "pipeline.yaml"
    uploads = []
    other = {"image": pushed("registry.example/train:2")}
    contents = [{}, {}, other, other, {"pull_policy": "Always"}, {}]
    for content in contents:
        write_package(package, **content)
        code, output, errors = run(fake.url, "--package", package)
        assert code == 0, errors
        uploads.append("already there" not in output)
    assert uploads == [True, False, True, False, True, False]
    assert len(fake.experiments) == len(fake.pipelines) == 1
    assert len(fake.versions) == 3 and "platforms" in fake.versions[2]["pipeline_spec"]["platform_spec"]
    ran = [started["pipeline_version_reference"]["pipeline_version_id"] for started in fake.runs]
    first, second, third = (version["pipeline_version_id"] for version in fake.versions)
    assert ran == [first, first, second, second, third, first]


def test_parameters_arrive(fake, run):
    asked = ("--variants", "mod,stt", "--seeds", "0,3", "training.max_flops=5e9", "run.name=trial")
    code, _, errors = run(fake.url, "--experiment", "budgets", *asked)
    assert code == 0, errors
    (started,) = fake.runs
    parameters = started["runtime_config"]["parameters"]
    assert parameters.keys() == {"settings"}
    settings = settings_from_json(parameters["settings"])
    names = [run.name for run in study_runs(settings)]
    assert names == ["mod-seed0", "stt-seed0", "mod-seed3", "stt-seed3"]
    assert settings.training.max_flops == 5e9
    assert settings.run.output_dir == "outputs" and settings.tracking.mlflow_uri is None
    assert str(PROJECT_ROOT) not in json.dumps(started)
    assert started["display_name"].startswith("trial-20")
    assert fake.experiments[0]["display_name"] == "budgets"


def test_a_namespace_has_its_own_experiment_and_pipeline(fake, run):
    fake.multi_user = True
    assert run(fake.url)[0] == run(fake.url, "--namespace", "team")[0] == 0
    assert [experiment.get("namespace") for experiment in fake.experiments] == ["", "team"]
    assert [pipeline.get("namespace") for pipeline in fake.pipelines] == [None, "team"]
    assert fake.runs[1]["pipeline_version_reference"]["pipeline_id"] == fake.pipelines[1]["pipeline_id"]


def test_a_server_with_one_user_ignores_the_namespace_and_the_user_is_told(fake, run):
    assert run(fake.url)[2] == ""
    code, _, errors = run(fake.url, "--namespace", "team")
    assert (code, errors) == (0, "warning: --namespace: this server has one user, and ignores it\n")
    assert len(fake.experiments) == len(fake.pipelines) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resubmit", "1"), "--resubmit needs --wait"),
        (("--wait", "--resubmit", "-1"), "--resubmit -1: must be at least 0"),
        (
            ("--wait", "--resubmit", "1", "--no-cache"),
            "--resubmit takes what has finished from the cache, which",
        ),
        (
            ("--pipeline-root", "bucket/folder"),
            "--pipeline-root bucket/folder: must be like s3://bucket/folder",
        ),
    ],
)
def test_options_that_cannot_be_meant_are_refused(arguments, message, fake, refused):
    assert refused(fake.url, *arguments).startswith(message)
    assert not fake.requests


def caching(part):
    """Caching options of all tasks of an uploaded pipeline."""
    if isinstance(part, dict):
        yield from (part["cachingOptions"],) if "cachingOptions" in part else ()
        for value in part.values():
            yield from caching(value)


def test_no_cache_and_pipeline_root_reach_the_server(fake, run):
    for options in ((), ("--no-cache",), ("--no-cache", "--pipeline-root", "s3://bucket/folder")):
        code, _, errors = run(fake.url, *options)
        assert code == 0, errors
    with_cache, without = (list(caching(version["pipeline_spec"])) for version in fake.versions)
    assert len(with_cache) == len(without) and {"enableCache": True} in with_cache
    assert all(options == {} for options in without)
    roots = [started["runtime_config"].get("pipeline_root") for started in fake.runs]
    assert roots == [None, None, "s3://bucket/folder"]


def test_a_pipeline_that_the_server_refuses(fake, refused, package, tmp_path):
    spec = yaml.safe_load(package.read_text())
    spec["root"]["colour"] = "green"
    wrong = tmp_path / "pipeline.yaml"
    wrong.write_text(yaml.safe_dump(spec))
    line = refused(fake.url, "--package", wrong)
    assert line.startswith(f"{fake.url} answered 400: Invalid input error: invalid v2 pipeline spec:")
    assert "colour" in line and not fake.pipelines


def test_a_run_that_the_server_refuses(fake, refused, tmp_path):
    package = write_package(tmp_path / "pipeline.yaml", needs_more=True)
    line = refused(fake.url, "--package", package)
    assert "answered 400: Invalid input error: parameter budget is not optional" in line


def without_grid(text):
    spec = yaml.safe_load(text)
    del spec["root"]["inputDefinitions"]["parameters"]["grid"]
    return yaml.safe_dump(spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_grid, "pipeline small-comparison has no parameter grid"),
        (lambda text: "kind: Workflow", "no compiled pipeline; `make pipeline` writes one"),
        (lambda text: "{", "no compiled pipeline; `make pipeline` writes one"),
        (lambda text: "", "no compiled pipeline; `make pipeline` writes one"),
        (None, "No such file or directory"),
    ],
)
def test_a_wrong_package(change, message, fake, refused, package, tmp_path):
    wrong = tmp_path / "pipeline.yaml"
    if change:
        wrong.write_text(change(package.read_text()))
    assert refused(fake.url, "--package", wrong) == f"{wrong}: {message}\n"
    assert not fake.requests
