"""What goes wrong while data are prepared: one line, nothing half-made, and the next start goes on."""

import json
import logging
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from left_behind import contents, running
from stopping_server import serving

from dynamic_transformers.command_line import machine_failure
from dynamic_transformers.data import first_pass
from dynamic_transformers.data.blocks import Blocks
from dynamic_transformers.data.prepare import prepare, work_folder
from dynamic_transformers.manifest import MANIFEST, read_manifest
from dynamic_transformers.settings import UserError

FORK = multiprocessing.get_context("fork")
SECONDS = 60  # after which a test has failed
AT_ONCE = 10  # seconds, most of them of a busy machine: the interpreter's own end takes one of its time
# A file system that holds shards and not what is made of them, then one that holds all, then a read-only one.
DISK = """
mount -t tmpfs -o size={size} none {disk} || exit 77
{command}; echo "ended with $?"
ls -A {disk}
mount -o remount,size=1g {disk}
{command}; echo "ended with $?"
mount -o remount,ro {disk}
{command}; echo "ended with $?"
cp -r {disk}/data {copy}
"""


@pytest.fixture(autouse=True)
def one_revision(monkeypatch):
    """Somebody may edit files of the repository meanwhile."""
    monkeypatch.setenv("DYNAMIC_TRANSFORMERS_REVISION", "tried")


@pytest.fixture
def corpus(mixed_sources, tmp_path):
    """Sources whose files a test may change; the tokenizer is made, so that nothing is read beforehand."""
    folder = tmp_path / "corpus"
    shutil.copytree(Path(mixed_sources[0]["data_files"]).parent, folder)
    return [
        source | {"data_files": str(folder / Path(source["data_files"]).name)} for source in mixed_sources
    ]


@pytest.fixture(scope="module")
def tokenizer(mixed_sources, make_settings, tmp_path_factory):
    folder = prepare(make_settings(mixed_sources), tmp_path_factory.mktemp("first") / "data")
    return str(folder / "tokenizer")


@pytest.fixture
def settings_of(make_settings, tokenizer):
    return partial(make_settings, tokenizer_name=tokenizer, processes=1)


def finished_shards(folder):
    """Name → when it was made, of each finished shard."""
    work = work_folder(folder)
    return {path.name: path.stat().st_ctime_ns for path in work.glob("[0-9a-f]*")} if work.exists() else {}


def assert_nothing_looks_finished(folder):
    assert not folder.exists()
    assert not [path for path in folder.parent.glob(f".{folder.name}.*") if path != work_folder(folder)]


def goes_on(settings, folder, before, caplog):
    """Prepare again: the shards that were finished before are not made again, and nothing else is left."""
    caplog.clear()
    with caplog.at_level("INFO", "dynamic_transformers"):
        made = []
        encode = first_pass._encode
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(first_pass, "_encode", lambda job: made.append(job.folder.name) or encode(job))
            prepare(settings, folder)
    assert f"{len(before)} of " in caplog.text and "shards are there from before" in caplog.text
    assert made and not set(made) & set(before)
    assert not list(folder.parent.glob(f".{folder.name}.*"))
    straight = prepare(settings, folder.with_name("straight"))
    assert contents(folder) == contents(straight)


@pytest.mark.parametrize("name", ["2.parquet", "2.jsonl.gz"])  # damaged behind its beginning, and cut off
def test_a_file_that_is_not_whole_stops_it_and_once_it_is_it_goes_on(
    name, corpus, settings_of, tmp_path, caplog
):
    file, folder = tmp_path / "corpus" / name, tmp_path / "data"
    whole = file.read_bytes()
    third = len(whole) // 3
    file.write_bytes(whole[:third] + (bytes(third) + whole[2 * third :] if name == "2.parquet" else b""))
    with pytest.raises(UserError, match=f"{name} is cut off or damaged") as told:
        prepare(settings_of(corpus), folder)
    assert "\n" not in str(told.value)
    assert_nothing_looks_finished(folder)
    file.write_bytes(whole)
    goes_on(settings_of(corpus), folder, finished_shards(folder), caplog)


