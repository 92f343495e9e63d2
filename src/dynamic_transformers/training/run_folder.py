"""The folder of a training run: when it may be written to, and where a run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from dynamic_transformers.manifest import MANIFEST
from dynamic_transformers.settings import Settings, UserError
from dynamic_transformers.tracking import METRICS, STATE, forget_after
from dynamic_transformers.training.checkpoint import checkpoints, read_state

CONFIG = "config.yaml"


def resume_point(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that `training.resume` means; None: begin anew."""
    if resume == "none":
        return None
    return max(checkpoints(run_dir), default=None) if resume == "auto" else Path(resume)


def claim_run_dir(run_dir: Path, settings: Settings, force: bool) -> None:
    """Make `run_dir` ready: emptied when the run begins anew, cut behind the checkpoint where it goes on.

    Raises:
        UserError: it holds a finished run with other settings, which only `force` replaces, or something
            that is no run; or the checkpoint to go on from is none, or would be deleted.
    """
    if (run_dir / MANIFEST).is_file() and not force:
        raise UserError(
            f"{run_dir} holds a finished run with other settings; "
            "choose another run.name, or replace it by --force"
        )
    if run_dir.exists() and any(run_dir.iterdir()) and not (run_dir / CONFIG).is_file():
        raise UserError(f"{run_dir}: holds something else than a run; choose another run.name")
    point = resume_point(run_dir, settings.training.resume)
    own = point is not None and point.resolve().is_relative_to(run_dir.resolve())
    if force and settings.training.resume == "auto":
        point, own = None, False
    if force and own:
        raise UserError(f"--force would delete {point}, from which training.resume wants to go on")
    step = read_state(point)["step"] if point is not None else 0
    if own:
        for later in checkpoints(run_dir):
            if read_state(later)["step"] > step:
                shutil.rmtree(later)
        forget_after(run_dir, step)
    else:
        for name in ("checkpoints", "final_model", "evaluation"):
            shutil.rmtree(run_dir / name, ignore_errors=True)
        for name in (METRICS, STATE, MANIFEST):
            (run_dir / name).unlink(missing_ok=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / CONFIG).write_text(yaml.safe_dump(settings.to_dict(), sort_keys=False))
