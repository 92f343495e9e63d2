"""docs/extending.md: its files are written, its commands run, and what they print is what the page shows."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dynamic_transformers.settings import PROJECT_ROOT

PAGE = (PROJECT_ROOT / "docs" / "extending.md").read_text()
BLOCK = re.compile(r"^(?:`(?P<file>\S+)`\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
TIME, FRACTION = r"\d\d:\d\d:\d\d", r"\d[\d,]*\.\d+(?:e[+-]\d+)?"
TOLERANCE = 0.2  # of fractions: another machine rounds otherwise, and training adds that up


def is_printed(line, printed):
    """Whether the line is there, with other times and fractions, wider columns, or absolute paths."""
    parts = re.split(rf"({FRACTION})", re.sub(TIME, "TIME", line.strip()))
    words = [re.sub(r"\\ (?:\\ )*", r"\\s+(?:/\\S+/)?", re.escape(part)) for part in parts[::2]]
    pattern = rf"({FRACTION})".join(words).replace("TIME", TIME)
    wanted = [number(part) for part in parts[1::2]]
    return any(
        list(map(number, found.groups())) == pytest.approx(wanted, rel=TOLERANCE)
        for found in re.finditer(rf"^\s*{pattern}\s*$", printed, re.MULTILINE)
    )


def number(text):
    return float(text.replace(",", ""))


def write_files(text, folder):
    for block in BLOCK.finditer(text):
        if block["file"]:
            file = folder / block["file"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block["text"])


def run_commands(text, folder):
    """Run the commands in order; a block of text holds lines that the commands before it print."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
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


def test_the_page_does_what_it_says(tmp_path):
    assert len(BLOCK.findall(PAGE)) * 2 == PAGE.count("```")
    write_files(PAGE, tmp_path)
    _, data, *independent, comparison, _ = PAGE.split("\n## ")
    run_commands(data, tmp_path)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run_commands, independent, [tmp_path] * len(independent)))
    run_commands(comparison, tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("```bash\nfalse\ntrue\n```", "false"),
        ("```bash\necho 12 of 3.5\n```\n```text\n13 of 3.5\n```", "not printed: 13 of 3.5"),
        ("```bash\necho 12 of 3.5\n```\n```text\n12 of 4.5\n```", "not printed: 12 of 4.5"),
        ("```python\nprint(1)\n```", "neither a named file nor a command"),
    ],
)
def test_a_page_that_does_something_else_fails(text, told, tmp_path):
    with pytest.raises(AssertionError, match=told):
        run_commands(text, tmp_path)


def test_times_rounding_and_places_may_differ(tmp_path):
    run_commands(
        "```bash\necho 10:00:00 12   of 3.5 '│' to: /a/b/c.txt\n```\n"
        "```text\n15:33:01 12 of 3.6 │ to: b/c.txt\n```",
        tmp_path,
    )