def once_a_shard_is_there(action):
    """Do something in this process when the first shard of its preparation is done."""
    waiting = [action]

    def note(name, arguments):
        if name == "os.rename" and Path(arguments[1]).parent.suffix == ".shards" and waiting:
            waiting.pop()()

    sys.addaudithook(note)


def told_by(process, lines):
    process.join(SECONDS)
    assert process.exitcode == 2
    return lines.read_text()


def started(settings, folder, lines, action=None):
    """Another process that prepares, which logs to a file."""

    def run():
        logger = logging.getLogger("dynamic_transformers")
        logger.addHandler(logging.FileHandler(lines))
        logger.setLevel(logging.INFO)
        if action:
            once_a_shard_is_there(action)
        try:
            prepare(settings, folder)
        except UserError as error:
            logger.error("error: %s", error)
            sys.exit(2)

    process = FORK.Process(target=run, daemon=True)
    process.start()
    return process


def append(file):
    with file.open("a") as stream:
        stream.write(json.dumps({"text": "a line that somebody adds " * 9}) + "\n")


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (Path.unlink, "2.jsonl cannot be read before its first row: [Errno 2] No such file"),
        (append, "2.jsonl was changed while it was read; run the same command again"),
    ],
    ids=["goes away", "changes"],
)
def test_a_file_that_goes_away_or_changes_in_the_middle(action, words, corpus, settings_of, tmp_path, caplog):
    file, folder = tmp_path / "corpus" / "2.jsonl", tmp_path / "data"
    whole, settings = file.read_bytes(), settings_of(corpus)
    process = started(settings, folder, tmp_path / "log", lambda: action(file))
    assert words in told_by(process, tmp_path / "log")
    assert_nothing_looks_finished(folder)
    before = finished_shards(folder)
    assert len(before) == 2
    file.write_bytes(whole)
    goes_on(settings, folder, before, caplog)


def test_a_file_that_changes_after_it_was_read_is_noticed(corpus, settings_of, tmp_path):
    file, folder = tmp_path / "corpus" / "0.jsonl", tmp_path / "data"
    process = started(settings_of(corpus), folder, tmp_path / "log", lambda: append(file))
    assert "0.jsonl has changed" in told_by(process, tmp_path / "log")
    assert_nothing_looks_finished(folder)


@pytest.fixture
def server(make_texts):
    rest = "x" * 20_000  # more than is asked for at once
    rows = [{"text": text, "rest": rest} for text in make_texts(600, seed=99)]
    lines = [f"{json.dumps(row)}\n".encode() for row in rows]
    with serving({"/a.jsonl": b"".join(lines[::2]), "/b.jsonl": b"".join(lines[1::2])}) as server:
        yield server


@pytest.fixture
def with_a_server(corpus, server):
    """Three files here, and two behind URLs."""
    place = f"http://127.0.0.1:{server.server_port}"
    far = [
        {"name": f"far-{name}", "path": "json", "data_files": f"{place}/{name}.jsonl", "streaming": True}
        for name in "ab"
    ]
    return [*corpus[:3], *far]


def test_a_server_that_breaks_off(with_a_server, server, settings_of, tmp_path, caplog):
    settings = settings_of(with_a_server)
    server.then = "break off"
    with pytest.raises(UserError, match=r"cannot read http://.*/a.jsonl after row \d+: ") as told:
        prepare(settings, tmp_path / "data")
    assert "\n" not in str(told.value)
    assert_nothing_looks_finished(tmp_path / "data")
    before = finished_shards(tmp_path / "data")
    assert len(before) == 3
    server.then = "go on"
    goes_on(settings, tmp_path / "data", before, caplog)


