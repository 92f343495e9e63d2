"""A task that finds a job of its name, and one whose job or API goes away."""

import dataclasses
import os
import signal
import time

import pytest

from dynamic_transformers.launch import kubernetes_api, patience, train_job
from dynamic_transformers.launch.run import launch_training
from dynamic_transformers.settings import UserError
from tests.distributed.train_jobs import name_of, posts, put_job, succeed, wait_for, weights


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_task_that_is_ended_leaves_its_job_which_the_next_one_follows(
    number, code, cluster, launch, settings, data_dir, finished_run, tmp_path, lines
):
    def run(name):
        cluster.status(name, active=1, ready=1)
        wait_for(lambda: any("1 ready" in line for line in lines.messages))
        os.kill(os.getpid(), number)

    cluster.on_create = run
    with pytest.raises(SystemExit) as end:
        launch_training(settings, data_dir, tmp_path / "run", launch)
    name = name_of(settings, data_dir, launch)
    assert end.value.code == code and name in cluster.jobs
    assert lines.messages[-1].startswith(f"this task ends, TrainJob {name} goes on")
    taken_up = f"TrainJob {name} is there already: this task follows it"
    succeed(cluster, launch, finished_run, lambda: taken_up in lines.messages)
    cluster.start(name)  # the same goes on
    launch_training(settings, data_dir, tmp_path / "run", launch)
    assert posts(cluster) == 1


def test_the_time_limit_is_named_and_a_task_that_is_tried_again_gets_no_more_time(
    cluster, launch, settings, data_dir, finished_run, tmp_path
):
    cluster.on_create = lambda name: cluster.status(name, "Failed", "DeadlineExceeded", "too late")
    launch = dataclasses.replace(launch, timeout_seconds=7)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"DeadlineExceeded, timeout_seconds=7\): too late; a higher"):
            launch_training(settings, data_dir, tmp_path / "run", launch)
    assert len(cluster.threads) == 1 and ("delete", "trainjobs") not in cluster.requests
    succeed(cluster, launch, finished_run)
    launch_training(settings, data_dir, tmp_path / "run", dataclasses.replace(launch, timeout_seconds=8))
    assert ("delete", "trainjobs") in cluster.requests


@pytest.mark.parametrize("before", ["Failed", "Complete", "being deleted", "without nodes"])
def test_a_job_that_cannot_train_any_more_is_replaced(
    before, cluster, launch, settings, data_dir, finished_run, tmp_path
):
    """Not before its JobSet and its pods are gone: else the new one would be taken for failed, too."""
    mistaken = dataclasses.replace(launch, tolerations=[{"key": "gpu", "operator": "Exist"}])
    name = put_job(cluster, settings, data_dir, mistaken if before == "without nodes" else launch)
    cluster.status(name, before if before in ("Failed", "Complete") else "", "Before", "of an earlier task")
    cluster.put_pod(name, 0)
    if before == "being deleted":
        cluster.on_create = lambda name: None
        cluster.delete(name, {"propagationPolicy": "Foreground"})
    succeed(cluster, launch, finished_run)
    launch_training(settings, data_dir, tmp_path / "run", launch)
    assert weights(tmp_path / "run").keys() == weights(finished_run).keys()
    assert cluster.requests.count(("delete", "trainjobs")) == posts(cluster) == 1
    assert not cluster.pods


