"""`results.json` of one model: each bench adds its tasks, and replaces those that it has done again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from dynamic_transformers.folders import make_folder, sole_writer
from dynamic_transformers.manifest import digest, file_digest, write_json
from dynamic_transformers.settings import UserError

RESULTS = "results.json"


def results_path(model_dir: Path, output_path: Path | None) -> Path:
    """The file that a bench writes, which it can: found out before hours of tasks.

    Args:
        output_path: a file, or a folder that there is; None: in the model's folder.

    Raises:
        UserError: it cannot be written.
    """
    path = output_path or model_dir / RESULTS
    if path.is_dir():
        path = path / RESULTS
    if output_path:
        make_folder(path.parent)
    elif not model_dir.is_dir():
        raise UserError(f"{model_dir}: no such folder")
    refuse_unwritable(path)
    return path


def refuse_unwritable(path: Path) -> None:
    """Refuse a file that cannot be written into its folder."""
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); name another file with --output_path"
        ) from error


WEIGHTS = ("*.safetensors", "*.bin", "config.json", "*.py")


def identity(model_dir: Path) -> dict[str, str]:
    """Which model a folder holds: where it lies, and a digest of its weights and configuration."""
    files = sorted(file for name in WEIGHTS for file in model_dir.glob(name))
    return {
        "path": str(model_dir.resolve()),
        "sha256": digest({file.name: file_digest(file) for file in files}),
    }


def add_results(path: Path, result: dict[str, Any], model: dict[str, str]) -> None:
    """Add what `run_benchmarks` returned to the file; of several processes, none loses the others' tasks.

    Raises:
        UserError: as `read_results`.
    """
    with sole_writer(path, wait=True):
        before = read_results(path, model)
        for part in ("results", "configs", "realised"):
            result = result | {part: before.get(part, {}) | result[part]}
        write_json(path, {"model": model, **result})


def read_results(path: Path, model: dict[str, str]) -> dict[str, Any]:
    """The results that the file holds; empty where there is none.

    Args:
        model: the `identity` of the model that the results must belong to.

    Raises:
        UserError: it holds something else, or results of another model.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        sound = all(isinstance(found[part], dict) for part in ("results", "configs"))
        of = found["model"]
        path_of, digest_of = of["path"], of["sha256"]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError):
        sound, path_of, digest_of = False, "", ""
    if not sound:
        raise UserError(
            f"{path}: holds no results of bench that name their model; remove it, or name another file with "
            "--output_path"
        )
    if digest_of != model["sha256"]:
        raise UserError(
            f"{path}: holds results of another model, {path_of}; name another file with --output_path"
        )
    return found
