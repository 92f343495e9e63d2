"""Checkpoints without pickle: weights, optimizer state and random state as safetensors, counters as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from dynamic_transformers.manifest import fresh_folder, write_json
from dynamic_transformers.settings import UserError
from dynamic_transformers.training.budget import Progress

STATE = "state.json"


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of optimizer step `step` lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, identity: str
) -> None:
    """Write a checkpoint atomically.

    Args:
        identity: digest of the settings that must agree when the run goes on.
    """
    with fresh_folder(folder) as temporary:
        save_model(model, str(temporary / "model.safetensors"))
        save_file(optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
        save_file(random_state(), temporary / "random.safetensors")
        write_json(temporary / STATE, {"identity": identity, **vars(progress)})


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: str
) -> Progress:
    """Put a checkpoint's state into `model`, `optimizer` and the random generators.

    Raises:
        UserError: the checkpoint is of a run with other settings.
    """
    state = read_state(folder)
    if state.pop("identity") != identity:
        raise UserError(
            f"{folder}: made with other settings; give another run.name, training.resume=none, or --force"
        )
    load_model(model, folder / "model.safetensors")
    tensors = load_file(folder / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        if f"{name}/step" in tensors:
            optimizer.state[parameter] = {
                key: tensors[f"{name}/{key}"].to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
    for name, value in load_file(folder / "random.safetensors").items():
        if name == "cpu":
            torch.set_rng_state(value)
        else:
            torch.cuda.set_rng_state(value)
    return Progress(**state)


def read_state(folder: Path) -> dict:
    """Counters and identity of a checkpoint.

    Raises:
        UserError: not a checkpoint folder.
    """
    path = folder / STATE
    if not path.is_file():
        raise UserError(f"{folder}: not a checkpoint (no {STATE})")
    return json.loads(path.read_text())


def checkpoints(run_dir: Path) -> list[Path]:
    """A run's checkpoints, by step."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name."""
    return {
        f"{name}/{key}": value.contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def random_state() -> dict[str, torch.Tensor]:
    """States of torch's generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
