"""`results.json`: each bench adds its tasks, and replaces those that it has done again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from dynamic_transformers.folders import make_folder, sole_writer
from dynamic_transformers.manifest import write_json
from dynamic_transformers.settings import UserError

RESULTS = "results.json"


def results_path(model_dir: Path, output_path: Path | None) -> Path:
    """The file that a bench writes, which it can: found out before hours of tasks.

    Args:
        output_path: a file, or a folder that there is; None: in the model's folder.

    Raises:
        UserError: it cannot be written, or what stands there are no results.
    """
    path = output_path or model_dir / RESULTS
    if path.is_dir():
        path = path / RESULTS
    if output_path:
        make_folder(path.parent)
    elif not model_dir.is_dir():
        raise UserError(f"{model_dir}: no such folder")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); name another file with --output_path"
        ) from error
    _read(path)
    return path


def add_results(path: Path, result: dict[str, Any]) -> None:
    """Add what `run_benchmarks` returned to the file; of several processes, none loses the others' tasks."""
    with sole_writer(path, wait=True):
        before = _read(path)
        for part in ("results", "configs"):
            result = result | {part: before.get(part, {}) | result[part]}
        write_json(path, result)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(found[part], dict) for part in ("results", "configs")):
            return found
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path}: holds no results of bench; remove it, or name another file with --output_path")
