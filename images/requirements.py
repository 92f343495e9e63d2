"""Prints the requirements of one part of an image, read from pyproject.toml: `requirements.py PART...`.

A part is `torch` (torch and what is built on it), `core` (the other dependencies), or an extra.
"""

import re
import sys
import tomllib
from pathlib import Path

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
    folder = Path(__file__).resolve().parent
    path = next(
        path for path in (folder / "pyproject.toml", folder.parent / "pyproject.toml") if path.is_file()
    )
    project = tomllib.loads(path.read_text())["project"]
    print("\n".join(line for part in sys.argv[1:] for line in requirements(part, project)))
