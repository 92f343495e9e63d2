"""How far the tokenization is, as a log tells it."""

import logging

import pytest

from dynamic_transformers.data import progress
from dynamic_transformers.data.progress import ReadingProgress


@pytest.fixture
def lines(caplog, monkeypatch):
    """Does shards, each of some seconds, bytes and tokens, and returns what was logged."""
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    caplog.set_level(logging.INFO, "dynamic_transformers")

    def run(size, steps):
        with ReadingProgress(len(steps), size) as told:
            assert told.bar is None  # no terminal
            for seconds, done, tokens in steps:
                clock[0] += seconds
                told.add(done, tokens)
        return caplog.messages

    return run


def test_lines_say_how_far_how_fast_and_how_long(lines):
    assert lines(4000, [(25, 1000, 50_000), (25, 1000, 100_000), (100, 1900, 0), (50, 100, 50_000)]) == [
        "tokenizing: 1/4 shards  2,000 tokens/s  25 %  ETA 1:15",
        "tokenizing: 2/4 shards  3,000 tokens/s  50 %  ETA 0:50",
        "tokenizing: 3/4 shards  1,000 tokens/s  98 %  ETA 0:04",
        "tokenizing: 4/4 shards  1,000 tokens/s  100 %  ETA 0:00",
    ]


def test_small_shards_do_not_fill_the_log(lines):
    found = lines(1000, [(1, 1, 10)] * 1000)
    assert len(found) == 100 and found[0].startswith(
        "tokenizing: 10/1000 shards  10 tokens/s  1 %  ETA 16:30"
    )


def test_shards_without_a_size_or_time(lines):
    assert lines(0, [(0, 0, 0)] * 3) == []
    (line,) = lines(0, [(10, 0, 5)])
    assert line.startswith("tokenizing: 1/1 shards  0 tokens/s")
