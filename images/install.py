"""Installs the requirements of one part of an image: `install.py PART [PIP-OPTION...]`.

A part is `build` (what builds our package, and those that come as source), `torch` (torch and what is built
on it), `evaluate` (lm-eval and what reports need), `core` (the other dependencies), `kfp`, or an extra of
pyproject.toml; versions are those of constraints.txt.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"torch": ("accelerate", "torch"), "evaluate": ("lm-eval", "matplotlib", "scipy")}


def requirements(part: str, pyproject: dict) -> list[str]:
    """Requirements of a part.

    Raises:
        KeyError: no such extra.
    """
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    if part == "build":
        return pyproject["build-system"]["requires"]
    if part == "kfp":
        return [line for line in extras["pipeline"] if name(line) == "kfp"]
    if part in PARTS:
        return [line for line in project["dependencies"] if name(line) in PARTS[part]]
    if part == "core":
        elsewhere = [entry for names in PARTS.values() for entry in names]
        return [line for line in project["dependencies"] if name(line) not in elsewhere]
    return extras[part]


def name(requirement: str) -> str:
    """The package that a requirement is about."""
    return re.split(r"[^\w-]", requirement)[0]


if __name__ == "__main__":
    part, *options = sys.argv[1:]
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    common = ["--constraint", str(ROOT / "constraints.txt"), "--find-links", str(ROOT / "images" / "wheels")]
    common += ["--no-build-isolation"] if part != "build" else []
    command = [sys.executable, "-m", "pip", "install", *common, *options, *requirements(part, pyproject)]
    sys.exit(subprocess.run(command).returncode)
