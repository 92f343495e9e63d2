"""docs/extending.md: its files are written, its commands run, and what they print is what the page shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

from dynamic_transformers.settings import PROJECT_ROOT

PAGE = PROJECT_ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"^(?:`(?P<file>\S+)`\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
VARIES = r"\d\d:\d\d:\d\d|\d[\d,]*\.\d+(?:e[+-]\d+)?"  # times, and what rounding may change


def pattern_of(line: str) -> str:
    """Matches the line with other fractions and times, wider columns, and relative paths made absolute."""
    words = [re.sub(VARIES, "@", word) for word in line.split()]
    return r"\s+".join(r"(?:/\S+/)?" + re.escape(word).replace("@", rf"(?:{VARIES})") for word in words)


def test_the_page_does_what_it_says(tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    blocks = list(BLOCK.finditer(PAGE.read_text()))
    assert len(blocks) * 2 == PAGE.read_text().count("```")
    printed = ""
    for block in blocks:
        if block["file"]:
            file = tmp_path / block["file"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block["text"])
        elif block["kind"] == "bash":
            command = ["bash", "-e", "-c", block["text"]]
            result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, f"{block['text']}\n{result.stdout}\n{result.stderr}"
            printed = result.stdout + result.stderr
        else:
            assert block["kind"] == "text", f"a block that is neither named nor a command:\n{block['text']}"
            for line in block["text"].splitlines():
                found = re.search(rf"^\s*{pattern_of(line)}\s*$", printed, re.MULTILINE)
                assert found, f"{line}\nnot in\n{printed}"
