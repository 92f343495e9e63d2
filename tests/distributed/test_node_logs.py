"""What nodes printed, on a volume on which files vanish."""

import errno
import json
import os
from pathlib import Path

import pytest

from dynamic_transformers.launch import node_logs
from dynamic_transformers.launch.node_logs import NodeLogs


def process_of(folder, rank):
    process = folder / f"node-{rank}" / "none_x" / "attempt_0" / "0"
    process.mkdir(parents=True)
    return process


def write_error(process, message, at=0):
    content = {"message": {"message": message, "extraInfo": {"py_callstack": f"Traceback of {message}"}}}
    (process / "error.json").write_text(json.dumps(content))
    os.utime(process / "error.json", (at, at))


@pytest.fixture
def stale(monkeypatch):
    """Files that cannot be looked at or opened any more; by the names of what fails."""
    paths, methods = set(), set()

    def failing(name, method):
        def call(path, *arguments, **options):
            if path in paths and name in methods:
                raise OSError(errno.ESTALE, "Stale file handle")
            return method(path, *arguments, **options)

        return call

    for name in ("stat", "open"):
        monkeypatch.setattr(Path, name, failing(name, getattr(Path, name)))
    monkeypatch.setattr(os, "scandir", failing("scandir", os.scandir))
    return paths, methods


@pytest.mark.parametrize("method", ["stat", "open"])
def test_a_file_that_cannot_be_read_does_not_hide_the_others(method, stale, tmp_path, lines):
    paths, methods = stale
    logs = NodeLogs(tmp_path)
    first, second = process_of(tmp_path, 0), process_of(tmp_path, 1)
    write_error(first, "ValueError: of node 0")
    write_error(second, "UserError: of node 1", at=1)
    paths.add(first / "error.json")
    methods.add(method)
    assert logs.mistake() == "of node 1"
    logs.show_exceptions()
    assert lines.messages[-1].endswith("Traceback of UserError: of node 1")


def test_a_folder_that_cannot_be_read_holds_nothing(stale, tmp_path, lines):
    paths, methods = stale
    paths.add(str(tmp_path))
    methods.add("scandir")
    logs = NodeLogs(tmp_path)
    assert logs.mistake() == ""
    logs.show_exceptions()
    logs.show_end()
    assert lines.messages == [f"no node has printed anything to {tmp_path}"]


def test_a_half_written_error_is_read_again(tmp_path):
    logs = NodeLogs(tmp_path)
    process = process_of(tmp_path, 0)
    (process / "error.json").write_text('{"message": {"mess')
    assert logs.mistake() == ""
    write_error(process, "UserError: too many blocks")
    assert logs.mistake() == "too many blocks" and logs.mistake() == ""


def test_of_a_long_output_only_the_end_is_read(tmp_path, lines, monkeypatch):
    output = process_of(tmp_path, 0) / "stdout.log"
    output.write_text("first\n" + "\u00e9" * node_logs.LAST_BYTES + "\nlast")
    read = []
    monkeypatch.setattr(
        node_logs, "tail", lambda path, tail=node_logs.tail: read.append(tail(path)) or read[-1]
    )
    NodeLogs(tmp_path).show_end()
    assert len(read[0].encode("utf-8", "replace")) <= node_logs.LAST_BYTES + 3 and "first" not in read[0]
    assert lines.messages[-1].endswith("\nlast")