def cli(folder, settings, **data):
    """The command that prepares by these settings, with two processes; its configuration lies in `folder`."""
    asked = yaml.safe_load(json.dumps(settings, default=vars))["data"] | data
    config = {"defaults": ["default"], "data": asked, "run": {"output_dir": str(folder / "runs")}}
    (folder / "it.yaml").write_text(yaml.safe_dump(config))
    command = ("-m", "dynamic_transformers.cli", "prepare", "--config-dir", str(folder), "--config-name=it")
    return [sys.executable, *command]


def test_signals_and_a_killed_process_end_it_with_one_line(
    with_a_server, server, settings_of, tmp_path, caplog
):
    settings, folder = settings_of(with_a_server), tmp_path / "data"
    command = cli(tmp_path, settings, processes=2, output_dir=str(folder))
    server.then, before = "wait", {}
    for kind, code, line in (
        ("INT", 130, "data: interrupted; finished shards stay, and the same command goes on from there"),
        ("TERM", 143, "data: interrupted; finished shards stay, and the same command goes on from there"),
        ("KILL", 2, "error: a process that tokenized was killed, usually for want of memory"),
    ):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        ) as process:
            deadline = time.monotonic() + SECONDS
            shards = 0 if kind == "INT" else 3  # the first comes while the processes begin
            while len(finished_shards(folder)) < shards or len(running(process.pid)) < 4:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(1)
            start = time.monotonic()
            if kind == "INT":
                # As a terminal's Ctrl-C, which the first process happens to notice last.
                for each in sorted(running(process.pid), reverse=True):
                    os.kill(each, signal.SIGINT)
                    time.sleep(0.3)
            elif kind == "TERM":
                process.terminate()
            else:
                os.kill(max(running(process.pid)), signal.SIGKILL)
            output, _ = process.communicate(timeout=SECONDS)
            seconds = time.monotonic() - start
        lines = output.splitlines()
        assert process.returncode == code and line in lines[-1] and "Traceback" not in output
        assert "3 of 5 shards are there from before" in output or not before
        assert seconds < AT_ONCE
        while running(process.pid):  # what multiprocessing tidies up with ends last
            assert time.monotonic() < start + AT_ONCE
        assert not folder.exists() and finished_shards(folder) == (before or finished_shards(folder))
        before = finished_shards(folder)
    server.then = "go on"
    goes_on(settings, folder, before, caplog)


