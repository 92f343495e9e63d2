"""`--wait` and `--resubmit`: what is told of a run, and when it is begun again."""

import re
import time
from types import SimpleNamespace

import pytest
from fake_kfp import Step, pod_of, state
from submissions import RUNS, write_package

from pipelines import progress, submit
from pipelines.cluster import ClusterSettings
from pipelines.compile import compile_pipeline


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
        "train of standard-seed0: SUCCEEDED, from the cache",
        "train of mod-seed0: RUNNING",
        "train of mod-seed1: RUNNING",
        "train of mod-seed0: RUNNING, attempt 2",
        "train of mod-seed0: SUCCEEDED, attempt 2",
        "export of mod-seed0: RUNNING",
        "export of mod-seed0: SUCCEEDED",
        "compare: SUCCEEDED",
        "run: SUCCEEDED",
    ]


def test_a_group_of_shards_is_told_from_a_run(fake, run, tmp_path):
    package = compile_pipeline(ClusterSettings(), tmp_path / "p.yaml", data_shards=2)
    groups = {"tokenize-shards_0": "SUCCEEDED", "tokenize-shards_1": Step("RUNNING", attempts=2)}
    fake.states = [state("RUNNING", **groups), state("SUCCEEDED", train_0="SUCCEEDED", compare="SUCCEEDED")]
    arguments = ("--package", package, "--local-images", "--wait", *RUNS)
    code, output, errors = run(fake.url, *arguments)
    assert code == 0, errors
    assert [line.split(" ", 1)[1] for line in output.splitlines()[4:]] == [
        "tokenize-shards of group 1: SUCCEEDED",
        "tokenize-shards of group 2: RUNNING, attempt 2",
        "run: RUNNING",
        "train of standard-seed0: SUCCEEDED",
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
            "train of mod-seed1 failed (main: Error (exit code 1))",
        ),
        (
            {"configure": "SUCCEEDED", "train_2": failed(attempts=3)},
            ("train", 2, "executor(2)"),
            "train of standard-seed1 failed (main: Error (exit code 1))",
        ),
        (
            {"train_0": "SUCCEEDED", "export_0": failed("pod deleted")},
            ("export", 0, "executor"),
            "export of standard-seed0 failed (pod deleted)",
        ),
        (
            {"train_0": "SUCCEEDED", "export_0": "SUCCEEDED", "train_1": "SUCCEEDED", "compare": failed()},
            ("compare", "executor"),
            "compare failed (main: Error (exit code 1))",  # though runs of the loop came before it
        ),
        (
            {"train_1": Step("OMITTED", driver="FAILED")},
            ("train", 1, "driver"),
            "train-driver of mod-seed0 failed",
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
    assert re.findall(r"train of (\S+) failed", line) == ["mod-seed1", "standard-seed1", "mod-seed0"]
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
    assert output.count("train of mod-seed0 failed (pod deleted)") == 1
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


def test_a_pipeline_that_was_compiled_without_cache_cannot_be_begun_again(fake, refused, tmp_path):
    package = write_package(tmp_path / "pipeline.yaml", cached=False)
    line = refused(fake.url, "--package", package, "--wait", "--resubmit", "1")
    assert line.startswith(
        "--resubmit takes what has finished from the cache, which this pipeline was compiled"
    )


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
