"""How far a part of the step is, as a log tells it."""

import logging
import threading
import time
from types import SimpleNamespace

import pytest

from dynamic_transformers.data import progress
from dynamic_transformers.data.progress import Progress, ReadingProgress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets; lines are logged all the time."""
    seconds = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    monkeypatch.setattr(progress, "SECONDS", 0.005)

    def add(count):
        seconds[0] += count

    return add


@pytest.fixture
def line(caplog):
    """What is logged from now on."""
    caplog.set_level(logging.INFO, "dynamic_transformers")

    def read():
        caplog.clear()
        patience = time.monotonic() + 20
        while len(caplog.messages) < 2:  # the first may have been made before
            assert time.monotonic() < patience
            time.sleep(0.005)
        return caplog.messages[1]

    return read


def test_lines_say_how_far_how_fast_and_how_long(clock, line):
    with Progress("packing", 4000, "tokens") as told:
        clock(10)
        assert line() == "packing: 0 tokens/s"  # how long cannot be told
        clock(15)
        told.add(1000)
        assert line() == "packing: 40 tokens/s  25 %  ETA 1:15"
        clock(75)
        told.add(1000)
        assert line() == "packing: 20 tokens/s  50 %  ETA 1:40"
        told.add(2000)
        assert line() == "packing: 40 tokens/s  100 %  ETA 0:00"
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_shards_that_are_not_finished_count(clock, line):
    begun = [0]
    with ReadingProgress("tokenizing", 4, 4000, lambda: begun[0]) as told:
        clock(10)
        assert line() == "tokenizing: 0/4 shards"
        begun[0] = 30_000
        assert line() == "tokenizing: 0/4 shards  3,000 tokens/s"
        clock(10)
        begun[0] = 0
        told.finish(1000, 50_000)
        assert line() == "tokenizing: 1/4 shards  2,500 tokens/s  25 %  ETA 1:00"
        clock(20)
        begun[0] = 50_000
        assert line() == "tokenizing: 1/4 shards  2,500 tokens/s  50 %  ETA 0:40"
        begun[0] = 500_000  # more than there are bytes for
        assert line().endswith("100 %  ETA 0:00")


def test_what_has_no_size_is_no_fault(clock, line):
    with ReadingProgress("reading", 2, 0) as told:
        clock(10)
        told.finish(0)
        assert line() == "reading: 1/2 shards"


def test_what_is_soon_done_says_nothing(caplog):
    caplog.set_level(logging.INFO, "dynamic_transformers")
    with Progress("packing", 10, "tokens") as told:
        told.add(10)
    assert caplog.messages == []
