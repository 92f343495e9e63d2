"""Weights & Biases, the real package: without its server, or with an imitation of it."""

import json
import shutil
import struct
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from servers import answering, closed_port, hanging, serving
from wandb_server import WandbServer

from dynamic_transformers.settings import TrackingSettings, UserError
from dynamic_transformers.tracking import RunTracker

BLOCK = 32768


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    package = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{closed_port()}")
    monkeypatch.setenv("WANDB_DATA_DIR", "")  # so that what the product sets ends with the test
    monkeypatch.delenv("WANDB_DATA_DIR")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.chdir(tmp_path)
    yield package
    package.teardown()


def track(run_dir, steps, status="FINISHED", after_checkpoint=lambda folder: None, **settings):
    before = len(list(run_dir.glob("wandb/offline-run-*/*.wandb")))
    tracker = RunTracker(
        run_dir, TrackingSettings(mlflow=False, wandb=True, **settings), run_dir, "my-run", {"x": 1}
    )
    for step in steps:
        tracker.log(step, {"tokens": step * 100, "train/loss": 1 / step})
        folder = run_dir / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "weights").write_text(f"{step}")
        tracker.log_checkpoint(folder)
        after_checkpoint(folder)
    for _ in range(600):  # a run lasts longer than W&B takes to start
        if len(list(run_dir.glob("wandb/offline-run-*/*.wandb"))) > before:
            break
        time.sleep(0.1)
    start = time.perf_counter()
    tracker.close(status)
    return time.perf_counter() - start


