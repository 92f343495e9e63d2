"""Pages of docs/ as tests: their files are written, their commands run, and what they print is compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

BLOCK = re.compile(r"^(?:`(?P<file>\S+)`\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
TIME, FRACTION = r"\d\d:\d\d:\d\d", r"\d[\d,]*\.\d+(?:e[+-]\d+)?"
TOLERANCE = 0.2  # of fractions: another machine rounds otherwise, and training adds that up


def is_printed(line: str, printed: str) -> bool:
    """Whether the line is there, with other times and fractions, wider columns, or absolute paths."""
    parts = re.split(rf"({FRACTION})", re.sub(TIME, "TIME", line.strip()))
    words = [re.sub(r"\\ (?:\\ )*", r"\\s+(?:/\\S+/)?", re.escape(part)) for part in parts[::2]]
    pattern = rf"({FRACTION})".join(words).replace("TIME", TIME)
    wanted = [number(part) for part in parts[1::2]]
    return any(
        list(map(number, found.groups())) == pytest.approx(wanted, rel=TOLERANCE)
        for found in re.finditer(rf"^\s*{pattern}\s*$", printed, re.MULTILINE)
    )


def number(text: str) -> float:
    return float(text.replace(",", ""))


def write_files(text: str, folder: Path) -> None:
    """Write the blocks that a file's name stands over."""
    for block in BLOCK.finditer(text):
        if block["file"]:
            file = folder / block["file"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block["text"])


def run_commands(text: str, folder: Path, environment: Mapping[str, str] | None = None) -> None:
    """Run the commands in order; a block of text holds lines that the commands before it print."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path} | dict(environment or {})
    printed = ""
    for block in BLOCK.finditer(text):
        if block["file"]:
            continue
        if block["kind"] == "bash":
            command = ["bash", "-e", "-c", block["text"]]
            ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            printed = ended.stdout + ended.stderr
            assert ended.returncode == 0, f"{block['text']}\n{printed}"
            continue
        assert block["kind"] == "text", f"neither a named file nor a command:\n{block['text']}"
        for line in block["text"].splitlines():
            assert is_printed(line, printed), f"not printed: {line}\n{printed}"