def test_pods_that_stay_are_named(cluster, launch, settings, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(kubernetes_api, "DELETION_SECONDS", 0.2)
    name = put_job(cluster, settings, data_dir, launch)
    cluster.status(name, "Failed", "Before", "of an earlier task")
    cluster.put_pod(name, 0)
    cluster.remove_pods = lambda name: None
    with pytest.raises(RuntimeError, match=rf"^pod {name}-node-0-0-abcde is still there 0 s after"):
        launch_training(settings, data_dir, tmp_path / "run", launch)


def test_a_job_that_runs_is_followed_with_other_settings_too(
    cluster, launch, settings, data_dir, finished_run, tmp_path, lines
):
    name = put_job(cluster, settings, data_dir, dataclasses.replace(launch, timeout_seconds=5))
    cluster.status(name, active=1, ready=1)
    succeed(cluster, launch, finished_run, lambda: any("is there already" in line for line in lines.messages))
    cluster.start(name)  # this one, not another
    launch_training(settings, data_dir, tmp_path / "run", launch)
    assert len(cluster.threads) == 1 and ("delete", "trainjobs") not in cluster.requests
    assert f"TrainJob team/{name}: Complete; node: 0 active, 0 ready, 1 succeeded, 0 failed" in lines.messages


def test_a_job_that_is_deleted_meanwhile_is_no_success(cluster, launch, settings, data_dir, tmp_path):
    cluster.on_create = lambda name: cluster.jobs.pop(name)
    with pytest.raises(RuntimeError, match="was deleted before it was complete"):
        launch_training(settings, data_dir, tmp_path / "run", launch)


def test_a_complete_job_without_a_run_is_no_success(
    cluster, launch, settings, data_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_job, "VISIBLE_SECONDS", 0.0)
    cluster.on_create = lambda name: cluster.status(name, "Complete", succeeded=1)
    with pytest.raises(RuntimeError, match=r"is complete, but there is no finished run in .*same volume"):
        launch_training(settings, data_dir, tmp_path / "run", launch)


def test_an_outage_is_waited_for(cluster, launch, settings, data_dir, finished_run, tmp_path, lines):
    def run(name):
        cluster.status(name, active=1, ready=1)
        cluster.go_away(0.5)
        time.sleep(0.6)
        succeed(cluster, launch, finished_run)
        cluster.on_create(name)

    cluster.on_create = run
    launch_training(settings, data_dir, tmp_path / "run", launch)
    away = [line for line in lines.messages if line.startswith("the Kubernetes API is away")]
    assert any("503" in line for line in away) and any("RemoteDisconnected" in line for line in away)
    assert posts(cluster) == 1


def test_an_outage_that_lasts_is_an_error(cluster, launch, settings, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(patience, "OUTAGE_SECONDS", 0.0)
    cluster.go_away(1000)
    with pytest.raises(RuntimeError, match="the Kubernetes API is still away: 503"):
        launch_training(settings, data_dir, tmp_path / "run", launch)


@pytest.mark.parametrize("verb", ["get", "create", "delete"])
def test_a_right_that_is_missing_is_named(verb, cluster, launch, settings, data_dir, tmp_path):
    if verb == "delete":
        cluster.status(put_job(cluster, settings, data_dir, launch), "Failed")
    cluster.rules[0]["verbs"].remove(verb)
    message = rf"^the Kubernetes API refuses to {verb} .* cannot {verb} .*cluster/train-job-rbac.yaml$"
    with pytest.raises(UserError, match=message):
        launch_training(settings, data_dir, tmp_path / "run", launch)


def test_a_job_that_a_webhook_refuses_is_not_taken_for_a_missing_right(
    cluster, launch, settings, data_dir, tmp_path
):
    launch = dataclasses.replace(launch, environment={"PET_NNODES": "3"})
    with pytest.raises(UserError, match=r"create a TrainJob: .*must not have reserved envs$"):
        launch_training(settings, data_dir, tmp_path / "run", launch)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("runtimePatches", r'unknown field "spec.runtimePatches"; Kubeflow Trainer 2.3 or newer is needed'),
        (
            "terminationGracePeriodSeconds",
            r'unknown field "spec.runtimePatches\[0\]\S+"; Kubeflow Trainer 2.3 or newer is needed',
        ),
        ("numNodes", 'unknown field "spec.trainer.numNodes"'),
    ],
)
def test_a_field_that_a_trainer_would_drop_is_named(
    field, said, cluster, launch, settings, data_dir, tmp_path
):
    cluster.unknown_fields = {field}
    with pytest.raises(UserError, match=rf"^the Kubernetes API refuses to create a TrainJob: .*{said}$"):
        launch_training(settings, data_dir, tmp_path / "run", launch)
    assert not cluster.jobs


def test_a_wrong_toleration_is_named_without_a_word_of_versions(
    cluster, launch, settings, data_dir, tmp_path
):
    launch = dataclasses.replace(launch, tolerations=[{"key": "gpu", "operatr": "Exists"}])
    with pytest.raises(UserError, match=r'unknown field "spec.runtimePatches\[0\]\S+.operatr"$'):
        launch_training(settings, data_dir, tmp_path / "run", launch)
