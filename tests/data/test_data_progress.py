"""What takes long shows how far it is: a bar on a terminal, lines in a log."""

import logging
import os
import pty
import subprocess
import sys
import time

import pytest

from dynamic_transformers.data import progress as progress_module
from dynamic_transformers.data.progress import Progress, ReadingProgress


@pytest.fixture
def lines(monkeypatch, caplog):
    """Lines that were logged, one in 0.05 seconds."""
    monkeypatch.setattr(progress_module, "SECONDS", 0.05)
    caplog.set_level(logging.INFO, logger="dynamic_transformers")
    return caplog


def wait_for_line(lines):
    lines.clear()
    end = time.monotonic() + 30
    while not lines.messages and time.monotonic() < end:
        time.sleep(0.01)
    return lines.messages[0]


def test_a_log_has_lines_while_one_piece_of_work_goes_on(lines):
    with Progress("packing", 1000, "tokens") as progress:
        assert wait_for_line(lines) == "packing: 0 tokens/s"
        progress.add(250)
        line = wait_for_line(lines)
        assert line.startswith("packing: ") and "  25 %  ETA 0:0" in line and " 0 tokens/s" not in line
    lines.clear()
    time.sleep(0.2)
    assert not lines.messages


def test_what_is_short_says_nothing(lines, monkeypatch):
    monkeypatch.setattr(progress_module, "SECONDS", 10.0)
    start = time.monotonic()
    with Progress("packing", 1, "tokens") as progress:
        progress.add(1)
    assert not lines.messages and time.monotonic() - start < 5


def test_shards_that_are_not_finished_count_by_their_tokens(lines):
    begun = 0
    with ReadingProgress("tokenizing", 4, 4000, lambda: begun) as progress:
        assert wait_for_line(lines) == "tokenizing: 0/4 shards"
        begun = 100
        line = wait_for_line(lines)
        assert line.startswith("tokenizing: 0/4 shards") and line.endswith("tokens/s")  # no share yet
        progress.finish(1000, 200)
        assert "1/4 shards" in (line := wait_for_line(lines)) and "  38 %  ETA" in line


BAR = """
import time
from dynamic_transformers.data import progress
progress.BAR_SECONDS = 0.05
with progress.Progress("packing", 100, "tokens") as shown:
    for _ in range(20):
        shown.add(5)
        time.sleep(0.05)
print("end")
"""


def test_a_terminal_has_a_bar_that_goes_away():
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-c", BAR], stderr=theirs, stdout=subprocess.PIPE, env=environment
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 1 << 16)
        except OSError:  # it has ended
            break
    assert process.communicate(timeout=60)[0] == b"end\n" and process.returncode == 0
    os.close(ours)
    text = shown.decode()
    assert "packing" in text and "━" in text and "ETA 0:00" in text
    assert text.rstrip().endswith("\x1b[2K")  # the line is cleared