def records(path):
    """Of a `.wandb` file: LevelDB's log format, behind a header of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def histories(run_dir):
    """Of each offline file: id and name of the run, losses by step, files of artifacts."""
    sys.modules["wandb"].teardown()  # as at the end of a process: its service writes the last records
    found = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        run, losses, files = None, {}, []
        for record in records(path):
            if record.HasField("run"):
                run = record.run.run_id, record.run.display_name
            for item in record.history.item:
                if (item.key or item.nested_key[0]) == "train/loss":
                    losses[record.history.step.num] = item.number or json.loads(item.value_json)
            for artifact in (record.artifact, record.request.log_artifact.artifact):
                files += [file.path for file in artifact.manifest.contents]
        found.append((run, losses, files))
    return found


def test_resumes_are_one_run_in_the_run_folder(wandb, run_dir, tmp_path, caplog):
    assert track(run_dir, [1, 2], "KILLED") < 5
    time.sleep(1)  # W&B names its folders by the second
    assert track(run_dir, [3]) < 5
    (first, second) = histories(run_dir)
    assert first[0] == second[0] and first[0][1] == "my-run"
    assert (first[1], second[1]) == ({1: 1.0, 2: 0.5}, {3: 1 / 3})
    assert first[2] == second[2] == []
    assert "does not answer; `wandb sync" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}


def test_checkpoints_are_artifacts_when_asked_for(wandb, run_dir, tmp_path):
    track(run_dir, [1, 2], wandb_checkpoints=True)
    ((_, _, files),) = histories(run_dir)
    assert files == ["weights", "weights"]
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}


def test_a_checkpoint_that_is_pruned_at_once_is_sent(wandb, run_dir):
    track(run_dir, [1, 2], after_checkpoint=shutil.rmtree, wandb_checkpoints=True)
    ((_, _, files),) = histories(run_dir)
    assert files == ["weights", "weights"]
    kept = sorted(run_dir.glob("wandb/offline-run-*/checkpoints/*/weights"))  # for `wandb sync`
    assert [path.read_text() for path in kept] == ["1", "2"]
    assert not list(run_dir.glob("wandb/artifacts/staging/*"))


def test_a_checkpoint_is_kept_by_links_as_long_as_there_is_room(wandb, run_dir, monkeypatch, caplog):
    def check(folder):
        assert (folder / "weights").stat().st_nlink == 2

    track(run_dir, [1], after_checkpoint=check, wandb_checkpoints=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2))
    track(run_dir, [2], wandb_checkpoints=True)
    assert f"{run_dir}/checkpoints/step-2 is not sent (the disk is nearly full)" in caplog.text


def test_a_task_that_fails_stops_no_other(wandb, run_dir, caplog):
    def lose(folder):
        if folder.name == "step-1":
            shutil.rmtree(run_dir / "wandb" / "checkpoints" / folder.name)

    track(run_dir, [1, 2], after_checkpoint=lose, wandb_checkpoints=True)
    ((_, losses, files),) = histories(run_dir)
    assert losses == {1: 1.0, 2: 0.5} and files == ["weights"]
    assert "W&B: not everything is sent (FileNotFoundError" in caplog.text


def test_what_a_killed_run_did_not_get_to_is_sent_by_the_next(wandb, run_dir):
    left = run_dir / "wandb" / "checkpoints" / "step-1"
    left.mkdir(parents=True)
    (left / "left").touch()
    track(run_dir, [2])
    ((_, _, files),) = histories(run_dir)
    assert files == ["left"] and not left.exists()


@pytest.fixture
def server(wandb, monkeypatch, tmp_path):
    """A server that has begun to store a checkpoint when a run ends."""
    for name, value in (("asked", []), ("stored", threading.Event()), ("silent", False)):
        monkeypatch.setattr(WandbServer, name, value)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    with serving(WandbServer) as address:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://{address}")
        yield WandbServer
        WandbServer.stored.set()


def until_asked(server, what):
    for _ in range(300):
        if what in server.asked:
            return
        time.sleep(0.1)
    raise AssertionError(server.asked)


def track_upload(run_dir, server, at_end):
    """Seconds that the end of a run takes whose checkpoint is being uploaded."""
    settings = TrackingSettings(mlflow=False, wandb=True, wandb_checkpoints=True)
    tracker = RunTracker(run_dir, settings, run_dir, "my-run", {"x": 1})
    folder = run_dir / "checkpoints" / "step-1"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("1")
    tracker.log_checkpoint(folder)
    tracker.log(1, {"tokens": 100, "train/loss": 1.0})
    until_asked(server, "weights")
    at_end()
    start = time.perf_counter()
    tracker.close("FINISHED")
    return time.perf_counter() - start


def kept_checkpoints(run_dir):
    """Those that the next run sends."""
    return [*run_dir.glob("wandb/checkpoints/*")]


def test_an_upload_gets_the_time_that_it_takes(server, run_dir, tmp_path):
    assert track_upload(run_dir, server, threading.Timer(8, server.stored.set).start) > 8
    assert "CommitArtifact" in server.asked and '"exitcode":0' in "".join(server.asked)
    assert kept_checkpoints(run_dir) == []
    copies = [*run_dir.glob("wandb/artifacts/staging/*"), *(tmp_path / "cache").rglob("obj/*")]
    assert [path for path in copies if path.is_file()] == []


def test_an_upload_to_a_server_that_has_gone_costs_seconds(server, run_dir, monkeypatch, caplog):
    assert track_upload(run_dir, server, lambda: monkeypatch.setattr(server, "silent", True)) < 5
    assert "`wandb sync " in caplog.text
    assert [path.name for path in kept_checkpoints(run_dir)] == ["step-1"]


def test_a_checkpoint_that_was_pruned_while_the_server_was_away_is_sent_by_sync(wandb, run_dir, monkeypatch):
    track(run_dir, [1], after_checkpoint=shutil.rmtree, wandb_checkpoints=True)
    wandb.teardown()
    monkeypatch.setattr(WandbServer, "asked", asked := [])
    monkeypatch.setattr(WandbServer, "stored", threading.Event())
    WandbServer.stored.set()
    (folder,) = run_dir.glob("wandb/offline-run-*")
    with serving(WandbServer) as address:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://{address}")
        subprocess.run([sys.executable, "-m", "wandb", "sync", str(folder)], check=True, timeout=60)
    assert "weights" in asked and "CommitArtifact" in asked


def test_a_server_that_hangs_costs_seconds(wandb, run_dir, monkeypatch, caplog):
    with hanging() as address:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://{address}")
        assert track(run_dir, [1]) < 5
    ((_, losses, _),) = histories(run_dir)
    assert losses == {1: 1.0}


@pytest.mark.parametrize(("key", "line"), [(False, "nobody has logged in"), (True, "`wandb sync ")])
def test_a_key_that_is_missing_or_refused_asks_no_question(wandb, run_dir, monkeypatch, caplog, key, line):
    if not key:
        monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(run_dir / "none"))
    with serving(answering(401, b"{}")) as address:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://{address}")
        assert track(run_dir, [1]) < 5
    assert line in caplog.text and histories(run_dir)[0][1] == {1: 1.0}


def test_without_the_package_it_is_refused(run_dir, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tracking.wandb=true: the package wandb is not installed"):
        track(run_dir, [])