def test_a_full_disk_is_told_in_one_line_and_with_more_room_it_goes_on(corpus, settings_of, tmp_path):
    settings, disk, copy = settings_of(corpus), tmp_path / "disk", tmp_path / "copy"
    straight = contents(prepare(settings, tmp_path / "straight"))
    disk.mkdir()
    command = cli(tmp_path, settings, output_dir=str(disk / "data"))
    size = 20 * 4096 + sum(-(-len(data) // 4096) * 4096 for data in straight.values())
    script = DISK.format(size=size, disk=disk, command=shlex.join(command), copy=copy)
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("nothing can be mounted here")
    assert re.findall(r"ended with (\d)", done.stdout) == ["1", "0", "0"]
    full, larger, read_only = re.split(r"ended with \d\n", done.stdout)[:3]
    assert larger.startswith(".data.shards\n") and "from before" not in full
    assert re.search(r"[1-6] of 7 shards are there from before", larger) and "is finished" in read_only
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: [Errno 28] No space left on device: '{disk}/data")
    assert contents(copy) == straight


def test_an_index_that_does_not_fit_is_told_in_one_line(make_source, make_texts, settings_of, tmp_path):
    records = [{"text": text} for text in make_texts(1000, low=1, high=3)]
    settings = settings_of([make_source("short", records=records)], min_characters=1)

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (48_000, 48_000))
        try:
            prepare(settings, tmp_path / "data")
        except OSError as error:
            line = f"[Errno 27] File too large: '{tmp_path}/data'; what was finished stays"
            sys.exit(3 if (machine_failure(error) or "").startswith(line) else str(error))

    process = FORK.Process(target=run)
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 3
    assert_nothing_looks_finished(tmp_path / "data")


def test_two_that_prepare_the_same_folder_take_turns_and_other_settings_are_refused(
    with_a_server, server, settings_of, tmp_path
):
    settings, folder = settings_of(with_a_server), tmp_path / "data"
    server.then = "wait"
    first = started(settings, folder, tmp_path / "first")
    deadline = time.monotonic() + SECONDS
    while not finished_shards(folder):
        assert first.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    second = started(settings, folder, tmp_path / "second")
    others = started(settings_of(with_a_server, block_size=64), folder, tmp_path / "others")
    for lines in (tmp_path / "second", tmp_path / "others"):
        while not (lines.exists() and f"waiting for process {first.pid} on" in lines.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    server.then = "go on"
    for process in (first, second):
        process.join(SECONDS)
        assert process.exitcode == 0
    assert f"data: {folder} is finished" in (tmp_path / "second").read_text()
    assert "holds data of other settings: data.block_size=64 (there 32)" in told_by(
        others, tmp_path / "others"
    )
    assert contents(folder) == contents(prepare(settings, tmp_path / "straight"))
    assert not list(tmp_path.glob(".data.*"))


def blocks(folder):
    manifest = read_manifest(folder)
    return Blocks(folder / "train", manifest["splits"]["train"], manifest["block_size"])


def values(data):
    return [
        np.stack([data.input_ids(place), data.position_ids(place)]).tobytes() for place in range(len(data))
    ]


def test_who_reads_data_goes_on_with_them_while_they_are_replaced(corpus, settings_of, tmp_path):
    folder = prepare(settings_of(corpus), tmp_path / "data")
    before, reader = values(blocks(folder)), blocks(folder)
    prepare(settings_of(corpus, seed=1), folder, force=True)
    assert values(reader) == before != values(blocks(folder))


@pytest.fixture
def interrupted(corpus, settings_of, tmp_path):
    """A folder of which two shards were finished when a file was gone, which is back."""
    file = tmp_path / "corpus" / "2.jsonl"
    whole = file.read_bytes()

    def prepare_a_part(folder, **data):
        told_by(started(settings_of(corpus, **data), folder, tmp_path / "log", file.unlink), tmp_path / "log")
        file.write_bytes(whole)
        assert len(finished_shards(folder)) == 2

    return prepare_a_part


@pytest.mark.parametrize("of", ["other settings", "another version"])
def test_shards_of_others_are_not_taken(of, interrupted, corpus, settings_of, tmp_path, caplog, monkeypatch):
    folder = tmp_path / "data"
    with monkeypatch.context() as patch:
        if of == "another version":
            patch.setattr(first_pass, "_program", lambda: ["of last year"])
        interrupted(folder, **({"min_characters": 5} if of == "other settings" else {}))
    (work_folder(folder) / ".0123.new-4567").mkdir()
    caplog.set_level("INFO", "dynamic_transformers")
    prepare(settings_of(corpus), folder)
    assert "from before" not in caplog.text
    assert contents(folder) == contents(prepare(settings_of(corpus), tmp_path / "straight"))
    assert not list(tmp_path.glob(".data.*"))


def test_shards_lie_where_a_link_leads(interrupted, corpus, settings_of, tmp_path, caplog):
    place = tmp_path / "other disk" / "place"
    place.mkdir(parents=True)
    (tmp_path / "data").symlink_to(place)
    interrupted(tmp_path / "data")
    assert work_folder(place).is_dir() and not work_folder(place).is_relative_to(tmp_path / "data")
    assert not list(tmp_path.glob(".data.*"))
    goes_on(settings_of(corpus), tmp_path / "data", finished_shards(place), caplog)
    assert (tmp_path / "data").is_symlink() and (place / MANIFEST).is_file()
    assert [path.name for path in place.parent.iterdir()] == ["place"]
