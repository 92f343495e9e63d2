"""Training on several nodes: the real task against a fake Kubernetes API that really runs the nodes."""

import dataclasses
import json
import os
import re
import shutil
import threading
import time

import pytest
import torch

from dynamic_transformers.launch import train_job
from dynamic_transformers.launch.run import launch_training
from dynamic_transformers.launch.settings import SecretVariable
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.settings import UserError
from dynamic_transformers.training.trainer import train
from tests.distributed.train_jobs import (
    STEPS,
    ScriptedNode,
    launch_on,
    name_of,
    posts,
    print_to,
    put_job,
    succeed,
    volume_of,
    weights,
)


def gone_on_from(run):
    """The step that the one node that went on began at, as its output on the volume says."""
    outputs = "".join(path.read_text() for path in run.parent.glob("logs/*/*/*/*/*/stdout.log"))
    (step,) = re.findall(r"going on from \S+/step-(\d+)", outputs)
    return int(step)


def lose_a_node(cluster, run, step):
    """Kills the last node once, when the run has a checkpoint of this step."""

    def disturb(_):
        if (run / "checkpoints" / f"step-{step:08d}").is_dir():
            cluster.disturb = lambda _: None
            cluster.nodes[-1].stop()

    cluster.disturb = disturb


def test_two_nodes_of_which_one_is_lost_train_what_one_process_trains(
    cluster, settings, data_dir, finished_run, tmp_path, lines
):
    cluster.secrets = {"mlflow": {"password": "s3cret"}}
    secret = SecretVariable("MLFLOW_TRACKING_PASSWORD", "mlflow", "password")
    launch = launch_on(cluster, secrets=[secret])
    name = name_of(settings, data_dir, launch)
    lose_a_node(cluster, volume_of(launch) / name / "run", 8)
    run_dir = launch_training(settings, data_dir, tmp_path / "run", launch)
    # Both start again in their pods: the other one has lost its peer.
    assert posts(cluster) == 1 and len(cluster.nodes) >= 4
    assert f"{name}-node-0-1-abcde: restart 1, after exit code 137 (OOMKilled)" in lines.messages
    assert f"{name}-node-0-0-abcde: restart 1, after exit code 1 (Error)" in lines.messages
    assert any(line.startswith("last lines of node-0, process 0") for line in lines.messages)
    assert 8 <= gone_on_from(volume_of(launch) / name / "run") < STEPS
    for key in ("training_steps", "training_tokens"):
        assert read_manifest(run_dir, "train")[key] == read_manifest(finished_run)[key]
    for key, value in weights(finished_run).items():
        if "threshold" not in key:  # the mean of two quantiles is not the quantile of both
            torch.testing.assert_close(weights(run_dir)[key], value, atol=5e-3, rtol=1e-2)
    for path in (path for path in tmp_path.rglob("*") if path.suffix in (".json", ".yaml", ".log")):
        assert "s3cret" not in path.read_text(), path
    # What is finished on the volume needs no job any more, nor an API.
    before = list(cluster.requests)
    again = launch_training(settings, data_dir, tmp_path / "again", launch)
    assert read_manifest(again) == read_manifest(run_dir) and cluster.requests == before


def test_a_job_that_is_suspended_then_fails_and_is_replaced_ends_in_the_same_weights(
    cluster, launch, settings, data_dir, tmp_path, lines
):
    launch = dataclasses.replace(launch, nodes=1)
    run = volume_of(launch) / name_of(settings, data_dir, launch) / "run"
    cluster.backoff_limit = 0

    def suspend_and_lose_the_job_file(name):
        """When it is resumed, its node fails by itself."""
        if (run / "checkpoints" / "step-00000004").is_dir():
            cluster.disturb = lambda _: None
            cluster.suspend(name)
            (job_file,) = run.parent.glob("job-*.json")
            job_file.unlink()
            threading.Timer(0.5, cluster.suspend, (name, False)).start()

    cluster.disturb = suspend_and_lose_the_job_file
    with pytest.raises(RuntimeError, match=r"failed \(FailedJobs\): jobset failed due to"):
        launch_training(settings, data_dir, tmp_path / "run", launch)
    assert len(cluster.nodes) == 2 and not cluster.pods and not (tmp_path / "run").exists()
    assert any(": Suspended; " in line for line in lines.messages)
    (logs,) = [line for line in lines.messages if line.startswith("last lines of ")]
    assert logs.startswith("last lines of node-0, process 0") and re.search(
        r"FileNotFoundError: .*job-\w+.json'$", logs
    )

    launch_training(settings, data_dir, tmp_path / "run", launch)
    assert len(cluster.nodes) == 3 and posts(cluster) == 2
    assert 4 <= gone_on_from(run) < STEPS
    for name, value in weights(train(settings, data_dir, tmp_path / "here")).items():
        assert torch.equal(weights(tmp_path / "run")[name], value), name


