"""What a person who follows a job is told of its nodes."""

import logging
import re
import shutil
import time

import pytest

from dynamic_transformers.launch import job_state, job_watch, node_logs
from dynamic_transformers.launch.run import launch_training
from tests.distributed.train_jobs import ScriptedNode, name_of, print_to, succeed, volume_of, wait_for


def test_a_failed_job_raises_with_its_message_and_the_last_lines_of_its_nodes(
    cluster, launch, settings, data_dir, tmp_path, lines
):
    cluster.start_node = type("Failing", (ScriptedNode,), {"codes": [1] * 9})

    def run(name):
        print_to(cluster, name, "node-1", stdout="first line\n" * 99 + "CUDA out of memory")
        cluster.run_nodes(name)

    cluster.on_create = run
    name = name_of(settings, data_dir, launch)
    with pytest.raises(RuntimeError, match=rf"^TrainJob {name} failed \(FailedJobs\): jobset failed due to"):
        launch_training(settings, data_dir, tmp_path / "run", launch)
    assert not cluster.pods and len(cluster.nodes) == 2 + cluster.backoff_limit
    (logs,) = [line for line in lines.messages if line.startswith("last lines of ")]
    assert logs.startswith("last lines of node-1, process 0") and logs.endswith("CUDA out of memory")
    assert logs.count("first line") == node_logs.LAST_LINES - 1


def test_a_restart_is_told_with_what_ended_the_container(
    cluster, launch, settings, data_dir, finished_run, tmp_path, lines
):
    node = cluster.start_node = type("Restarted", (ScriptedNode,), {"codes": [None, 137]})
    name = name_of(settings, data_dir, launch)

    def disturb(name):
        if len(cluster.nodes) == 3 and not node.codes and any("restart 1" in line for line in lines.messages):
            shutil.copytree(finished_run, volume_of(launch) / name / "run")
            node.codes = [0, 0]
        elif len(cluster.nodes) == 2:
            print_to(cluster, name, "node-1", error="Traceback\nValueError: of node 1")

    cluster.disturb = disturb
    launch_training(settings, data_dir, tmp_path / "run", launch)
    said = [line for line in lines.messages if "restart" in line or "last lines" in line]
    assert said[0] == f"{name}-node-0-1-abcde: restart 1, after exit code 137 (OOMKilled)"
    assert said[1].startswith("last lines of node-1, process 0") and said[1].endswith("ValueError: of node 1")
    assert len(said) == 2


IMAGE = {"reason": "ErrImagePull", "message": "registry.example/train:1:\nnot found"}


SECRET = {"reason": "CreateContainerConfigError", "message": 'secret "hub" not found'}


TOLERATION = 'Job "x" is invalid: spec.template.spec.tolerations[0].operator: Invalid value: "Exist"'


@pytest.mark.parametrize(
    ("obstruct", "said"),
    [
        (
            lambda cluster, name: cluster.put_pod(name, 0, waiting=IMAGE),
            r"pod dt-\S+: ErrImagePull: registry.example/train:1: not found",
        ),
        (
            lambda cluster, name: cluster.put_pod(name, 1, waiting=SECRET),
            r'pod dt-\S+: CreateContainerConfigError: secret "hub" not found',
        ),
        (
            lambda cluster, name: cluster.put_pod(name, 0, unscheduled='claim "shared" not found'),
            r'pod dt-\S+: Unschedulable: claim "shared" not found',
        ),
        (
            lambda cluster, name: cluster.warn("JobSet", name, "JobCreationFailed", TOLERATION),
            r'JobSet dt-\S+: JobCreationFailed: Job "x" is invalid: .* "Exist"',
        ),
        (
            lambda cluster, name: (
                cluster.put_pod(name, 0, waiting={"reason": "ContainerCreating"}),
                cluster.warn("Pod", f"{name}-node-0-0-abcde", "FailedMount", "no such volume"),
            ),
            r"Pod dt-\S+: FailedMount: no such volume",
        ),
        (
            lambda cluster, name: (
                cluster.warn("Pod", "another", "BackOff", "of another job"),
                cluster.warn("JobSet", name, "Old", "of the job before", time="2025-12-31T00:00:00Z"),
            ),
            "neither a pod nor an event says why",
        ),
    ],
    ids=["image", "secret", "claim", "toleration", "mount", "nothing"],
)
def test_a_job_without_ready_nodes_says_why_and_goes_on(
    obstruct, said, cluster, launch, settings, data_dir, finished_run, tmp_path, lines, monkeypatch
):
    monkeypatch.setattr(job_watch, "LATE_SECONDS", 0.1)
    monkeypatch.setattr(job_watch, "EXPLAIN_SECONDS", 0.0)

    def warnings():
        return [entry.getMessage() for entry in lines.records if entry.levelno == logging.WARNING]

    def run(name):
        obstruct(cluster, name)
        wait_for(warnings)
        time.sleep(0.1)  # in which it is not said again
        cluster.put_pod(name, 0, waiting={"reason": "Other", "message": "another reason"})
        wait_for(lambda: len(warnings()) > 1)
        succeed(cluster, launch, finished_run)
        cluster.on_create(name)

    cluster.on_create = run
    launch_training(settings, data_dir, tmp_path / "run", launch)
    first, second = warnings()
    assert re.fullmatch(rf"TrainJob dt-\S+: no ready nodes for 0 s: {said}", first)
    assert second.endswith(": Other: another reason")


def test_a_suspended_job_is_waited_for_without_a_warning(
    cluster, launch, settings, data_dir, finished_run, tmp_path, lines, monkeypatch
):
    monkeypatch.setattr(job_watch, "LATE_SECONDS", 0.02)

    def run(name):
        cluster.status(name, "Suspended", "Suspended", "TrainJob is suspended")
        time.sleep(0.2)
        succeed(cluster, launch, finished_run)
        cluster.on_create(name)

    cluster.on_create = run
    launch_training(settings, data_dir, tmp_path / "run", launch)
    assert any(": Suspended; " in line for line in lines.messages)
    assert not [entry for entry in lines.records if entry.levelno == logging.WARNING]


def test_pods_that_may_not_be_seen_do_not_hide_the_failure(
    cluster, launch, settings, data_dir, tmp_path, lines
):
    del cluster.rules[1:]

    def run(name):
        wait_for(lambda: any("cannot be seen" in line for line in lines.messages))
        cluster.status(name, "Failed", "FailedJobs", "the reason")

    cluster.on_create = run
    with pytest.raises(RuntimeError, match="the reason"):
        launch_training(settings, data_dir, tmp_path / "run", launch)
    (blind,) = [line for line in lines.messages if "cannot be seen" in line]
    assert blind.endswith("needs the rules of cluster/train-job-rbac.yaml")


def test_a_condition_without_a_reason_is_told_as_it_is():
    job = {"metadata": {"name": "dt-mod-1"}, "spec": {}}
    job["status"] = {"conditions": [{"type": "Failed", "status": "True"}]}
    assert job_state.why_failed(job) == "TrainJob dt-mod-1 failed (no reason): no message"
    assert job_state.why_replaced(job, job) == "has ended before"
