"""AdamW with a group for each kind of parameter, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from dynamic_transformers.models.architectures import architecture_of
from dynamic_transformers.settings import OptimizerSettings

GROUPS = ("base", "router", "prior", "surprise", "predictor")


def build_optimizer(model: PreTrainedModel, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over all trainable parameters; no weight decay on norms, biases and scalars."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    architecture = architecture_of(model.config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((architecture.parameter_kind(name), parameter.ndim >= 2), []).append(parameter)
    multipliers = {kind: getattr(settings, f"{kind}_lr_multiplier", 1.0) for kind in GROUPS}
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "kind": kind,
                "base_lr": settings.lr * multipliers[kind],
                "lr": settings.lr * multipliers[kind],
                "weight_decay": settings.weight_decay if decays else 0.0,
            }
            for (kind, decays), parameters in groups.items()
        ],
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def learning_rate_factor(settings: OptimizerSettings, step: int, total_steps: int) -> float:
    """Factor on the learning rate at a step: linear warm-up, then a cosine to `min_lr_fraction`."""
    warmup = max(1, round(settings.warmup_fraction * total_steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return settings.min_lr_fraction + (1 - settings.min_lr_fraction) * cosine


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its base."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
