"""Several processes of one machine, as the pipeline's train task starts them."""

import json
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from components.train import train as train_component
from dynamic_transformers.launch.run import kill_family, launch_training
from dynamic_transformers.launch.settings import Launch
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.settings import UserError
from dynamic_transformers.training.checkpoint import checkpoints, read_checkpoint
from dynamic_transformers.training.trainer import train


def weights(run_dir):
    return load_file(run_dir / read_manifest(run_dir, "train")["checkpoint"] / "model.safetensors")


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_the_component_trains_in_two_processes_what_one_process_trains(
    device, make_settings, data_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    one = train(make_settings("mod", data={"batch_size": 4}), data_dir, tmp_path / "one")
    settings = make_settings("mod", data={"batch_size": 2}, system={"device": device})
    two = tmp_path / "two"
    train_component.python_func(
        settings=settings.to_json(),
        run='["mod", ["model.type=mod"], {}]',
        data=SimpleNamespace(path=str(data_dir)),
        run_folder=SimpleNamespace(path=str(two)),
        launch=Launch(processes=2).to_json(),
    )
    assert read_manifest(two, "train")["training_tokens"] == read_manifest(one)["training_tokens"]
    for name, value in weights(one).items():
        if "threshold" not in name:  # the mean of two quantiles is not the quantile of both
            torch.testing.assert_close(weights(two)[name], value, atol=2e-3, rtol=1e-2)
    # What the processes log is in the log of the step.
    assert "mod-mod-seed0 step 6/6" in (tmp_path / "two.log").read_text()


def test_a_process_that_fails_fails_the_launch(make_settings, data_dir, tmp_path, caplog):
    logger = logging.getLogger("dynamic_transformers")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, "dynamic_transformers")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("no run")
    try:
        with pytest.raises(UserError, match=f"^{tmp_path}/run: holds something else than a run"):
            launch_training(make_settings(), data_dir, tmp_path / "run", Launch(processes=2))
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_processes_which_leave_a_checkpoint_and_end(
    number, make_settings, data_dir, tmp_path
):
    settings = make_settings("mod", data={"batch_size": 2}, training={"max_steps": 10**6})
    run_dir = tmp_path / "run"
    # Forked from this process, which has all imports done.
    launcher = multiprocessing.get_context("fork").Process(
        target=launch_training, args=(settings, data_dir, run_dir, Launch(processes=2))
    )
    launcher.start()
    metrics = run_dir / "metrics.jsonl"
    try:
        while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 3:
            assert launcher.is_alive()
            time.sleep(0.05)
        family = descendants(launcher.pid)
        assert len(family) >= 3  # torchrun and two ranks
        os.kill(launcher.pid, number)
        launcher.join(120)
        assert launcher.exitcode == 128 + number
    finally:
        if launcher.is_alive():
            kill_family(launcher.pid)
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
    ended_at = read_checkpoint(checkpoints(run_dir)[-1]).progress.step
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == ended_at < 10**6
    # One process with the same global batch goes on where two have ended.
    one = make_settings("mod", data={"batch_size": 4}, training={"max_steps": ended_at + 2})
    train(one, data_dir, run_dir)
    assert read_manifest(run_dir)["training_steps"] == ended_at + 2
    twice = make_settings("mod", data={"batch_size": 8}, training={"max_steps": ended_at + 4})
    with pytest.raises(UserError, match=r"global_batch \(4 there, 8 now\)"):
        train(twice, data_dir, run_dir)


def descendants(pid):
    """Ids of the processes below one, as /proc tells."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, pending = [], [pid]
    while pending:
        parent = pending.pop()
        children = [child for child, its_parent in parents.items() if its_parent == parent]
        found += children
        pending += children
    return found


def test_one_process_is_this_one(make_settings, data_dir, tmp_path):
    settings = make_settings(training={"max_steps": 1})
    run_dir = launch_training(settings, data_dir, tmp_path / "run", Launch.from_json(""))
    assert read_manifest(run_dir, "train")["training_steps"] == 1


def test_more_processes_than_gpus_are_a_mistake(make_settings, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    settings = make_settings(system={"device": "auto"})
    with pytest.raises(UserError, match=r"launch.processes=2: this node has 1 GPU\(s\)"):
        launch_training(settings, data_dir, tmp_path / "run", Launch(processes=2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"grace_seconds": 5}', "launch.grace_seconds=5: must be a whole number, at least 30"),
        ('{"processes": 0}', "launch.processes=0: must be a whole number, at least 1"),
        ('{"nodes": "2"}', "launch.nodes=2: must be a whole number"),
        ('{"nodes": 2}', "launch.nodes=2 needs launch.image and launch.claim and launch.mount_path"),
        ('{"nodes": 2, "image": "i", "mount_path": "/mnt"}', "launch.nodes=2 needs launch.claim$"),
        ('{"mount_path": "mnt"}', "launch.mount_path=mnt: must be an absolute path"),
        ('{"gpus": 2}', "launch: no such key: gpus"),
        ('{"secrets": [{"variable": "A"}]}', "must have variable, secret and key"),
    ],
)
def test_a_mistake_is_told_before_anything_is_done(text, message):
    with pytest.raises(UserError, match=message):
        Launch.from_json(text)
