"""Preparations that are killed at any moment go on, and end as one that nobody disturbed."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from itertools import count

import pytest
from left_behind import contents, running

from dynamic_transformers.data.prepare import prepare, work_folder

# Forked, and so are their workers: imports are done, and a kill hits nothing but the step.
FORK = multiprocessing.get_context("fork")
KILLS = 50
MOST_KILLS = 4  # until one is let end
# What is done to files between two of these leaves nothing else on the disk.
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "ctypes.dlsym"}


@pytest.fixture(autouse=True)
def one_revision(monkeypatch):
    """Somebody may edit files of the repository meanwhile."""
    monkeypatch.setenv("DYNAMIC_TRANSFORMERS_REVISION", "tried")


class Run:
    """A preparation by a process and its two workers, in a process group of their own.

    Args:
        by: "parent" or "worker": whose file events count.
        event: before this one of them the parent is killed; None: never.
    """

    def __init__(self, settings, folder, force=False, by="parent", event=None):
        self.events = FORK.Value("i", 0)
        self.process = FORK.Process(target=self._prepare, args=(settings, folder, force, by, event))
        self.process.start()

    def _prepare(self, settings, folder, force, by, event):
        os.setsid()
        parent = os.getpid()

        def note(name, _):
            if name in EVENTS and (os.getpid() == parent) == (by == "parent"):
                with self.events:
                    self.events.value += 1
                    if self.events.value == event:
                        os.kill(parent, signal.SIGKILL)

        sys.addaudithook(note)
        multiprocessing.get_context = lambda _: FORK
        prepare(settings, folder, force)

    def ended(self, seconds=None):
        """Its exit code once it and its workers have ended; it is killed after so many seconds."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        deadline = time.monotonic() + 10
        while running(self.process.pid):
            assert time.monotonic() < deadline, "a worker outlives its parent"
            time.sleep(0.005)
        return self.process.exitcode


def test_a_preparation_that_is_killed_ends_as_if_it_had_not_been(make_settings, mixed_sources, tmp_path):
    settings = make_settings(mixed_sources, processes=2)
    others = make_settings(mixed_sources, processes=2, block_size=64)
    events, seconds, ends = {}, 0.0, {}
    for by in ("parent", "worker"):
        start = time.monotonic()
        run = Run(settings, tmp_path / by, by=by)
        assert run.ended() == 0
        events[by], seconds = run.events.value, time.monotonic() - start
        ends[by] = contents(tmp_path / by)
    assert Run(others, tmp_path / "others").ended() == 0
    straight, old = ends["parent"], contents(tmp_path / "others")
    assert straight == ends["worker"] != old and events["parent"] > 100 < events["worker"]

    chance = random.Random(0)
    kills = went_on = 0
    for turn in count():
        if kills >= KILLS:
            break
        folder = tmp_path / str(turn) / "data"
        replaces = chance.random() < 0.5
        if replaces:
            shutil.copytree(tmp_path / "others", folder)
        for _ in range(chance.randint(1, MOST_KILLS)):
            by = chance.choice(["parent", "worker", "clock"])
            if by == "clock":
                code = Run(settings, folder, replaces).ended(chance.uniform(0, seconds))
            else:
                code = Run(settings, folder, replaces, by, chance.randint(1, events[by])).ended()
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
            there = contents(folder)
            assert there == straight or there == (old if replaces else {})
            went_on += any(work_folder(folder).glob("[0-9a-f]*"))
        assert Run(settings, folder, replaces).ended() == 0
        assert contents(folder) == straight
        assert [path.name for path in folder.parent.iterdir()] == ["data"]
    assert went_on > KILLS / 5  # with shards that were finished before
