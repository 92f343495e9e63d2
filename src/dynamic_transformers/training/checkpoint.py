"""Checkpoints without pickle: weights and optimizer state as safetensors, counters and digests as JSON.

There is no random state to save: random numbers are a function of seed, step and rank (`step.seed_step`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from dynamic_transformers.manifest import file_digest, fresh_folder, write_json
from dynamic_transformers.settings import UserError
from dynamic_transformers.training.budget import Budget, Progress

logger = logging.getLogger("dynamic_transformers")

STATE = "state.json"
NAME = re.compile(r"step-\d{8,}")
WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter that it has updated


@dataclass
class Checkpoint:
    """A checkpoint's folder and what its `state.json` says.

    Attributes:
        identity: the settings that decide the numbers; they must agree when a run goes on.
        schedule: what the schedules stretch over.
        files: file name → SHA-256.
    """

    folder: Path
    identity: dict[str, Any]
    schedule: Budget
    progress: Progress
    files: dict[str, str]


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of optimizer step `step` lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """A run's checkpoints, by step; folders of other names are the user's."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: dict[str, Any],
    schedule: Budget,
) -> None:
    """Write a checkpoint, which is there at once and whole, and on the disk."""
    with fresh_folder(folder) as temporary:
        save_model(model, str(temporary / WEIGHTS))
        save_file(optimizer_tensors(model, optimizer), temporary / OPTIMIZER)
        state = {
            "identity": identity,
            "schedule": dataclasses.asdict(schedule),
            "progress": dataclasses.asdict(progress),
            "files": {name: file_digest(temporary / name) for name in (WEIGHTS, OPTIMIZER)},
        }
        write_json(temporary / STATE, state)


def load_checkpoint(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's state into `model` and `optimizer`.

    Raises:
        UserError: it holds other parameters than the model.
    """
    load_model(model, checkpoint.folder / WEIGHTS)
    tensors = load_file(checkpoint.folder / OPTIMIZER)
    for name, parameter in model.named_parameters():
        if any(f"{name}/{key}" in tensors for key in MOMENTS):
            optimizer.state[parameter] = {
                key: tensors.pop(f"{name}/{key}").to(parameter.device) for key in MOMENTS
            }
    missing = not optimizer.state and checkpoint.progress.step > checkpoint.progress.skipped
    if tensors or missing:
        what = f"knows parameters that the model has not: {min(tensors)}" if tensors else "is empty"
        raise UserError(f"{checkpoint.folder / OPTIMIZER}: {what}")


def read_checkpoint(folder: Path) -> Checkpoint:
    """A whole checkpoint: every file has the digest that was noted when it was written.

    Raises:
        UserError: not a checkpoint, or a damaged one; the line names the file.
    """
    path = folder / STATE
    if not path.is_file():
        raise UserError(f"{folder}: not a checkpoint (no {STATE})")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        checkpoint = Checkpoint(
            folder,
            state["identity"],
            Budget(**state["schedule"]),
            Progress(**state["progress"]),
            state["files"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged") from error
    for name, expected in checkpoint.files.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing")
        if file_digest(folder / name) != expected:
            raise UserError(f"{folder / name}: damaged: its SHA-256 is not the one that was written")
    return checkpoint


def newest_whole(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that is not damaged; a warning names what is. None: there is no checkpoint.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    folders = checkpoints(run_dir)
    for folder in reversed(folders):
        try:
            return read_checkpoint(folder)
        except UserError as error:
            reason = error
            logger.warning("%s; the checkpoint before it is tried", error)
    if folders:
        raise UserError(f"{run_dir}: no checkpoint is whole ({reason}); --force begins anew")
    return None


def last_good(run_dir: Path) -> Path | None:
    """The newest whole checkpoint whose last step was an update."""
    for folder in reversed(checkpoints(run_dir)):
        try:
            if not read_checkpoint(folder).progress.skipped_in_a_row:
                return folder
        except UserError:
            continue
    return None


def prune(run_dir: Path, keep: int | None) -> None:
    """Remove all but the last `keep` checkpoints and the one of the lowest evaluation loss; None keeps all.

    The newest is read back before anything goes.

    Raises:
        UserError: it is damaged.
    """
    folders = checkpoints(run_dir)
    if keep is None or len(folders) <= keep:
        return
    read_checkpoint(folders[-1])
    losses = {folder: loss for folder in folders if (loss := _evaluated_loss(folder)) is not None}
    best = min(losses, key=losses.__getitem__, default=None)
    for folder in folders[:-keep]:
        if folder != best:
            half = folder.rename(
                folder.with_name(f".{folder.name}.new-pruned")
            )  # a kill leaves no half of it
            shutil.rmtree(half)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name."""
    return {
        f"{name}/{key}": value.contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _evaluated_loss(folder: Path) -> float | None:
    try:
        progress = Progress(**json.loads((folder / STATE).read_text(encoding="utf-8"))["progress"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    evaluation = progress.evaluation
    return evaluation["loss"] if evaluation.get("step") == progress.step else None
