"""`python -m pipelines.submit` against a loopback server."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from hashlib import sha256
from types import SimpleNamespace
from typing import List  # noqa: UP035  (kfp reads the annotation)

import kfp
import pytest
import yaml
from fake_kfp import Handler, Step, fake_kfp, pod_of, serving, state
from kfp import compiler, dsl, kubernetes

from dynamic_transformers import __version__
from dynamic_transformers.configure import settings_from_json
from dynamic_transformers.launch import patience
from dynamic_transformers.settings import PROJECT_ROOT
from pipelines import progress, submit
from pipelines.images import SERVER, STEPS, source_revision

TOKEN = "a-secret-that-nobody-may-see"
VARIABLES = ("KFP_HOST", "KFP_TOKEN", "KF_PIPELINES_ENDPOINT", "KF_PIPELINES_SA_TOKEN_PATH")


def pushed(image):
    """An image as a registry names it."""
    return f"{image}@sha256:{sha256(image.encode()).hexdigest()}"


PUSHED = pushed("registry.example/train:1")


def write_package(path, image=PUSHED, pull_policy=None, needs_more=False, cached=True):
    """A pipeline that takes what ours takes, of its form: configure, (train, export) in a loop, compare."""

    @dsl.component(base_image=image, install_kfp_package=False)
    def configure(settings: str, seeds: List[int]) -> List[str]:  # noqa: UP006
        return []

    @dsl.component(base_image=image, install_kfp_package=False)
    def train(run: str) -> str:
        return run

    @dsl.component(base_image=image, install_kfp_package=False)
    def export(run: str) -> str:
        return run

    @dsl.component(base_image=image, install_kfp_package=False)
    def compare(runs: List[str]):  # noqa: UP006
        pass

    def pipeline(settings: str, architectures: List[str], seeds: List[int], dataset: str = "embedded"):  # noqa: UP006
        configured = configure(settings=settings, seeds=seeds).set_caching_options(False)
        with dsl.ParallelFor(configured.output) as run:
            trained = train(run=run).set_caching_options(cached)
            exported = export(run=trained.output).set_caching_options(cached)
        compare(runs=dsl.Collected(exported.output)).set_caching_options(False)
        if pull_policy:
            kubernetes.set_image_pull_policy(trained, pull_policy)

    def needier_pipeline(settings: str, architectures: List[str], seeds: List[int], budget: float):  # noqa: UP006
        train(run=settings)

    definition = dsl.pipeline(name="small-comparison")(needier_pipeline if needs_more else pipeline)
    compiler.Compiler().compile(definition, str(path))
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return write_package(tmp_path_factory.mktemp("package") / "pipeline.yaml")


@pytest.fixture(autouse=True)
def no_credentials_of_this_machine(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / ".config/kfp/context.json"))
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(submit, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(patience, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(patience, "OUTAGE_SECONDS", 2.0)
    monkeypatch.setattr(progress, "OUTAGE_SECONDS", 2.0)


@pytest.fixture
def fake():
    with fake_kfp() as server:
        yield server


@pytest.fixture
def guarded():
    with fake_kfp(token=TOKEN) as server:
        yield server


@pytest.fixture
def run(capsys, package):
    """Runs the command in this process; gives exit code, standard output and standard error."""

    def call(host, *arguments):
        given = [] if "--package" in arguments else ["--package", package]
        with pytest.raises(SystemExit) as end:
            submit.main(["--host", host, *map(str, [*given, *arguments])])
        output, errors = capsys.readouterr()
        assert TOKEN not in output + errors
        return end.value.code, output, errors

    return call


@pytest.fixture
def refused(run):
    """Runs a command that must end in one line, and gives it."""

    def call(host, *arguments):
        code, _, errors = run(host, *arguments)
        assert code == 2
        assert errors.startswith("error: ") and len(errors.splitlines()) == 1, errors
        return errors.removeprefix("error: ")

    return call


def command(*arguments, **environment):
    """Runs the command as a user does."""
    result = subprocess.run(
        [sys.executable, "-m", "pipelines.submit", *map(str, arguments)],
        cwd=PROJECT_ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert TOKEN not in result.stdout + result.stderr
    return result


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


def write_record(path, **fields):
    """What `make build-images` records, pushed, with `fields` in the place of some."""
    entry = {"revision": source_revision(), "bytes": 0} | fields
    names = {step: f"registry.example/{step}:1" for step in (*STEPS, SERVER)}
    images = {step: {"image": name, "digest": pushed(name), **entry} for step, name in names.items()}
    path.write_text(json.dumps(images))
    return str(path)


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
    asked = ("--architectures", "mod,stt", "--seeds", "0,3", "training.max_flops=5e9", "run.name=trial")
    code, _, errors = run(fake.url, "--experiment", "budgets", *asked)
    assert code == 0, errors
    (started,) = fake.runs
    parameters = started["runtime_config"]["parameters"]
    assert parameters.keys() == {"settings", "architectures", "seeds"}
    assert parameters["architectures"] == ["mod", "stt"]
    assert parameters["seeds"] == [0, 3] and all(type(seed) is int for seed in parameters["seeds"])
    settings = settings_from_json(parameters["settings"])
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


RUNS = ("--architectures", "standard,mod", "--seeds", "0,1")  # standard:0, mod:0, standard:1, mod:1


def test_wait_prints_a_line_when_a_step_of_ours_changes_state(fake, run):
    done = {"configure": "SUCCEEDED", "train_0": Step("SUCCEEDED", cached=True)}
    fake.states = [
        state("PENDING"),
        state("RUNNING"),
        state("RUNNING", configure="RUNNING"),
        state("RUNNING", **done, train_1=Step("RUNNING", attempts=1)),
        state("RUNNING", **done, train_1=Step("RUNNING", attempts=1), train_3=Step("RUNNING")),
        state("RUNNING", **done, train_1=Step("RUNNING", attempts=2), train_3=Step("RUNNING")),
        state("RUNNING", **done, train_1=Step("SUCCEEDED", attempts=2), export_1="RUNNING"),
        state(
            "SUCCEEDED",
            **done,
            train_1=Step("SUCCEEDED", attempts=2),
            export_1="SUCCEEDED",
            compare="SUCCEEDED",
        ),
    ]
    code, output, errors = run(fake.url, "--wait", *RUNS)
    assert code == 0, errors
    assert [line.split(" ", 1)[1] for line in output.splitlines()[4:]] == [
        "run: PENDING",
        "run: RUNNING",
        "configure: RUNNING",
        "configure: SUCCEEDED",
        "train of standard:0: SUCCEEDED, from the cache",
        "train of mod:0: RUNNING",
        "train of mod:1: RUNNING",
        "train of mod:0: RUNNING, attempt 2",
        "train of mod:0: SUCCEEDED, attempt 2",
        "export of mod:0: RUNNING",
        "export of mod:0: SUCCEEDED",
        "compare: SUCCEEDED",
        "run: SUCCEEDED",
    ]


# What a pod of KFP prints around what the step does.
LOG = """I0901 10:00:01.000000      24 launcher_v2.go:103] PIPELINE_DEFAULT_ROOT=minio://mlpipeline
[KFP Executor 2026-09-01 10:00:02,000 INFO]: Looking for component `train` in --component_module_path
10:00:03 step 1/100  loss 5.1
{last}
I0901 10:08:00.000000      24 launcher_v2.go:151] publish success.
F0901 10:08:00.000000      24 main.go:57] failed to execute component: exit status 2
goroutine 1 [running]:
k8s.io/klog.Fatalf(...)
time="2026-09-01T10:08:01.000Z" level=info msg="sub-process exited" argo=true error="<nil>"
Error: exit status 1
"""
OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory."


def failed(message="main: Error (exit code 1)", minute=8, **fields):
    return Step("FAILED", message, f"2026-09-01T10:{minute:02}:00Z", **fields)


@pytest.mark.parametrize(
    ("steps", "pod", "reason"),
    [
        ({"configure": failed()}, ("configure", "executor"), "configure failed (main: Error (exit code 1))"),
        (
            {"configure": "SUCCEEDED", "train_0": "SUCCEEDED", "train_3": failed()},
            ("train", 3, "executor"),
            "train of mod:1 failed (main: Error (exit code 1))",
        ),
        (
            {"configure": "SUCCEEDED", "train_2": failed(attempts=3)},
            ("train", 2, "executor(2)"),
            "train of standard:1 failed (main: Error (exit code 1))",
        ),
        (
            {"train_0": "SUCCEEDED", "export_0": failed("pod deleted")},
            ("export", 0, "executor"),
            "export of standard:0 failed (pod deleted)",
        ),
        (
            {"train_0": "SUCCEEDED", "export_0": "SUCCEEDED", "train_1": "SUCCEEDED", "compare": failed()},
            ("compare", "executor"),
            "compare failed (main: Error (exit code 1))",  # though runs of the loop came before it
        ),
        (
            {"train_1": Step("OMITTED", driver="FAILED")},
            ("train", 1, "driver"),
            "train-driver of mod:0 failed",
        ),
    ],
)
@pytest.mark.parametrize("last", ["", OUT_OF_MEMORY])
def test_a_failed_run_names_step_and_variant_and_the_last_line_of_its_log(
    steps, pod, reason, last, fake, refused
):
    fake.states = [state("RUNNING"), state("FAILED", **steps)]
    fake.logs = {pod_of(*pod): LOG.format(last=last)} if last else {}
    line = refused(fake.url, "--wait", *RUNS)
    link = f"{fake.url}/#/runs/details/{fake.runs[0]['run_id']}"
    told = f"{reason}: {last}" if last else reason
    assert line == f"the run ended FAILED: {told}; see {link}\n"


def test_of_several_steps_that_failed_the_first_are_named(fake, refused):
    failures = {f"train_{index}": failed(minute=9 - index) for index in range(4)}
    fake.states = [state("FAILED", configure="SUCCEEDED", **failures)]
    line = refused(fake.url, "--wait", *RUNS)
    assert re.findall(r"train of (\S+) failed", line) == ["mod:1", "standard:1", "mod:0"]
    assert "1 more failed; see http" in line


def test_a_run_that_failed_is_begun_again_until_it_succeeds(fake, run):
    fake.states = [
        state("FAILED", configure="SUCCEEDED", train_1=failed("pod deleted")),
        state("FAILED", configure="SUCCEEDED", train_1=failed("The node was low on resource: memory.")),
        state("SUCCEEDED", configure="SUCCEEDED", train_1="SUCCEEDED"),
    ]
    code, output, errors = run(fake.url, "--wait", "--resubmit", "3", "--run-name", "mine", *RUNS)
    assert (code, errors) == (0, "")
    assert [started["display_name"] for started in fake.runs] == ["mine", "mine-again1", "mine-again2"]
    first, *others = ({**started, "run_id": 0, "display_name": ""} for started in fake.runs)
    assert others == [first, first]  # the same version, so that the cache knows it, and the same parameters
    assert len(fake.versions) == 1
    assert output.count("train of mod:0 failed (pod deleted)") == 1
    assert "begun again in 0 s, 2 of 3\n" in output and output.splitlines()[-1].endswith(" run: SUCCEEDED")


EVICTED = "The node was low on resource: memory."


@pytest.mark.parametrize(
    ("end", "runs"),
    [
        (state("FAILED", configure="SUCCEEDED", train_1=failed()), 3),
        (state("FAILED", error="the controller lost it"), 3),
        (state("FAILED", configure=failed()), 1),  # the user's mistake stays one
        (state("FAILED", configure=failed(EVICTED)), 3),
        (state("FAILED", configure=failed("pod deleted")), 3),
        (state("FAILED", configure=failed("main: OOMKilled (exit code 137)")), 3),
        (state("CANCELED", configure="SUCCEEDED"), 1),
    ],
)
def test_what_begins_a_run_again_and_how_often(end, runs, fake, refused):
    fake.states = [end]
    assert refused(fake.url, "--wait", "--resubmit", "2").startswith(f"the run ended {end['state']}: ")
    assert len(fake.runs) == runs


@pytest.mark.parametrize(("status", "runs"), [(2, 1), (1, 3)])
def test_a_step_that_found_a_mistake_of_the_users_is_not_begun_again(status, runs, fake, refused):
    fake.states = [state("FAILED", configure="SUCCEEDED", train_1=failed(attempts=3))]
    log = LOG.replace("exit status 2", f"exit status {status}").format(last="data: no such column")
    fake.logs = {pod_of("train", 1, "executor(2)"): log}
    assert "data: no such column" in refused(fake.url, "--wait", "--resubmit", "2", *RUNS)
    assert len(fake.runs) == runs


def test_a_run_is_begun_again_after_a_pause_that_grows(fake, run, monkeypatch):
    slept = []
    monkeypatch.setattr(submit, "PAUSE_SECONDS", 60.0)
    monkeypatch.setattr(submit, "time", SimpleNamespace(monotonic=time.monotonic, sleep=slept.append))
    fake.states = [state("FAILED", configure="SUCCEEDED", train_1=failed())]
    assert run(fake.url, "--wait", "--resubmit", "3")[0] == 2
    assert slept == [60.0, 120.0, 240.0]
    # A pause that would last longer than the wait is none.
    assert run(fake.url, "--wait", "--resubmit", "3", "--timeout", "90")[0] == 2
    assert slept[3:] == [60.0]


@pytest.mark.parametrize("start", [503, 429, "lost"])
def test_an_outage_while_a_run_is_begun_is_waited_for_and_begins_one_run(start, fake, run):
    assert run(fake.url, "--run-name", "mine")[0] == 0  # which is not taken for the next one
    fake.starts, fake.states = [start, start], [state("SUCCEEDED")]
    code, output, errors = run(fake.url, "--run-name", "mine", "--wait")
    assert code == 0, errors
    assert len(fake.runs) == 2 and f"run:        mine, {fake.runs[1]['run_id']}" in output
    assert errors.startswith("the server is away, trying again: ") and len(errors.splitlines()) == 1


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


def test_a_pipeline_that_was_compiled_without_cache_cannot_be_begun_again(fake, refused, tmp_path):
    package = write_package(tmp_path / "pipeline.yaml", cached=False)
    line = refused(fake.url, "--package", package, "--wait", "--resubmit", "1")
    assert line.startswith(
        "--resubmit takes what has finished from the cache, which this pipeline was compiled"
    )


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


def test_a_run_that_fails_before_any_task_shows_its_own_reason(fake, refused):
    fake.states = [state("FAILED", error="no such service account")]
    assert "the run ended FAILED: no such service account; see" in refused(fake.url, "--wait")


def test_a_canceled_run_ends_the_wait(fake, refused):
    fake.states = [state("RUNNING"), state("CANCELING"), state("CANCELED")]
    assert refused(fake.url, "--wait").startswith(
        "the run ended CANCELED: the server names no step that failed; see http"
    )


def test_the_wait_ends_and_the_run_goes_on(fake, refused):
    fake.states = [state("RUNNING")]
    line = refused(fake.url, "--wait", "--timeout", "0.05")
    link = f"{fake.url}/#/runs/details/{fake.runs[0]['run_id']}"
    assert line == f"the run has not ended within --timeout, and goes on: {link}\n"
    assert refused(fake.url, "--timeout", "5") == "--timeout needs --wait\n"


def test_ctrl_c_ends_the_wait_and_says_that_the_run_goes_on(fake, run, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=time.monotonic, sleep=interrupt))
    fake.states = [state("RUNNING")]
    code, _, errors = run(fake.url, "--wait")
    link = f"{fake.url}/#/runs/details/{fake.runs[0]['run_id']}"
    assert (code, errors) == (130, f"no longer waiting; the run goes on: {link}\n")


@pytest.mark.parametrize("status", [503, 429])
def test_the_wait_outlasts_an_outage_of_minutes(status, fake, run, refused, caplog, monkeypatch):
    fake.states, fake.outage, fake.outages, fake.hang_ups = [state("SUCCEEDED")], status, 30, 6
    code, output, errors = run(fake.url, "--wait")
    assert (code, fake.hang_ups) == (0, 0)
    assert output.splitlines()[-1].endswith("run: SUCCEEDED")
    assert [line.split(": ")[0] for line in errors.splitlines()] == ["the server is away, trying again"] * 2
    assert not caplog.records  # of urllib3, about each new attempt
    monkeypatch.setattr(progress, "OUTAGE_SECONDS", 0.1)
    fake.outages = 1000
    *_, line = run(fake.url, "--wait")[2].splitlines()
    assert line == f"error: {fake.url} answered {status}: upstream connect error"
    fake.outage = 404
    assert refused(fake.url, "--wait") == f"{fake.url} answered 404: upstream connect error\n"  # at once


def test_the_token_comes_from_a_file_which_may_change(guarded, run, tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    monkeypatch.setenv("KFP_TOKEN", "of-no-use-here")

    def renew():
        guarded.token = f"new-{TOKEN}"
        file.write_text(guarded.token)

    guarded.on_poll = renew
    guarded.states = [state("RUNNING"), state("SUCCEEDED")]
    code, _, errors = run(guarded.url, "--token-file", file, "--wait")
    assert code == 0, errors


def test_the_token_of_a_service_account_is_used_in_a_cluster(guarded, run, tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(TOKEN)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(file))
    assert run(guarded.url)[0] == 0
    monkeypatch.setenv("KFP_TOKEN", "another")
    assert run(guarded.url)[0] == 2


def test_credentials_that_kfp_keeps_are_used(guarded, run, tmp_path):
    guarded.multi_user = True
    context = tmp_path / ".config/kfp/context.json"
    context.parent.mkdir(parents=True)
    header = {"client_authentication_header_name": "Authorization"}
    header |= {"client_authentication_header_value": f"Bearer {TOKEN}"}
    context.write_text(json.dumps({"namespace": "team", **header}))
    assert run(guarded.url)[0] == 0
    assert guarded.pipelines[0]["namespace"] == guarded.experiments[0]["namespace"] == "team"


def test_a_wrong_or_missing_token_is_told_without_showing_it(guarded, package):
    guarded.token = "the-right-one"
    for environment in ({"KFP_TOKEN": TOKEN}, {}):
        result = command("--host", guarded.url, "--package", package, **environment)
        assert result.returncode == 2 and result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: {guarded.url} answered 401: Request header error")
        assert line.endswith("; give a token that is valid there, by --token-file or KFP_TOKEN")
    assert not guarded.experiments


@pytest.mark.parametrize("text", ["", f"{TOKEN}\n{TOKEN}", f"{TOKEN} x", f"{TOKEN}é"])
def test_a_file_that_holds_no_token_is_refused(text, fake, refused, tmp_path):
    file = tmp_path / "token"
    file.write_text(text)
    line = refused(fake.url, "--token-file", file)
    assert line == f"{file}: must hold one token, and nothing else\n"
    assert not fake.requests


def test_a_token_file_that_is_not_there_is_refused(fake, refused):
    assert refused(fake.url, "--token-file", "/nowhere/token").startswith(
        "--token-file /nowhere/token: No such"
    )


def test_nothing_listens(package):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{free.getsockname()[1]}"
        result = command("--host", host, "--package", package, KFP_TOKEN=TOKEN)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: nothing answers at {host} (") and "Connection refused" in line


class Page(Handler):
    """What another service answers."""

    status = 200

    def do_GET(self):  # noqa: N802
        self.send_text(self.status, "text/html", "<html><body>Please log in</body></html>")


@pytest.mark.parametrize(
    ("status", "end"),
    [
        (
            200,
            "is no Kubeflow Pipelines server: its health page is not JSON; "
            "if it is one to log in, give a token",
        ),
        (404, "is no Kubeflow Pipelines server: it has no health page"),
        (502, "answered 502: Bad Gateway"),
    ],
)
def test_another_service_answers(status, end, refused, monkeypatch):
    monkeypatch.setattr(Page, "status", status)
    with serving(Page) as server:
        assert refused(server.url) == f"{server.url} {end}\n"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificate")
    key, pem = folder / "key.pem", folder / "certificate.pem"
    request = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=fake -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        ["openssl", *request.split(), "-keyout", key, "-out", pem], check=True, capture_output=True
    )
    pem.write_text(key.read_text() + pem.read_text())
    return pem


def test_a_certificate_must_be_trusted(certificate, run, refused, monkeypatch):
    with fake_kfp(certificate=certificate) as fake:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert run(fake.url)[0] == 0
        monkeypatch.delenv("SSL_CERT_FILE")
        line = refused(fake.url)
    assert line.startswith(f"{fake.url}: no secure connection (self-signed certificate")
    assert "SSL_CERT_FILE" in line


def test_https_to_a_server_without_it(fake, refused):
    host = fake.url.replace("http:", "https:")
    assert refused(host).startswith(f"{host}: no secure connection")


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


def without_seeds(text):
    spec = yaml.safe_load(text)
    del spec["root"]["inputDefinitions"]["parameters"]["seeds"]
    return yaml.safe_dump(spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_seeds, "pipeline small-comparison has no parameter seeds"),
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


def test_no_host(package):
    result = command("--package", package)
    assert result.returncode == 2
    assert result.stderr == "error: no server: give --host https://... or set KFP_HOST\n"


@pytest.mark.parametrize(
    "host", ["kubeflow.example", f"https://me:{TOKEN}@kubeflow.example", "ftp://x", "http://"]
)
def test_a_host_that_is_none(host, refused):
    assert refused(host).startswith("--host: must be like https://host")
