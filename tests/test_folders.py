"""One writer of a folder at a time; folders that are whole whenever anybody looks; the umask's modes."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dynamic_transformers import folders
from dynamic_transformers.folders import put_in_place, set_aside, sole_writer
from dynamic_transformers.manifest import fresh_folder, write_json, write_manifest
from dynamic_transformers.settings import UserError

FORK = multiprocessing.get_context("fork")


def hold(folder, held):
    with sole_writer(folder):
        folders.new_sibling(folder)
        held.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that writes `tmp_path/out`."""
    held = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path / "out", held), daemon=True)
    process.start()
    held.wait()
    yield process
    process.kill()
    process.join()


def test_a_second_writer_is_told_of_the_first(holder, tmp_path):
    line = rf"out: process {holder.pid} on {socket.gethostname()} writes there now"
    with pytest.raises(UserError, match=line), sole_writer(tmp_path / "out"):
        pass


def test_a_dead_writers_lock_is_taken_over_and_what_it_left_removed(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert len(list(tmp_path.glob(".out.*"))) == 2  # its lock and its unfinished folder
    with sole_writer(tmp_path / "out"):
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    assert not list(tmp_path.iterdir())


def test_a_writer_that_waits_gets_its_turn(holder, tmp_path, caplog):
    caplog.set_level("INFO", "dynamic_transformers")
    killed = []
    threading.Timer(0.3, lambda: (killed.append(True), holder.kill())).start()
    with sole_writer(tmp_path / "out", wait=True):
        assert killed
    assert f"waiting for process {holder.pid}" in caplog.text


def test_a_writer_that_waits_says_so_again(holder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(folders, "SECONDS_OF_SILENCE", 0.5)
    caplog.set_level("INFO", "dynamic_transformers")
    threading.Timer(2.2, holder.kill).start()
    with sole_writer(tmp_path / "out", wait=True):
        pass
    first, *again = caplog.messages
    assert (
        first
        == f"waiting for process {holder.pid} on {socket.gethostname()}, which writes {tmp_path / 'out'}"
    )
    assert again[0] == f"{first} (for 1 s)" and 2 <= len(again) <= 4


def write_many(folder, count):
    for _ in range(count):
        with fresh_folder(folder) as temporary:
            for name in ("a", "b"):
                (temporary / name).write_text(str(os.getpid()))


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_whole_at_every_moment_of_many_kills(exchanges, tmp_path, monkeypatch):
    if not exchanges:  # as on file systems that cannot swap two folders
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    folder = tmp_path / "out"
    write_many(folder, 1)
    missing = 0
    for turn in range(40):
        process = FORK.Process(target=write_many, args=(folder, 10**6), daemon=True)
        process.start()
        time.sleep(0.005 + 0.0007 * turn)
        process.kill()
        process.join()
        missing += not folder.exists()
        with sole_writer(folder):
            assert (folder / "a").read_text() == (folder / "b").read_text() != ""
            assert not list(tmp_path.glob(".out.new-*"))
    assert not (exchanges and missing)


def test_a_link_is_filled_and_stays_a_link(tmp_path):
    (tmp_path / "disk" / "place").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "place")
    for text in ("old", "new"):
        with fresh_folder(tmp_path / "out", "train") as temporary:
            (temporary / "x").write_text(text)
            write_manifest(temporary, "train", {}, {})
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "place" / "x").read_text() == "new"


def test_what_cannot_be_replaced_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    for place, message in (
        ("/proc", "is a mount point"),
        (".", "is the working folder"),
        ("file", "is a file"),
        ("/proc/x/out", "cannot be made"),
    ):
        worked = False
        with pytest.raises(UserError, match=message), fresh_folder(Path(place)):
            worked = True
        assert not worked


@pytest.mark.parametrize(
    ("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)]
)
def test_modes_are_those_of_the_umask(umask, file_mode, folder_mode, tmp_path):
    before = os.umask(umask)
    try:
        with fresh_folder(tmp_path / "out", "train") as temporary:
            write_manifest(temporary, "train", {}, {})
        write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    files = (tmp_path / "out" / "manifest.json", tmp_path / "x.json")
    assert all(path.stat().st_mode & 0o777 == file_mode for path in files)
    assert (tmp_path / "out").stat().st_mode & 0o777 == folder_mode


def test_folders_set_aside_do_not_replace_one_another(tmp_path):
    for text in ("one", "two"):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "x").write_text(text)
        set_aside(tmp_path / "run")
    assert sorted((path / "x").read_text() for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_what_is_replaced_is_kept(exchanges, tmp_path, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    for name in ("run", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    aside = folders.replace(tmp_path / "new", tmp_path / "run")
    assert aside.name.startswith("run.replaced-") and (aside / "x").read_text() == "run"
    assert (tmp_path / "run" / "x").read_text() == "new" and not (tmp_path / "new").exists()


def test_a_lock_that_the_file_system_does_not_know_is_done_without(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(folders.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folders.fcntl, "flock", refuse)
    with sole_writer(tmp_path / "out"):
        pass
    assert "this file system has no locks" in caplog.text


def test_contents_are_on_the_disk_before_they_are_in_place(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(
        folders.os, "fsync", lambda handle: order.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
    )
    new = folders.new_sibling(tmp_path / "out")
    (new / "deep").mkdir()
    (new / "deep" / "x").write_text("x")
    put_in_place(new, tmp_path / "out")
    assert order == [str(new / "deep" / "x"), str(new / "deep"), str(new), str(tmp_path)]


def take_turns(folder, count):
    for _ in range(count):
        with sole_writer(folder, wait=True):
            (folder.parent / "inside").touch(exist_ok=False)
            (folder.parent / "inside").unlink()


def test_many_that_wait_take_turns(tmp_path):
    family = [FORK.Process(target=take_turns, args=(tmp_path / "out", 150), daemon=True) for _ in range(4)]
    for process in family:
        process.start()
    for process in family:
        process.join()
    assert [process.exitcode for process in family] == [0, 0, 0, 0]


def hold_with_a_child(folder, told):
    with sole_writer(folder):
        child = FORK.Process(target=time.sleep, args=(60,))  # as the worker of a data loader
        child.start()
        told.put(child.pid)
        time.sleep(60)


def test_a_lock_ends_with_its_process_though_a_fork_of_it_lives(tmp_path):
    told = FORK.Queue()
    process = FORK.Process(target=hold_with_a_child, args=(tmp_path / "out", told))
    process.start()
    child = told.get()
    process.kill()
    process.join()
    try:
        os.kill(child, 0)  # it lives
        with sole_writer(tmp_path / "out"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_what_nobody_can_write_needs_no_lock(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(folders.errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may write everywhere
    with sole_writer(tmp_path / "out"):
        pass


def python_writes():
    Path("/dev/full").write_text("x")


def safetensors_writes():
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("write", [python_writes, safetensors_writes])
def test_a_full_disk_leaves_what_was_there(write, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("old")
    with pytest.raises(Exception, match="No space left on device"), fresh_folder(tmp_path / "out"):
        write()
    assert (tmp_path / "out" / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
