"""Installs the requirements of one part of an image: `install.py PART [PIP-OPTION...]`.

A part is `torch` (torch and what is built on it), `core` (the other dependencies), or an extra of
pyproject.toml; versions are those of constraints.txt.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = ("accelerate", "torch")


def requirements(part: str, project: dict) -> list[str]:
    """Requirements of a part.

    Raises:
        KeyError: no such extra.
    """
    if part not in ("core", "torch"):
        return project["optional-dependencies"][part]
    return [
        line
        for line in project["dependencies"]
        if (re.split(r"[^\w-]", line)[0] in TORCH) == (part == "torch")
    ]


if __name__ == "__main__":
    part, *options = sys.argv[1:]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = ("--constraint", str(ROOT / "constraints.txt"))
    command = [sys.executable, "-m", "pip", "install", *constraints, *options, *requirements(part, project)]
    sys.exit(subprocess.run(command).returncode)