def test_a_mistake_that_a_node_finds_ends_the_job_at_once(cluster, launch, settings, data_dir, tmp_path):
    def run(name):
        (data,) = volume_of(launch).glob("data-*")
        data.rename(data.with_name("lost"))
        cluster.run_nodes(name)

    cluster.on_create = run
    launch = dataclasses.replace(launch, nodes=1)
    with pytest.raises(UserError, match=r"^\S+/data-\w+: no such folder$"):
        launch_training(settings, data_dir, tmp_path / "run", launch)
    assert not cluster.jobs and not cluster.pods and posts(cluster) == 1
    assert len(cluster.nodes) < cluster.backoff_limit


@pytest.mark.parametrize(
    "message", ["InUseError: another process writes there now", "RuntimeError: UserError: x"]
)
def test_what_may_pass_is_no_mistake(message, cluster, launch, settings, data_dir, tmp_path):
    cluster.start_node = type("Failing", (ScriptedNode,), {"codes": [1] * 9})

    def run(name):
        print_to(cluster, name, "node-0", error="Traceback", message=message)
        cluster.run_nodes(name)

    cluster.on_create = run
    with pytest.raises(RuntimeError, match="jobset failed due to"):
        launch_training(settings, data_dir, tmp_path / "run", launch)


def test_a_mistake_before_this_task_follows_the_job_is_not_taken_for_one_now(
    cluster, launch, settings, data_dir, finished_run, tmp_path, lines
):
    name = put_job(cluster, settings, data_dir, launch)
    cluster.status(name, active=1, ready=1)
    print_to(cluster, name, "node-0", error="Traceback", message="UserError: no such folder")
    succeed(cluster, launch, finished_run, lambda: any(": Created" in line for line in lines.messages))
    cluster.start(name)
    launch_training(settings, data_dir, tmp_path / "run", launch)
    assert ("delete", "trainjobs") not in cluster.requests


def test_a_volume_that_is_not_here_is_a_mistake(launch, settings, data_dir, tmp_path):
    launch = dataclasses.replace(launch, mount_path=str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"elsewhere: no folder .*; mount the claim shared there"):
        launch_training(settings, data_dir, tmp_path / "run", launch)


def test_data_that_another_task_has_just_copied_stays(data_dir, tmp_path, monkeypatch):
    copytree, shared = shutil.copytree, tmp_path / "data-1"

    def slow(source, target, **options):
        monkeypatch.undo()
        copytree(source, shared)
        return copytree(source, target, **options)

    monkeypatch.setattr(shutil, "copytree", slow)
    train_job.share(data_dir, shared)
    assert [path.name for path in tmp_path.iterdir()] == ["data-1"]
    assert json.loads((shared / "manifest.json").read_text()) == read_manifest(data_dir)


def test_what_killed_copies_left_is_removed_a_day_later(data_dir, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        for name in ("data-1", "data-2"):
            with pytest.raises(KeyboardInterrupt):
                train_job.share(data_dir, tmp_path / name)
    old, new = sorted(tmp_path.iterdir())
    long_ago = time.time() - 2 * train_job.LEFTOVER_SECONDS
    os.utime(old, (long_ago, long_ago))
    train_job.share(data_dir, tmp_path / "data-3")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([new.name, "data-3"])
